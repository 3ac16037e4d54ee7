// Which they are follows peft/tuners/tuners_utils.py (_mark_only_adapters_as_trainable) and
// peft/utils/other.py (_set_trainable).
#include "models/replaced_parameters.h"

#include <algorithm>
#include <map>
#include <set>

#include "tensor/backend.h"

namespace graft {
namespace {

std::string module_of(const std::string& parameter) {
  return parameter.substr(0, parameter.rfind('.'));
}

struct Collect : Visitor {
  std::vector<std::string> names;              // of parameters
  std::map<std::string, Variable*> places;     // by name
  std::set<std::string> adapted, projections;  // of linear layers
  void parameter(const std::string& name, Variable& value) override {
    names.push_back(name);
    places[name] = &value;
  }
  void linear(const std::string& name, Linear& module) override {
    if (module.lora) adapted.insert(name);
    if (name != "lm_head") projections.insert(name);
  }
};
Collect collect(Decoder& model) {
  Collect all;
  model.visit("", all);
  if (all.places.try_emplace("lm_head.weight", &model.lm_head.weight).second)
    all.names.push_back("lm_head.weight");  // tied
  return all;
}

// The modules that an entry of modules_to_save matches: those that own parameters, and what holds
// them.
std::vector<std::string> matched_modules(const Collect& model, const std::string& entry) {
  std::vector<std::string> matched;
  std::set<std::string> seen;
  for (std::string name : model.names)
    while (name.find('.') != std::string::npos) {
      name = module_of(name);
      if (seen.insert(name).second && name.ends_with(entry)) matched.push_back(name);
    }
  return matched;
}

std::set<std::string> modules_to_save(const Collect& model, const LoraConfig& config) {
  std::set<std::string> modules;
  for (const std::string& entry : config.modules_to_save) {
    const std::vector<std::string> matched = matched_modules(model, entry);
    CHECK(!matched.empty(), "lora: modules_to_save names '", entry,
          "', which is no module of the model; it could be lm_head, embed_tokens, or a norm");
    for (const std::string& name : matched) {
      CHECK(model.places.contains(name + ".weight") && !model.projections.contains(name),
            "lora: modules_to_save '", entry, "' matches ", name,
            "; lm_head, embed_tokens and norms can be trained whole, projections have adapters");
      modules.insert(name);
    }
  }
  return modules;
}

DType own_dtype(const Decoder& model, const Shape& shape) {
  const DType computed = model.compute_dtype();
  return shape.rank() == 1 && computed == DType::BF16 ? DType::F32 : computed;
}

}  // namespace

std::vector<std::pair<std::string, Shape>> replaced_parameters(Decoder& model,
                                                               const LoraConfig& config) {
  const Collect all = collect(model);
  const std::set<std::string> whole = modules_to_save(all, config);
  // PEFT wraps the head for both, and cannot read what comes of it.
  CHECK(config.trainable_token_indices.empty() || !model.config().tie_word_embeddings ||
            !whole.contains("lm_head"),
        "lora: trainable_token_indices and modules_to_save both take lm_head, which is tied to "
        "model.embed_tokens; leave it out of modules_to_save");
  std::vector<std::pair<std::string, Shape>> wanted;
  for (const std::string& name : all.names) {
    const bool trained_bias =
        is_bias(name) &&
        (config.bias == LoraConfig::Bias::All ||
         (config.bias == LoraConfig::Bias::LoraOnly && all.adapted.contains(module_of(name))));
    if (trained_bias || whole.contains(module_of(name)))
      wanted.emplace_back(name, all.places.at(name)->shape());
  }
  return wanted;
}

void replace_parameter(Decoder& model, const std::string& name, const Tensor& own) {
  Variable& place = *collect(model).places.at(name);
  const Tensor value =
      own.to(own_dtype(model, own.shape()), Scope::Adapters).to(model.device(), Scope::Adapters);
  model.replaced.push_back({name, place, Variable(value, true)});
  place = model.replaced.back().own;
}

void start_replaced_parameters(Decoder& model, const LoraConfig& config) {
  restore_parameters(model);
  const Collect all = collect(model);
  for (const auto& [name, shape] : replaced_parameters(model, config)) {
    const Tensor base = all.places.at(name)->value();
    Tensor own = Tensor::empty(shape, own_dtype(model, shape), base.device(), Scope::Adapters);
    backend_of(own).copy(own, base);
    replace_parameter(model, name, own);
  }
}

void restore_parameters(Decoder& model, int64_t adapter) {
  show_replaced(model, adapter, false);
  std::erase_if(model.replaced, [&](const auto& one) { return one.adapter == adapter; });
}

void show_replaced(Decoder& model, int64_t adapter, bool on) {
  const Collect all = collect(model);
  for (const ReplacedParameter& one : model.replaced)
    if (one.adapter == adapter) *all.places.at(one.name) = on ? one.own : one.original;
}

}  // namespace graft
