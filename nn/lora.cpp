// Target matching follows peft/tuners/tuners_utils.py (check_target_module_exists) and
// peft/utils/other.py (get_pattern_key); see nn/lora.h.
#include "nn/lora.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "nn/dora.h"
#include "nn/regex.h"

namespace graft {
namespace {

// A list entry names a module when it is its whole name or the part behind a dot.
bool is_suffix(const std::string& name, const std::string& entry) {
  return name == entry || name.ends_with("." + entry);
}

bool matches(const std::string& name, const std::vector<std::string>& entries, bool is_regex) {
  if (is_regex) return Regex(entries.at(0)).full_match(name);
  return std::any_of(entries.begin(), entries.end(),
                     [&](const std::string& entry) { return is_suffix(name, entry); });
}

// Whether a module is one that is trained whole, or lies in one. PEFT wants whole parts of the name
// here, while the modules themselves need only end with an entry.
bool is_saved_whole(const std::string& name, const std::vector<std::string>& entries) {
  return std::any_of(entries.begin(), entries.end(), [&](const std::string& entry) {
    return ("." + name + ".").find("." + entry + ".") != std::string::npos;
  });
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return text;
}

// The value of the one pattern that matches the module, or `otherwise`. PEFT takes the first in the
// order of the dict, which its own writer then sorts: overlapping keys are refused, not guessed.
template <class T>
T pattern_value(const std::vector<std::pair<std::string, T>>& patterns, const std::string& name,
                T otherwise, const char* what) {
  const std::string* hit = nullptr;
  T value = otherwise;
  for (const auto& [key, candidate] : patterns) {
    if (!Regex(concat("(.*\\.)?(", key, ")$")).full_match(name)) continue;
    CHECK(!hit, "lora: ", what, " has two keys for ", name, ", '", *hit, "' and '", key,
          "'; which one wins is not defined, make them disjoint");
    hit = &key;
    value = candidate;
  }
  return value;
}

std::string join(const std::set<std::string>& names) {
  std::string text;
  for (const auto& name : names) {
    if (!text.empty()) text += ", ";
    text += name;
  }
  return text;
}

[[noreturn]] void fail_without_match(const LoraConfig& config,
                                     const std::vector<std::string>& names) {
  std::set<std::string> candidates;
  for (const auto& name : names)
    if (name != "lm_head" && !is_embedding(name))
      candidates.insert(name.substr(name.rfind('.') + 1));
  const std::set<std::string> wanted(config.target_modules.begin(), config.target_modules.end());
  int64_t last_layer = 0;
  for (const auto& name : names) last_layer = std::max(last_layer, layer_index(name));
  for (const int64_t layer : config.layers_to_transform)
    CHECK(layer <= last_layer, "lora: layers_to_transform holds ", layer,
          ", but the layers of the model are 0 to ", last_layer);
  fail("lora: target_modules (", join(wanted), ") matches no module of the model",
       config.exclude_modules.empty() && config.layers_to_transform.empty() &&
               config.modules_to_save.empty()
           ? ""
           : " after exclude_modules, layers_to_transform and modules_to_save",
       "; it could match ", join(candidates), ", or all-linear");
}

// The modules of a Llama-shaped model that are no linear layers: what holds these, and norms and
// the like.
std::set<std::string> other_modules(const std::vector<std::string>& linear_names) {
  std::set<std::string> others = {"model.norm", "model.rotary_emb"};
  for (const auto& name : linear_names)
    for (size_t dot = name.rfind('.'); dot != std::string::npos; dot = name.rfind('.', dot - 1)) {
      const std::string holder = name.substr(0, dot);
      if (!others.insert(holder).second) continue;
      if (holder.ends_with(".mlp")) others.insert(holder + ".act_fn");
      if (holder.ends_with(".self_attn")) {
        const std::string layer = holder.substr(0, holder.rfind('.'));
        for (const char* norm : {".input_layernorm", ".post_attention_layernorm",
                                 ".self_attn.q_norm", ".self_attn.k_norm"})
          others.insert(layer + norm);
      }
    }
  return others;
}

void fill_uniform(const Tensor& t, Random& random, double bound) {
  for (int64_t i = 0; i < t.num_elements(); ++i)
    t.data<float>()[i] = float((2.0 * random.uniform() - 1.0) * bound);
}

// a (r, in) and b (out, r), on the CPU.
void initialise(Tensor& a, Tensor& b, const LoraPair& pair, LoraConfig::Init init, bool embedding,
                uint64_t seed) {
  if (init == LoraConfig::Init::Pissa || init == LoraConfig::Init::Olora) return;
  const int64_t r = a.size(0), in_features = a.size(1);
  Random random(seed, 0x10aa000000000000u + pair.module);  // a stream of its own for each layer
  if (embedding) {
    for (int64_t i = 0; i < a.num_elements(); ++i) a.data<float>()[i] = float(random.normal());
  } else if (init == LoraConfig::Init::Gaussian) {
    for (int64_t i = 0; i < a.num_elements(); ++i)
      a.data<float>()[i] = float(random.normal() / double(r));
  } else {
    // Kaiming uniform with a = sqrt(5): the bound sqrt(6 / ((1 + 5) in)) is 1 / sqrt(in).
    fill_uniform(a, random, 1.0 / std::sqrt(double(in_features)));
  }
  if (init == LoraConfig::Init::Random) fill_uniform(b, random, 1.0 / std::sqrt(double(r)));
}

}  // namespace

int64_t layer_index(const std::string& name) {
  size_t begin = name.find('.');
  while (begin != std::string::npos) {
    const size_t end = name.find('.', begin + 1);
    const std::string part = name.substr(begin + 1, end - begin - 1);
    if (end != std::string::npos && !part.empty() &&
        part.find_first_not_of("0123456789") == std::string::npos)
      return std::strtoll(part.c_str(), nullptr, 10);  // beyond int64: its largest
    begin = end;
  }
  return -1;
}

bool is_embedding(const std::string& name) { return is_suffix(name, "embed_tokens"); }

bool is_all_linear(const LoraConfig& config) {
  return config.target_modules.size() == 1 && lower(config.target_modules[0]) == "all-linear";
}

std::string init_name(const LoraConfig& config) {
  switch (config.init_lora_weights) {
    case LoraConfig::Init::KaimingUniform:
      return "true";
    case LoraConfig::Init::Gaussian:
      return "gaussian";
    case LoraConfig::Init::Random:
      return "false";
    case LoraConfig::Init::Pissa:
      return config.pissa_niter ? concat("pissa_niter_", *config.pissa_niter) : "pissa";
    case LoraConfig::Init::Olora:
      return "olora";
  }
  return "";
}

void validate(const LoraConfig& config) {
  CHECK(config.r >= 1, "lora: r is ", config.r, ", expected at least 1");
  CHECK(std::isfinite(config.alpha()) && config.alpha() > 0, "lora: lora_alpha is ", config.alpha(),
        ", expected a number above 0");
  CHECK(config.lora_dropout >= 0 && config.lora_dropout < 1, "lora: lora_dropout is ",
        config.lora_dropout, ", expected at least 0 and below 1");
  CHECK(!config.target_modules.empty(),
        "lora: target_modules is empty; name modules or all-linear");
  CHECK(config.layers_to_transform.empty() || !(config.target_is_regex || is_all_linear(config)),
        "lora: layers_to_transform needs target_modules to be a list of names");
  for (int64_t layer : config.layers_to_transform)
    CHECK(layer >= 0, "lora: layers_to_transform holds ", layer, ", expected layers from 0");
  for (const std::string& entry : config.modules_to_save)
    CHECK(!entry.empty(), "lora: modules_to_save holds an empty name");
  const auto& tokens = config.trainable_token_indices;
  for (size_t i = 0; i < tokens.size(); ++i) {
    CHECK(tokens[i] >= 0, "lora: trainable_token_indices holds ", tokens[i],
          ", expected token ids from 0");
    CHECK(std::find(tokens.begin(), tokens.begin() + std::ptrdiff_t(i), tokens[i]) ==
              tokens.begin() + std::ptrdiff_t(i),
          "lora: trainable_token_indices holds ", tokens[i], " twice");
  }
  for (const auto& [key, r] : config.rank_pattern)
    CHECK(r >= 1, "lora: rank_pattern '", key, "' is ", r, ", expected at least 1");
  for (const auto& [key, alpha] : config.alpha_pattern)
    CHECK(std::isfinite(alpha) && alpha > 0, "lora: alpha_pattern '", key, "' is ", alpha,
          ", expected a number above 0");
}

std::vector<LoraTarget> match_targets(const LoraConfig& config,
                                      const std::vector<std::string>& names) {
  validate(config);
  const bool all_linear = is_all_linear(config);
  const auto is_target = [&](const std::string& name) {
    if (!config.exclude_modules.empty() &&
        matches(name, config.exclude_modules, config.exclude_is_regex))
      return false;
    if (is_saved_whole(name, config.modules_to_save)) return false;
    if (all_linear ? name == "lm_head" || name == "model.embed_tokens"
                   : !matches(name, config.target_modules, config.target_is_regex))
      return false;
    // A name in full is taken whatever its layer, as PEFT does.
    const auto& entries = config.target_modules;
    if (config.layers_to_transform.empty() ||
        std::find(entries.begin(), entries.end(), name) != entries.end())
      return true;
    const auto& layers = config.layers_to_transform;
    return std::find(layers.begin(), layers.end(), layer_index(name)) != layers.end();
  };
  for (const char* name : {"model.embed_tokens", "lm_head"})
    CHECK(!config.use_dora || !is_target(name), "lora: target_modules matches ", name,
          ", on which DoRA is not supported; leave it out, or take use_dora: false");
  for (const std::string& name : other_modules(names))
    CHECK(all_linear || !is_target(name), "lora: target_modules matches ", name,
          ", which is not a linear layer, and PEFT would not load such an adapter; name linear "
          "layers only");

  std::vector<LoraTarget> targets;
  for (const auto& name : names) {
    if (!is_target(name)) continue;
    const int64_t r = pattern_value(config.rank_pattern, name, config.r, "rank_pattern");
    const double alpha = pattern_value(config.alpha_pattern, name, config.alpha(), "alpha_pattern");
    targets.push_back({name, r, alpha / (config.use_rslora ? std::sqrt(double(r)) : double(r))});
  }
  if (targets.empty()) fail_without_match(config, names);
  return targets;
}

std::vector<LoraTarget> attach_lora(const std::vector<NamedLinear>& layers,
                                    const LoraConfig& config, uint64_t seed) {
  std::vector<std::string> names;
  for (const auto& layer : layers) names.push_back(layer.name);
  const auto targets = match_targets(config, names);
  detach_lora(layers);

  uint32_t module = 0;
  auto layer = layers.begin();
  for (const auto& target : targets) {  // both are in model order
    while (layer->name != target.name) ++layer;
    Linear& linear = *layer->linear;
    const Device device = linear.weight.value().device();
    auto pair = std::make_unique<LoraPair>();
    // Drawn on the CPU, so that the same seed starts from the same numbers everywhere.
    const Device drawn_on = device == Device::CUDA ? Device::CPU : device;
    const auto zeros = [&](Shape shape) {
      return Tensor::zeros(shape, DType::F32, drawn_on, Scope::Adapters);
    };
    Tensor a = zeros({target.r, linear.in_features()}),
           b = zeros({linear.out_features(), target.r});
    pair->scaling = target.scaling;
    pair->dropout_p = config.lora_dropout;
    pair->module = module++;
    if (device != Device::Meta)
      initialise(a, b, *pair, config.init_lora_weights, is_embedding(target.name), seed);
    pair->a = Variable(a.to(device, Scope::Adapters), true);
    pair->b = Variable(b.to(device, Scope::Adapters), true);
    if (config.use_dora) start_dora(*pair, linear.weight.value());
    linear.lora = std::move(pair);
  }
  if (config.trainable_token_indices.empty()) return targets;
  for (const auto& one : layers) {
    if (!is_embedding(one.name)) continue;
    for (const std::string& entry : config.modules_to_save)
      CHECK(!one.name.ends_with(entry),
            "lora: modules_to_save and trainable_token_indices both take ", one.name,
            "; leave it out of one");
    CHECK(!one.linear->lora, "lora: target_modules and trainable_token_indices both take ",
          one.name, "; leave it out of one");
    static_cast<Embedding*>(one.linear)->train_tokens(config.trainable_token_indices);
  }
  return targets;
}

void detach_lora(const std::vector<NamedLinear>& layers) {
  for (const auto& layer : layers) {
    layer.linear->lora.reset();
    if (is_embedding(layer.name)) static_cast<Embedding*>(layer.linear)->tokens.reset();
  }
}

std::vector<std::pair<std::string, Variable>> token_leaves(const std::string& module,
                                                           const Embedding& embedding) {
  if (!embedding.tokens) return {};
  return {{module + ".token_adapter.trainable_tokens_delta", embedding.tokens->rows}};
}

std::vector<std::pair<std::string, Variable>> adapter_leaves(const std::string& module,
                                                             const LoraPair& pair) {
  std::vector<std::pair<std::string, Variable>> leaves = {{module + ".lora_A", pair.a},
                                                          {module + ".lora_B", pair.b}};
  if (pair.magnitude.defined())
    leaves.emplace_back(module + ".lora_magnitude_vector", pair.magnitude);
  return leaves;
}

std::string trainable_parameters_line(int64_t trainable, int64_t all) {
  const auto grouped = [](int64_t n) {
    std::string digits = std::to_string(n);
    for (int at = int(digits.size()) - 3; at > 0; at -= 3) digits.insert(size_t(at), ",");
    return digits;
  };
  char percent[32];
  std::snprintf(percent, sizeof percent, "%.4f",
                all ? 100.0 * double(trainable) / double(all) : 0.0);
  return concat("trainable params: ", grouped(trainable), " || all params: ", grouped(all),
                " || trainable%: ", percent);
}

}  // namespace graft
