// config.json in all its spellings. Defaults are those of transformers' configuration classes; the
// parameter counts were computed from the published configurations (shared data).
#include "models/config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "models/decoder.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

class Config : public testing::Test {
 protected:
  Config() : directory_(fs::temp_directory_path() / ("graft_config_" + std::to_string(getpid()))) {
    fs::create_directories(directory_);
  }
  ~Config() override { fs::remove_all(directory_); }

  static Json minimal(const std::string& type) {
    return {{"model_type", type},      {"vocab_size", 96},       {"hidden_size", 32},
            {"intermediate_size", 48}, {"num_hidden_layers", 2}, {"num_attention_heads", 4},
            {"num_key_value_heads", 2}};
  }
  ModelConfig load(const Json& json) {
    std::ofstream(directory_ / "config.json") << json.dump();
    return ModelConfig::load(directory_.string());
  }
  ModelConfig with(const std::string& type, const Json& changes) {
    Json json = minimal(type);
    json.update(changes);
    return load(json);
  }
  // The one line of the refusal; it names the file.
  std::string refusal(const std::string& type, const Json& changes) {
    try {
      with(type, changes);
    } catch (const Error& error) {
      const std::string what = error.what();
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      EXPECT_NE(what.find("config.json: "), std::string::npos) << what;
      return what;
    }
    return "accepted";
  }
  void expect_refused(const std::string& type, const Json& changes, const std::string& part) {
    const std::string got = refusal(type, changes);
    EXPECT_NE(got.find(part), std::string::npos) << changes << "\ngot: " << got;
  }

  fs::path directory_;
};

TEST_F(Config, FillsInTheDefaultsOfEachFamily) {
  const ModelConfig llama = load(minimal("llama"));
  EXPECT_EQ(llama.architecture, "LlamaForCausalLM");
  EXPECT_EQ(llama.head_dim, 8);
  EXPECT_EQ(llama.max_position_embeddings, 2048);
  EXPECT_EQ(llama.rms_norm_eps, 1e-6);
  EXPECT_EQ(llama.rope.rope_theta, 10000);
  EXPECT_FALSE(llama.tie_word_embeddings || llama.attention_bias || llama.attention_out_bias ||
               llama.mlp_bias || llama.qk_norm);
  EXPECT_EQ(llama.dtype, DType::F32);

  const ModelConfig qwen2 = load(minimal("qwen2"));
  EXPECT_EQ(qwen2.architecture, "Qwen2ForCausalLM");
  EXPECT_EQ(qwen2.head_dim, 8);
  EXPECT_EQ(qwen2.max_position_embeddings, 32768);
  EXPECT_TRUE(qwen2.attention_bias);
  EXPECT_FALSE(qwen2.attention_out_bias || qwen2.qk_norm);

  const ModelConfig qwen3 = load(minimal("qwen3"));
  EXPECT_EQ(qwen3.architecture, "Qwen3ForCausalLM");
  EXPECT_EQ(qwen3.head_dim, 128);
  EXPECT_TRUE(qwen3.qk_norm);
  EXPECT_FALSE(qwen3.attention_bias);
}

TEST_F(Config, TakesTheHeadsForKeysWhereTheNumberIsNull) {
  EXPECT_EQ(with("llama", {{"num_key_value_heads", nullptr}}).num_key_value_heads, 4);
  EXPECT_EQ(with("qwen2", {{"num_key_value_heads", nullptr}}).num_key_value_heads, 4);
  Json json = minimal("llama");
  json.erase("num_key_value_heads");
  EXPECT_EQ(load(json).num_key_value_heads, 4);
}

TEST_F(Config, ReadsBiasesWhereTheFamilyHasThem) {
  const Json all = {{"attention_bias", true}, {"mlp_bias", true}};
  const ModelConfig llama = with("llama", all);
  EXPECT_TRUE(llama.attention_bias && llama.attention_out_bias && llama.mlp_bias);
  const ModelConfig qwen3 = with("qwen3", all);
  EXPECT_TRUE(qwen3.attention_bias && qwen3.attention_out_bias);
  EXPECT_FALSE(qwen3.mlp_bias);
  const ModelConfig qwen2 = with("qwen2", {{"attention_bias", false}});
  EXPECT_TRUE(qwen2.attention_bias);
  EXPECT_FALSE(qwen2.attention_out_bias);
}

TEST_F(Config, ReadsDtypeInBothSpellings) {
  EXPECT_EQ(with("llama", {{"torch_dtype", "bfloat16"}}).dtype, DType::BF16);
  EXPECT_EQ(with("llama", {{"dtype", "float16"}}).dtype, DType::F16);
  EXPECT_EQ(with("llama", {{"dtype", "float32"}, {"torch_dtype", "bfloat16"}}).dtype, DType::F32);
}

TEST_F(Config, ReadsRopeInBothSpellings) {
  const Json scaling = {{"factor", 8.0},
                        {"low_freq_factor", 1.0},
                        {"high_freq_factor", 4.0},
                        {"original_max_position_embeddings", 64}};
  for (const char* key : {"rope_scaling", "rope_parameters"})
    for (const char* type : {"type", "rope_type"}) {
      Json rope = scaling;
      rope[type] = "llama3";
      const ModelConfig config = with("llama", {{key, rope}, {"rope_theta", 5e5}});
      EXPECT_EQ(config.rope.type, RopeConfig::Type::Llama3);
      EXPECT_EQ(config.rope.rope_theta, 5e5);
      EXPECT_EQ(config.rope.factor, 8);
      EXPECT_EQ(config.rope.original_max_position_embeddings, 64);
    }
  const ModelConfig inside =
      with("qwen3", {{"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}}}});
  EXPECT_EQ(inside.rope.type, RopeConfig::Type::Default);
  EXPECT_EQ(inside.rope.rope_theta, 1e6);
  EXPECT_EQ(with("llama", {{"rope_scaling", nullptr}, {"rope_theta", 77}}).rope.rope_theta, 77);
}

TEST_F(Config, LetsAnExplicitYarnFactorWin) {
  Json yarn = {{"rope_type", "yarn"}, {"original_max_position_embeddings", 16}, {"factor", 4.0}};
  EXPECT_EQ(with("llama", {{"rope_scaling", yarn}, {"max_position_embeddings", 128}}).rope.factor,
            4);
  yarn["factor"] = nullptr;
  EXPECT_EQ(with("llama", {{"rope_scaling", yarn}, {"max_position_embeddings", 128}}).rope.factor,
            8);
}

TEST_F(Config, RefusesWhatItDoesNotCompute) {
  expect_refused("mistral", Json::object(),
                 "model_type 'mistral' is not supported; llama, qwen2 and qwen3");
  expect_refused("llama", {{"hidden_act", "gelu"}}, "hidden_act 'gelu'");
  for (const char* type : {"dynamic", "longrope", "su", "mrope"})
    expect_refused("llama", {{"rope_scaling", {{"rope_type", type}, {"factor", 2.0}}}},
                   concat("rope_type '", type, "' is not supported"));
  expect_refused("llama", {{"partial_rotary_factor", 0.5}}, "partial_rotary_factor");
  expect_refused("llama", {{"rope_parameters", {{"full_attention", {{"rope_theta", 1e4}}}}}},
                 "full_attention");
  expect_refused("llama", {{"quantization_config", {{"bits", 4}}}}, "quantization_config");
}

TEST_F(Config, RefusesASlidingWindowOnlyWhereALayerUsesIt) {
  const Json on = {{"use_sliding_window", true}, {"sliding_window", 16}};
  const auto and_also = [&](const Json& more) {
    Json json = on;
    json.update(more);
    return json;
  };
  expect_refused("qwen2", and_also({{"max_window_layers", 1}}), "sliding_window is active");
  expect_refused("qwen3", and_also({{"max_window_layers", 0}}), "sliding_window is active");
  expect_refused("qwen2", and_also({{"layer_types", {"full_attention", "sliding_attention"}}}),
                 "sliding_window is active in layer 1");
  expect_refused("qwen2", {{"layer_types", {"full_attention", "linear_attention"}}},
                 "linear_attention");
  EXPECT_EQ(refusal("qwen2", on), "accepted");  // max_window_layers is 28, and there are 2
  EXPECT_EQ(refusal("qwen2", and_also({{"max_window_layers", 2}})), "accepted");
  EXPECT_EQ(refusal("qwen2", and_also({{"max_window_layers", 0},
                                       {"layer_types", {"full_attention", "full_attention"}}})),
            "accepted");
  EXPECT_EQ(refusal("qwen2", and_also({{"max_window_layers", 0}, {"sliding_window", nullptr}})),
            "accepted");
  EXPECT_EQ(
      refusal("qwen2",
              {{"use_sliding_window", false}, {"sliding_window", 16}, {"max_window_layers", 0}}),
      "accepted");
  EXPECT_EQ(refusal("llama", and_also({{"max_window_layers", 0}})), "accepted");
}

TEST_F(Config, NamesAMissingKey) {
  for (const char* key : {"model_type", "vocab_size", "hidden_size", "intermediate_size",
                          "num_hidden_layers", "num_attention_heads"})
    expect_refused("llama", {{key, nullptr}}, concat(key, " is missing"));
  expect_refused("llama", {{"rope_scaling", {{"type", "linear"}}}},
                 "rope_scaling.factor is missing");
  expect_refused("llama", {{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}}},
                 "rope_scaling.low_freq_factor is missing");
}

TEST_F(Config, RefusesAbsurdValuesByKey) {
  for (const char* key :
       {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"})
    for (const Json& value : {Json(0), Json(-1), Json(1.5), Json("8"), Json(true), Json(1u << 31),
                              Json(~uint64_t(0)), Json(1e300)})
      expect_refused("llama", {{key, value}}, concat(key, " is ", value.dump()));
  expect_refused("llama", {{"num_hidden_layers", 1000000000}}, "num_hidden_layers");
  expect_refused("llama", {{"num_key_value_heads", 3}}, "num_key_value_heads is 3");
  expect_refused("llama", {{"head_dim", 7}}, "head_dim is 7");
  expect_refused("llama", {{"hidden_size", 31}}, "does not divide hidden_size 31");
  expect_refused("llama", {{"rms_norm_eps", -1e-6}}, "rms_norm_eps");
  expect_refused("llama", {{"rms_norm_eps", "small"}}, "rms_norm_eps");
  expect_refused("llama", {{"tie_word_embeddings", 1}}, "tie_word_embeddings");
  expect_refused("llama", {{"rope_theta", 0}}, "rope_theta");
  expect_refused("llama", {{"rope_theta", -10000.0}}, "rope_theta");
  expect_refused("llama", {{"rope_scaling", "linear"}}, "rope_scaling");
  expect_refused("llama", {{"rope_scaling", {{"type", "linear"}, {"factor", 0}}}},
                 "rope_scaling.factor");
  expect_refused("llama", {{"hidden_act", 3}}, "hidden_act");
  expect_refused("llama", {{"dtype", "int8"}}, "dtype is 'int8'");
}

TEST_F(Config, RefusesAFileThatIsNotAJsonObject) {
  for (const char* text : {"", "{", "[]", "{\"a\": }"}) {
    std::ofstream(directory_ / "config.json") << text;
    EXPECT_THROW(ModelConfig::load(directory_.string()), Error) << text;
  }
  EXPECT_THROW(ModelConfig::load((directory_ / "other.json").string()), Error);
  fs::remove(directory_ / "config.json");
  EXPECT_THROW(ModelConfig::load(directory_.string()), Error);
}

TEST(PublishedConfigs, GiveTheKnownParameterCounts) {
  const char* given = std::getenv("GRAFT_SHARED_DATA");
  const fs::path configs = fs::path(given ? given : "../shared/data") / "configs";
  if (!fs::exists(configs)) GTEST_SKIP() << configs << " is not there";
  const Json counts = Json::parse(std::ifstream(configs / "parameter_counts.json"))["parameters"];
  EXPECT_EQ(counts.size(), 15u);
  for (const auto& [name, count] : counts.items())
    EXPECT_EQ(num_parameters(ModelConfig::load((configs / (name + ".json")).string())),
              count.get<int64_t>())
        << name;
}

}  // namespace
}  // namespace graft
