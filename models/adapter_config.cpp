// Key by key as PEFT's LoraConfig (peft 0.21) has them; see models/adapter_config.h.
#include "models/adapter_config.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

namespace graft {
namespace {

using Json = nlohmann::json;

// Read by graft itself, or without any influence on the arithmetic of a loaded adapter.
const std::set<std::string> kUnderstood = {"r",
                                           "lora_alpha",
                                           "lora_dropout",
                                           "target_modules",
                                           "exclude_modules",
                                           "layers_to_transform",
                                           "layers_pattern",
                                           "rank_pattern",
                                           "alpha_pattern",
                                           "trainable_token_indices",
                                           "use_rslora",
                                           "use_dora",
                                           "init_lora_weights",
                                           "task_type",
                                           "base_model_name_or_path",
                                           "bias",
                                           "modules_to_save",
                                           "peft_type",
                                           "auto_mapping",
                                           "inference_mode",
                                           "megatron_core",
                                           "peft_version",
                                           "qalora_group_size",
                                           "revision",
                                           "runtime_config"};

bool is_off(const Json& value) {
  return value.is_null() || value == false ||
         ((value.is_object() || value.is_array()) && value.empty());
}

struct Reader {
  const Json& json;
  const std::string& where;

  const Json* find(const char* key) const {
    const auto at = json.find(key);
    return at == json.end() || at->is_null() ? nullptr : &*at;
  }
  [[noreturn]] void wrong(const std::string& key, const Json& value, const char* expected) const {
    fail(where, ": ", key, " is ", value.dump(), ", expected ", expected);
  }
  int64_t integer(const std::string& key, const Json& value) const {
    if (!value.is_number_integer()) wrong(key, value, "an integer");
    return value.get<int64_t>();
  }
  double number(const std::string& key, const Json& value) const {
    if (!value.is_number()) wrong(key, value, "a number");
    return value.get<double>();
  }
  bool boolean(const char* key) const {
    const Json* value = find(key);
    if (!value) return false;
    if (!value->is_boolean()) wrong(key, *value, "true or false");
    return value->get<bool>();
  }
  std::string text(const char* key) const {
    const Json* value = find(key);
    if (!value) return "";
    if (!value->is_string()) wrong(key, *value, "a string");
    return value->get<std::string>();
  }
  // A string is a regular expression, a list is a list of names.
  void names(const char* key, std::vector<std::string>& names, bool& is_regex) const {
    names.clear();
    is_regex = false;
    const Json* value = find(key);
    if (!value) return;
    if (value->is_string()) {
      names = {value->get<std::string>()};
      is_regex = true;
      return;
    }
    if (!value->is_array()) wrong(key, *value, "a list of names or a regular expression");
    for (const auto& entry : *value) {
      if (!entry.is_string()) wrong(key, *value, "a list of strings");
      names.push_back(entry.get<std::string>());
    }
  }
};

void check_keys(const Reader& reader) {
  const Json* type = reader.find("peft_type");
  CHECK(type && *type == "LORA", reader.where, ": peft_type is ", type ? type->dump() : "missing",
        ", expected \"LORA\"");
  for (const auto& [key, value] : reader.json.items()) {
    if (kUnderstood.contains(key) || is_off(value)) continue;
    fail(reader.where, ": ", key, " is ", value.dump(),
         ", which is not supported; expected it off or absent, so the adapter is refused rather "
         "than half applied");
  }
}

void read_parts_of_base(const Reader& reader, LoraConfig& config) {
  const std::string bias = reader.text("bias");
  if (bias == "lora_only")
    config.bias = LoraConfig::Bias::LoraOnly;
  else if (bias == "all")
    config.bias = LoraConfig::Bias::All;
  else if (!bias.empty() && bias != "none")
    reader.wrong("bias", bias, "\"none\", \"lora_only\" or \"all\"");
  bool is_text = false;
  reader.names("modules_to_save", config.modules_to_save, is_text);
  if (is_text) reader.wrong("modules_to_save", config.modules_to_save[0], "a list of names");
}

void read_layers(const Reader& reader, LoraConfig& config) {
  if (const Json* layers = reader.find("layers_to_transform")) {
    if (layers->is_array())
      for (const auto& layer : *layers)
        config.layers_to_transform.push_back(reader.integer("layers_to_transform", layer));
    else
      config.layers_to_transform.push_back(reader.integer("layers_to_transform", *layers));
    std::sort(config.layers_to_transform.begin(), config.layers_to_transform.end());
  }
  // Llama and Qwen hold their blocks in "layers": naming just that changes nothing.
  std::vector<std::string> patterns;
  bool is_text = false;
  reader.names("layers_pattern", patterns, is_text);
  CHECK(patterns.empty() || std::find(patterns.begin(), patterns.end(), "layers") != patterns.end(),
        reader.where, ": layers_pattern is ", reader.find("layers_pattern")->dump(),
        ", but the blocks of this model are in 'layers'");
}

// A list of tokens, or {"embed_tokens": a list}.
void read_tokens(const Reader& reader, LoraConfig& config) {
  const char* key = "trainable_token_indices";
  const Json* tokens = reader.find(key);
  if (!tokens || is_off(*tokens)) return;
  const bool by_layer =
      tokens->is_object() && tokens->size() == 1 && is_embedding(tokens->begin().key());
  const Json& list = by_layer ? *tokens->begin() : *tokens;
  if (!list.is_array()) reader.wrong(key, *tokens, "a list of token ids, those of embed_tokens");
  for (const auto& id : list) config.trainable_token_indices.push_back(reader.integer(key, id));
}

void read_init(const Reader& reader, LoraConfig& config) {
  const auto at = reader.json.find("init_lora_weights");
  if (at == reader.json.end() || *at == true)
    config.init_lora_weights = LoraConfig::Init::KaimingUniform;
  else if (*at == false)
    config.init_lora_weights = LoraConfig::Init::Random;
  else if (*at == "gaussian")
    config.init_lora_weights = LoraConfig::Init::Gaussian;
  else if (at->is_string() && (at->get<std::string>().starts_with("pissa") || *at == "olora"))
    fail(reader.where, ": init_lora_weights is ", at->dump(),
         ": the adapter belongs to what this left of its base, not to the base; save it converted "
         "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)");
  else
    reader.wrong("init_lora_weights", *at, "true, false or \"gaussian\"");
}

// 8 stays 8 and 8.5 stays 8.5: PEFT declares lora_alpha an integer.
Json as_number(double value) {
  return value == std::floor(value) && std::abs(value) < 1e15 ? Json(int64_t(value)) : Json(value);
}

Json as_names(const std::vector<std::string>& names, bool is_regex) {
  if (names.empty()) return nullptr;
  return is_regex ? Json(names[0]) : Json(names);
}

}  // namespace

LoraConfig parse_adapter_config(const Json& json, const std::string& where) {
  CHECK(json.is_object(), where, ": expected a JSON object");
  const Reader reader{json, where};
  check_keys(reader);
  LoraConfig config;
  const Json* r = reader.find("r");
  const Json* alpha = reader.find("lora_alpha");
  const Json* dropout = reader.find("lora_dropout");
  for (const char* key : {"r", "lora_alpha"})
    if (json.contains(key) && json[key].is_null()) reader.wrong(key, json[key], "a number");
  config.r = r ? reader.integer("r", *r) : 8;
  config.lora_alpha = alpha ? reader.number("lora_alpha", *alpha) : 8;
  config.lora_dropout = dropout ? reader.number("lora_dropout", *dropout) : 0;
  reader.names("target_modules", config.target_modules, config.target_is_regex);
  // PEFT's own default for llama, qwen2 and qwen3.
  if (!reader.find("target_modules")) config.target_modules = {"q_proj", "v_proj"};
  reader.names("exclude_modules", config.exclude_modules, config.exclude_is_regex);
  read_layers(reader, config);
  for (const char* key : {"rank_pattern", "alpha_pattern"}) {
    const Json* patterns = reader.find(key);
    if (!patterns) continue;
    if (!patterns->is_object()) reader.wrong(key, *patterns, "an object");
    for (const auto& [pattern, value] : patterns->items())
      if (key[0] == 'r')
        config.rank_pattern.emplace_back(pattern, reader.integer(key, value));
      else
        config.alpha_pattern.emplace_back(pattern, reader.number(key, value));
  }
  config.use_rslora = reader.boolean("use_rslora");
  config.use_dora = reader.boolean("use_dora");
  read_parts_of_base(reader, config);
  read_init(reader, config);
  read_tokens(reader, config);
  config.task_type = reader.text("task_type");
  config.base_model_name_or_path = reader.text("base_model_name_or_path");
  try {
    validate(config);
  } catch (const Error& error) {
    fail(where, ": ", error.what());
  }
  return config;
}

std::string format_adapter_config(const LoraConfig& config,
                                  const std::vector<std::string>& short_names) {
  const bool all_linear = is_all_linear(config);
  Json ranks = Json::object(), alphas = Json::object();
  for (const auto& [key, r] : config.rank_pattern) ranks[key] = r;
  for (const auto& [key, alpha] : config.alpha_pattern) alphas[key] = as_number(alpha);
  const auto or_null = [](const std::string& text) { return text.empty() ? Json() : Json(text); };
  Json json = {
      {"alpha_pattern", alphas},
      {"auto_mapping", nullptr},
      {"base_model_name_or_path", or_null(config.base_model_name_or_path)},
      {"bias", "none"},
      {"fan_in_fan_out", false},
      {"inference_mode", true},
      {"init_lora_weights", true},
      {"layer_replication", nullptr},
      {"layers_pattern", nullptr},
      {"layers_to_transform",
       config.layers_to_transform.empty() ? Json() : Json(config.layers_to_transform)},
      {"loftq_config", Json::object()},
      {"lora_alpha", as_number(config.alpha())},
      {"lora_dropout", config.lora_dropout},
      {"megatron_config", nullptr},
      {"megatron_core", "megatron.core"},
      {"modules_to_save", as_names(config.modules_to_save, false)},
      {"peft_type", "LORA"},
      {"r", config.r},
      {"rank_pattern", ranks},
      {"revision", nullptr},
      {"target_modules",
       all_linear ? Json(short_names) : as_names(config.target_modules, config.target_is_regex)},
      {"task_type", or_null(config.task_type)},
      {"use_dora", config.use_dora},
      {"use_rslora", config.use_rslora},
  };
  if (config.bias != LoraConfig::Bias::None)
    json["bias"] = config.bias == LoraConfig::Bias::All ? "all" : "lora_only";
  if (config.init_lora_weights == LoraConfig::Init::Gaussian)
    json["init_lora_weights"] = "gaussian";
  if (config.init_lora_weights == LoraConfig::Init::Random) json["init_lora_weights"] = false;
  if (!config.exclude_modules.empty())
    json["exclude_modules"] = as_names(config.exclude_modules, config.exclude_is_regex);
  if (!config.trainable_token_indices.empty())
    json["trainable_token_indices"] = config.trainable_token_indices;
  return json.dump(2);
}

}  // namespace graft
