#include "models/adapter.h"

#include <algorithm>

#include "models/nearest_name.h"
#include "models/replaced_parameters.h"
#include "models/residual_base.h"
#include "tensor/backend.h"

namespace graft {
namespace {

// What the file says against the model, before anything is attached.
void check_fits(const AdapterFile& file, const std::vector<NamedLinear>& layers,
                const ModelConfig& config) {
  for (const auto& [name, tokens] : file.embeddings) {
    CHECK(tokens == config.vocab_size, file.directory, ": '", name, "' has ", tokens,
          " tokens, but the model has ", config.vocab_size,
          "; the adapter was trained on a base whose vocabulary was resized, give that one");
    // PEFT saves the base's own beside an adapter on it.
    const std::string of_base = ".base_layer.weight";
    if (name.ends_with(of_base) &&
        file.find(name.substr(kAdapterPrefix.size(),
                              name.size() - kAdapterPrefix.size() - of_base.size())))
      continue;
    fail(file.directory, ": '", name,
         "' has no place: neither modules_to_save nor target_modules of adapter_config.json name "
         "it; do the two files belong together?");
  }
  for (const AdapterModule& module : file.modules) {
    const auto same = [&](const NamedLinear& layer) { return layer.name == module.name; };
    const auto layer = std::find_if(layers.begin(), layers.end(), same);
    if (layer == layers.end()) {
      std::vector<std::string> names;
      for (const NamedLinear& one : layers) names.push_back(one.name);
      const std::string nearest = nearest_name(module.name, names);
      const auto other = std::find_if(layers.begin(), layers.end(),
                                      [&](const NamedLinear& one) { return one.name == nearest; });
      fail(file.directory, ": '", module.name, "' has no place in this model (",
           config.architecture, ", ", config.num_hidden_layers, " layers); its nearest module is '",
           nearest, "', (", other->linear->out_features(), ", ", other->linear->in_features(),
           "); is the adapter for another model or family?");
    }
    const Linear& linear = *layer->linear;
    CHECK(module.a.size(1) == linear.in_features() && module.b.size(0) == linear.out_features(),
          file.directory, ": '", module.name, "' has A ", module.a.shape(), " and B ",
          module.b.shape(), ", expected (r, ", linear.in_features(), ") and (",
          linear.out_features(), ", r); is this the base model of the adapter?");
  }
}

void fill_pairs(const std::vector<NamedLinear>& layers, const AdapterFile& file) {
  for (const auto& [name, linear] : layers) {
    if (!linear->lora) continue;
    const AdapterModule* module = file.find(name);
    CHECK(
        module, file.directory, ": the tensors of '", name, "' are missing (", file.modules.size(),
        " modules are there), but adapter_config.json names it; do the two files belong together?");
    Tensor a = linear->lora->a.value(), b = linear->lora->b.value();
    backend_of(a).copy(a, module->a);
    backend_of(b).copy(b, module->b);
    if (!linear->lora->magnitude.defined()) continue;
    Tensor magnitude = linear->lora->magnitude.value();
    backend_of(magnitude).copy(magnitude, module->magnitude);
  }
}

// Puts what the file has in the place of the base's biases and whole modules.
void put_replaced(Decoder& model, const AdapterFile& file) {
  const auto wanted = replaced_parameters(model, file.config);
  for (const auto& [name, own] : file.replaced)
    CHECK(std::any_of(wanted.begin(), wanted.end(), [&](auto& one) { return one.first == name; }),
          file.directory, ": '", name, "' has no place in this model (",
          model.config().architecture, ", ", model.config().num_hidden_layers,
          " layers); is the adapter for another model or family?");
  for (const auto& [name, shape] : wanted) {
    const auto own = std::find_if(file.replaced.begin(), file.replaced.end(),
                                  [&](const auto& one) { return one.first == name; });
    CHECK(own != file.replaced.end(), file.directory, ": the tensor of '", name,
          "' is missing, but ", is_bias(name) ? "bias" : "modules_to_save",
          " of adapter_config.json asks for it; do the two files belong together?");
    CHECK(own->second.shape() == shape, file.directory, ": '", name, "' is ", own->second.shape(),
          ", expected ", shape, "; is this the base model of the adapter?");
  }
  for (const auto& [name, own] : file.replaced) replace_parameter(model, name, own);
}

void fill_tokens(const TokenRows& tokens, const AdapterFile& file) {
  Tensor rows = tokens.rows.value();
  CHECK(rows.shape() == file.token_rows.shape(), file.directory, ": the rows of tokens are ",
        file.token_rows.shape(), ", expected ", rows.shape(),
        "; is the adapter for another model?");
  backend_of(rows).copy(rows, file.token_rows);
}

}  // namespace

void attach_adapter(Decoder& model, const AdapterFile& file, const AdapterChecks& checks) {
  const std::string& directory = file.directory;
  if (!checks.allow_other_base) check_same_base(file.base, model.fingerprint, directory);
  if (!checks.allow_empty) check_not_empty(file);
  const auto layers = adaptable_layers(model);
  check_fits(file, layers, model.config());
  try {
    restore_parameters(model);
    attach_lora(layers, file.config, 0);
    fill_pairs(layers, file);
    put_replaced(model, file);
    if (file.token_rows.defined()) fill_tokens(*model.embed_tokens.tokens, file);
    model.refresh_adapters();
  } catch (const Error& error) {
    detach_lora(layers);  // never half an adapter
    restore_parameters(model);
    const std::string text = error.what();
    if (text.find(directory) != std::string::npos) throw;
    fail(directory, ": ", text);
  }
}

LoraConfig load_adapter(Decoder& model, const std::string& directory, const AdapterChecks& checks) {
  const AdapterFile file = read_adapter(directory);
  attach_adapter(model, file, checks);
  return file.config;
}

void save_adapter(Decoder& model, const LoraConfig& config, const std::string& directory) {
  AdapterFile file;
  file.config = for_untouched_base(config);
  file.base = model.fingerprint;
  for (const auto& [name, linear] : adaptable_layers(model)) {
    if (!linear->lora) continue;
    const LoraPair& pair = *linear->lora;
    const Tensor magnitude = pair.magnitude.defined() ? pair.magnitude.value() : Tensor();
    const auto [a, b] = factors_for_untouched_base(pair);
    file.modules.push_back({name, a, b, magnitude, pair.scaling});
  }
  for (const ReplacedParameter& one : model.replaced)
    if (one.adapter == 0) file.replaced.emplace_back(one.name, one.own.value());
  if (model.embed_tokens.tokens) file.token_rows = model.embed_tokens.tokens->rows.value();
  write_adapter(file, directory);
}

}  // namespace graft
