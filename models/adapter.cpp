#include "models/adapter.h"

#include "models/nearest_name.h"
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
    fail(file.directory, ": '", name,
         "' has no place in this model: whole embeddings beside an "
         "adapter are not supported");
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

}  // namespace

void attach_adapter(Decoder& model, const AdapterFile& file, const AdapterChecks& checks) {
  const std::string& directory = file.directory;
  if (!checks.allow_other_base) check_same_base(file.base, model.fingerprint, directory);
  if (!checks.allow_empty) check_not_empty(file);
  const auto layers = linear_layers(model);
  check_fits(file, layers, model.config());
  try {
    attach_lora(layers, file.config, 0);
    fill_pairs(layers, file);
    model.refresh_adapters();
  } catch (const Error& error) {
    for (const auto& layer : layers) layer.linear->lora.reset();  // never half an adapter
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
  for (const auto& [name, linear] : linear_layers(model)) {
    if (!linear->lora) continue;
    const LoraPair& pair = *linear->lora;
    const Tensor magnitude = pair.magnitude.defined() ? pair.magnitude.value() : Tensor();
    const auto [a, b] = factors_for_untouched_base(pair);
    file.modules.push_back({name, a, b, magnitude, pair.scaling});
  }
  write_adapter(file, directory);
}

}  // namespace graft
