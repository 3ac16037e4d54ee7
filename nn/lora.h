// LoRA configuration, target matching and attachment, as PEFT does them
// (peft/tuners/tuners_utils.py).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "nn/linear.h"

namespace graft {

// The keys of adapter_config.json that graft understands; the defaults are graft's own (PEFT's are
// r 8, lora_alpha 8, no dropout).
struct LoraConfig {
  int64_t r = 16;
  std::optional<double> lora_alpha;  // unset: 2 r
  double lora_dropout = 0.05;
  // Either a list of names (a module matches when it is one, or ends with "." + one), or, with
  // target_is_regex, one regular expression that must match the whole module name. {"all-linear"}
  // takes every linear layer but lm_head.
  std::vector<std::string> target_modules = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                             "gate_proj", "up_proj", "down_proj"};
  bool target_is_regex = false;
  std::vector<std::string> exclude_modules;
  bool exclude_is_regex = false;
  std::vector<int64_t> layers_to_transform;  // empty: all
  // Keys are regular expressions, (.*\.)?(KEY)$ must match the module name; overlaps are an error.
  std::vector<std::pair<std::string, int64_t>> rank_pattern;
  std::vector<std::pair<std::string, double>> alpha_pattern;
  std::vector<int64_t> trainable_token_indices;  // rows of embed_tokens (nn/linear.h, TokenRows)
  bool use_rslora = false;
  bool use_dora = false;  // nn/dora.h
  // Biases of the base that are trained too: of the adapted layers, or all.
  enum class Bias { None, LoraOnly, All } bias = Bias::None;
  // Modules of which the adapter has a copy of its own, trained whole: those whose name ends with
  // an entry (models/replaced_parameters.h). Nothing in them is adapted.
  std::vector<std::string> modules_to_save;
  enum class Init {
    KaimingUniform,
    Gaussian,
    Random,
    Pissa,
    Olora
  } init_lora_weights = Init::KaimingUniform;  // true, gaussian, false, pissa, olora
  // pissa_niter_N: rounds of a randomised SVD; unset: the exact one.
  std::optional<int64_t> pissa_niter;
  std::string task_type = "CAUSAL_LM";
  std::string base_model_name_or_path;

  double alpha() const { return lora_alpha.value_or(2.0 * double(r)); }
};

bool is_all_linear(const LoraConfig& config);  // target_modules is all-linear, in any letter case

// PiSSA and OLoRA: the adapter begins as a part of each weight, and the base is what that leaves of
// it (models/residual_base.h).
inline bool has_residual_base(const LoraConfig& config) {
  return config.init_lora_weights == LoraConfig::Init::Pissa ||
         config.init_lora_weights == LoraConfig::Init::Olora;
}
// "true", "gaussian", "false", "pissa", "pissa_niter_4" or "olora".
std::string init_name(const LoraConfig& config);

// Throws Error for r < 1, dropout outside [0, 1), layers_to_transform with a regex, ...
void validate(const LoraConfig& config);

// What a module of the base gets: decided from its name alone.
struct LoraTarget {
  std::string name;  // "model.layers.0.self_attn.q_proj"
  int64_t r = 0;
  double scaling = 1;
};
// The number of the layer that holds a module: the first numeric part behind a container, 3 of
// "model.layers.3.mlp.up_proj"; -1 where there is none.
int64_t layer_index(const std::string& name);

// names: the embedding and every linear module, in model order, lm_head included. Throws an Error
// that lists what could match when nothing does.
std::vector<LoraTarget> match_targets(const LoraConfig& config,
                                      const std::vector<std::string>& names);

// Attaches fresh pairs to the layers of `model` (anything with visit()) that the config names,
// initialised from `seed`: A by U(-1/sqrt(in), 1/sqrt(in)) (Kaiming uniform with a = sqrt 5) or
// N(0, 1/r^2), B zero; of an embedding A by N(0, 1), as PEFT has it; Random fills both; with a
// residual base both stay zero for the caller to fill. Deterministic, and independent of the order
// of allocation. On Device::Meta nothing is filled. With use_dora the weights must have their
// values: the magnitudes are made from them.
template <class Model>
std::vector<LoraTarget> attach_lora(Model& model, const LoraConfig& config, uint64_t seed);

// The pieces attach_lora is made of, on a list of layers.
struct NamedLinear {
  std::string name;
  Linear* linear;
};
std::vector<LoraTarget> attach_lora(const std::vector<NamedLinear>& layers,
                                    const LoraConfig& config, uint64_t seed);

// Takes off what attach_lora put on; frozen adapters stay.
void detach_lora(const std::vector<NamedLinear>& layers);

template <class Model>
std::vector<NamedLinear> linear_layers(Model& model) {
  struct Collect : Visitor {
    std::vector<NamedLinear> layers;
    void linear(const std::string& name, Linear& module) override {
      layers.push_back({name, &module});
    }
  } collect;
  model.visit("", collect);
  return std::move(collect.layers);
}
// What an adapter may be attached to, in model order: the embedding, and every linear layer.
template <class Model>
std::vector<NamedLinear> adaptable_layers(Model& model) {
  struct Collect : Visitor {
    std::vector<NamedLinear> layers;
    void embedding(const std::string& name, Embedding& module) override {
      layers.push_back({name, &module});
    }
    void linear(const std::string& name, Linear& module) override {
      layers.push_back({name, &module});
    }
  } collect;
  model.visit("", collect);
  return std::move(collect.layers);
}
template <class Model>
std::vector<LoraTarget> attach_lora(Model& model, const LoraConfig& config, uint64_t seed) {
  return attach_lora(adaptable_layers(model), config, seed);
}
// Whether a module of this name is an embedding.
bool is_embedding(const std::string& name);

// The rows of the embedding that are trained, by PEFT's name; none where there are none.
std::vector<std::pair<std::string, Variable>> token_leaves(const std::string& module,
                                                           const Embedding& embedding);

// What of a pair is trained, in this order, by name: module + ".lora_A", ".lora_B", and with DoRA
// ".lora_magnitude_vector".
std::vector<std::pair<std::string, Variable>> adapter_leaves(const std::string& module,
                                                             const LoraPair& pair);

// PEFT's line: "trainable params: 9,175,040 || all params: 3,221,924,864 || trainable%: 0.2848".
std::string trainable_parameters_line(int64_t trainable, int64_t all);

}  // namespace graft
