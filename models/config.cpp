#include "models/config.h"

#include <filesystem>

#include "models/json_file.h"
#include "tensor/check.h"

namespace graft {
namespace {

using Json = nlohmann::json;

enum class Family { Llama, Qwen2, Qwen3 };

// By model_type, as transformers does; very old files have `architectures` alone.
Family read_family(const JsonReader& reader) {
  std::string type = reader.text("model_type", "");
  const Json& object = reader.object();
  if (type.empty() && reader.has("architectures") && object["architectures"].is_array() &&
      !object["architectures"].empty() && object["architectures"][0].is_string()) {
    type = object["architectures"][0].get<std::string>();
  }
  CHECK(!type.empty(), reader.path(), ": model_type is missing");
  if (type == "llama" || type == "LlamaForCausalLM") return Family::Llama;
  if (type == "qwen2" || type == "Qwen2ForCausalLM") return Family::Qwen2;
  if (type == "qwen3" || type == "Qwen3ForCausalLM") return Family::Qwen3;
  fail(reader.path(), ": model_type '", type, "' is not supported; llama, qwen2 and qwen3 are");
}

// The family's own defaults are those of transformers' configuration classes.
void read_shape(const JsonReader& reader, Family family, ModelConfig& config) {
  config.vocab_size = reader.size("vocab_size");
  config.hidden_size = reader.size("hidden_size");
  config.intermediate_size = reader.size("intermediate_size");
  config.num_hidden_layers = reader.size("num_hidden_layers");
  CHECK(config.num_hidden_layers <= 10000, reader.path(), ": num_hidden_layers is ",
        config.num_hidden_layers, ", wanted at most 10000");
  const int64_t heads = config.num_attention_heads = reader.size("num_attention_heads");
  const bool said = reader.object().contains("num_key_value_heads");
  config.num_key_value_heads =
      reader.size("num_key_value_heads", family == Family::Llama || said ? heads : 32);
  CHECK(heads % config.num_key_value_heads == 0, reader.path(), ": num_key_value_heads is ",
        config.num_key_value_heads, said ? "" : " (the default of this family)",
        ", which does not divide num_attention_heads ", heads);
  if (reader.has("head_dim")) {
    config.head_dim = reader.size("head_dim");
  } else if (family == Family::Qwen3 && !reader.object().contains("head_dim")) {
    config.head_dim = 128;
  } else {
    CHECK(config.hidden_size % heads == 0, reader.path(), ": num_attention_heads ", heads,
          " does not divide hidden_size ", config.hidden_size, " and there is no head_dim");
    config.head_dim = config.hidden_size / heads;
  }
  CHECK(config.head_dim % 2 == 0, reader.path(), ": head_dim is ", config.head_dim,
        ", wanted an even number: rotary embeddings turn pairs");
  CHECK(config.head_dim * heads < int64_t(1) << 31, reader.path(), ": head_dim ", config.head_dim,
        " times num_attention_heads ", heads, " is more than 2147483647");
  config.max_position_embeddings =
      reader.size("max_position_embeddings", family == Family::Llama ? 2048 : 32768);
}

void read_quantisation(const JsonReader& reader, ModelConfig& model) {
  if (!reader.has("quantization_config")) return;
  const Json& object = reader.object()["quantization_config"];
  CHECK(object.is_object(), reader.path(), ": quantization_config is not an object");
  const JsonReader config(reader.path(), object);
  const std::string method = config.text("quant_method", "bitsandbytes");
  const bool four_bits = config.boolean("load_in_4bit", config.boolean("_load_in_4bit", false));
  const std::string type = config.text("bnb_4bit_quant_type", "fp4");
  CHECK(method == "bitsandbytes" && four_bits && type == "nf4", reader.path(),
        ": quantization_config is ", method, four_bits ? " " + type : "",
        method == "bitsandbytes" && !four_bits ? " int8" : "",
        "; bitsandbytes nf4 is supported, or take the unquantised model");
  const std::string storage = config.text("bnb_4bit_quant_storage", "uint8");
  CHECK(storage == "uint8", reader.path(), ": quantization_config.bnb_4bit_quant_storage is ",
        storage, ", wanted uint8");
  model.nf4 = true;
  model.nf4_double_quant = config.boolean("bnb_4bit_use_double_quant", false);
}

void read_flags(const JsonReader& reader, Family family, ModelConfig& config) {
  config.architecture = family == Family::Llama   ? "LlamaForCausalLM"
                        : family == Family::Qwen2 ? "Qwen2ForCausalLM"
                                                  : "Qwen3ForCausalLM";
  config.rms_norm_eps = reader.number("rms_norm_eps", 1e-6);
  CHECK(config.rms_norm_eps >= 0 && config.rms_norm_eps < 1, reader.path(), ": rms_norm_eps is ",
        config.rms_norm_eps, ", wanted a small number from 0");
  config.tie_word_embeddings = reader.boolean("tie_word_embeddings", false);
  const bool attention_bias = reader.boolean("attention_bias", false);
  const bool mlp_bias = reader.boolean("mlp_bias", false);
  // Qwen2 has its biases whatever the file says, and the other keys only where the class has them.
  config.attention_bias = family == Family::Qwen2 || attention_bias;
  config.attention_out_bias = family != Family::Qwen2 && attention_bias;
  config.mlp_bias = family == Family::Llama && mlp_bias;
  config.qk_norm = family == Family::Qwen3;

  const std::string act = reader.text("hidden_act", "silu");
  CHECK(act == "silu" || act == "swish", reader.path(), ": hidden_act '", act,
        "' is not supported; silu is");
  read_quantisation(reader, config);
  std::string dtype = reader.text("dtype", reader.text("torch_dtype", "float32"));
  if (dtype.rfind("torch.", 0) == 0) dtype = dtype.substr(6);
  CHECK(dtype == "float32" || dtype == "bfloat16" || dtype == "float16", reader.path(),
        ": dtype is '", dtype, "', expected float32, bfloat16 or float16");
  if (dtype == "bfloat16") config.dtype = DType::BF16;
  if (dtype == "float16") config.dtype = DType::F16;
}

// A window is active when a layer would use it: use_sliding_window is true, sliding_window is
// given, and layer_types says sliding_attention for some layer or, without layer_types,
// max_window_layers leaves layers behind it. Llama has none in transformers, whatever the file
// says.
void refuse_sliding_window(const JsonReader& reader, Family family, const ModelConfig& config) {
  if (family == Family::Llama) return;
  const bool used = reader.boolean("use_sliding_window", false);
  const bool given = !reader.object().contains("sliding_window") || reader.has("sliding_window");
  if (!reader.has("layer_types")) {
    const int64_t first = int64_t(reader.number("max_window_layers", 28));
    CHECK(!used || !given || first >= config.num_hidden_layers, reader.path(),
          ": sliding_window is active in layers ", first, " to ", config.num_hidden_layers - 1,
          " (use_sliding_window, max_window_layers); sliding windows are not supported");
    return;
  }
  const Json& types = reader.object()["layer_types"];
  CHECK(types.is_array() && int64_t(types.size()) == config.num_hidden_layers, reader.path(),
        ": layer_types is not a list of num_hidden_layers ", config.num_hidden_layers, " names");
  for (size_t i = 0; i < types.size(); ++i) {
    if (types[i] == "full_attention") continue;
    CHECK(types[i] == "sliding_attention", reader.path(), ": layer_types has ", types[i].dump(),
          " for layer ", i, "; full_attention is supported");
    CHECK(!used || !given, reader.path(), ": sliding_window is active in layer ", i,
          " (layer_types); sliding windows are not supported");
  }
}

double positive(const JsonReader& reader, const std::string& where, const std::string& key,
                double fallback) {
  const double value = reader.number(key, fallback);
  CHECK(value > 0, reader.path(), ": ", where, key, " is ", value, ", wanted more than 0");
  return value;
}

void read_yarn(const JsonReader& scaling, const std::string& where, const ModelConfig& config,
               RopeConfig& rope) {
  // The ratio of the contexts stands in where no factor is written; a written one wins.
  const double ratio =
      double(config.max_position_embeddings) / double(rope.original_max_position_embeddings);
  rope.factor = positive(scaling, where, "factor", ratio);
  rope.attention_factor = scaling.number("attention_factor", -1);
  // transformers takes 0 for "not given" in these four.
  const auto or_default = [&](const char* key, double fallback) {
    const double value = scaling.number(key, 0);
    return value == 0 ? fallback : value;
  };
  rope.beta_fast = or_default("beta_fast", 32);
  rope.beta_slow = or_default("beta_slow", 1);
  rope.mscale = or_default("mscale", -1);
  rope.mscale_all_dim = or_default("mscale_all_dim", -1);
  rope.truncate = scaling.boolean("truncate", true);
  CHECK(rope.beta_fast > 0 && rope.beta_slow > 0, scaling.path(), ": ", where,
        "beta_fast and beta_slow must be more than 0");
}

// rope_scaling (old) before rope_parameters (new), as transformers reads them; rope_theta inside or
// beside; the type as rope_type or, older, type.
void read_rope(const JsonReader& reader, ModelConfig& config) {
  static const Json none = Json::object();
  const Json& object = reader.object();
  std::string name;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (!reader.has(key)) continue;
    CHECK(object[key].is_object(), reader.path(), ": ", key, " is not an object");
    if (!object[key].empty()) name = key;
    for (const auto& [part, value] : object[key].items())
      CHECK(!value.is_object(), reader.path(), ": ", key, ".", part,
            ": rotary settings by layer type are not supported");
  }
  const JsonReader scaling(reader.path(), name.empty() ? none : object[name]);
  const std::string where = name.empty() ? "" : name + ".";
  RopeConfig& rope = config.rope;
  rope.rope_theta = positive(reader, "", "rope_theta", 10000);
  rope.rope_theta = positive(scaling, where, "rope_theta", rope.rope_theta);
  CHECK(rope.rope_theta > 1, reader.path(), ": rope_theta is ", rope.rope_theta,
        ", wanted more than 1");
  for (const JsonReader* where_partial : {&reader, &scaling})
    CHECK(where_partial->number("partial_rotary_factor", 1) == 1, reader.path(),
          ": partial_rotary_factor other than 1 is not supported");

  const std::string type = scaling.text("rope_type", scaling.text("type", "default"));
  if (type == "default") return;
  const bool llama3 = type == "llama3", yarn = type == "yarn";
  CHECK(llama3 || yarn || type == "linear", reader.path(), ": ", where, "rope_type '", type,
        "' is not supported; default, linear, llama3 and yarn are");
  for (const char* key : {"factor", "low_freq_factor", "high_freq_factor"}) {
    const bool needed = llama3 || (!yarn && std::string(key) == "factor");
    CHECK(!needed || scaling.has(key), reader.path(), ": ", where, key, " is missing");
  }
  const int64_t original =
      scaling.size("original_max_position_embeddings", config.max_position_embeddings);
  rope.original_max_position_embeddings = reader.size("original_max_position_embeddings", original);
  rope.type = llama3 ? RopeConfig::Type::Llama3
              : yarn ? RopeConfig::Type::Yarn
                     : RopeConfig::Type::Linear;
  if (yarn) return read_yarn(scaling, where, config, rope);
  rope.factor = positive(scaling, where, "factor", 1);
  if (!llama3) return;
  rope.low_freq_factor = positive(scaling, where, "low_freq_factor", 1);
  rope.high_freq_factor = positive(scaling, where, "high_freq_factor", 4);
  CHECK(rope.high_freq_factor > rope.low_freq_factor, reader.path(), ": ", where,
        "high_freq_factor is ", rope.high_freq_factor, ", wanted more than low_freq_factor ",
        rope.low_freq_factor);
}

}  // namespace

ModelConfig ModelConfig::load(const std::string& path) {
  std::string file = path;
  if (std::filesystem::is_directory(path)) {
    file = (std::filesystem::path(path) / "config.json").string();
    CHECK(std::filesystem::exists(file), path,
          ": no config.json there; is this the directory of a Hugging Face model?");
  }
  const Json json = read_json_object(file);
  const JsonReader reader(file, json);
  const Family family = read_family(reader);
  ModelConfig config;
  read_shape(reader, family, config);
  read_flags(reader, family, config);
  refuse_sliding_window(reader, family, config);
  read_rope(reader, config);
  return config;
}

}  // namespace graft
