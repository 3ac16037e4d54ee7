// LoRA configuration and target matching against PEFT: tests/golden/targets holds what peft 0.21.2
// adapts, and peft_counts.json what it prints, see tests/golden/README.md.
#include "nn/lora.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "models/adapter_config.h"

namespace graft {
namespace {

using Json = nlohmann::json;

Json read_json(const std::string& path) {
  std::ifstream in(path);
  CHECK(in, path, ": can't be opened; tests run from the top of the repository");
  return Json::parse(in);
}

// The linear modules of a Llama-shaped model with `layers` blocks.
std::vector<std::string> module_names(int layers) {
  std::vector<std::string> names;
  for (int i = 0; i < layers; ++i)
    for (const char* name : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                             "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
      names.push_back(concat("model.layers.", i, ".", name));
  names.push_back("lm_head");
  return names;
}

LoraConfig config_of(Json json) {
  json["peft_type"] = "LORA";
  return parse_adapter_config(json, "adapter_config.json");
}

class Targets : public testing::TestWithParam<const char*> {};

TEST_P(Targets, AreThoseOfPeft) {
  const Json golden = read_json(concat("tests/golden/targets/", GetParam(), ".json"));
  int compared = 0;
  for (const auto& test : golden["cases"]) {
    SCOPED_TRACE(test["config"].dump());
    if (test.contains("error")) {
      EXPECT_THROW(match_targets(config_of(test["config"]), module_names(2)), Error);
      ++compared;
      continue;
    }
    const auto targets = match_targets(config_of(test["config"]), module_names(2));
    ASSERT_EQ(targets.size(), test["modules"].size());
    for (const auto& target : targets) {
      ASSERT_TRUE(test["modules"].contains(target.name)) << target.name;
      EXPECT_EQ(target.r, test["modules"][target.name]["r"].get<int64_t>());
      EXPECT_NEAR(target.scaling, test["modules"][target.name]["scaling"].get<double>(), 1e-8);
    }
    ++compared;
  }
  EXPECT_GT(compared, 20);
}
INSTANTIATE_TEST_SUITE_P(Peft, Targets, testing::Values("llama_gqa", "qwen2_tied"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Lora, PrintsPeftsLine) {
  int lines = 0;
  for (const auto& row : read_json("tests/golden/peft_counts.json")) {
    EXPECT_EQ(trainable_parameters_line(row["trainable"], row["all"]),
              row["line"].get<std::string>());
    ++lines;
  }
  EXPECT_GT(lines, 5);
  // Llama-3.2-3B, r 32 on q and v: PEFT's own result file.
  EXPECT_EQ(trainable_parameters_line(9175040, 3221924864),
            "trainable params: 9,175,040 || all params: 3,221,924,864 || trainable%: 0.2848");
}

TEST(Lora, ListsWhatCouldMatchWhenNothingDoes) {
  LoraConfig config;
  config.target_modules = {"query_key_value"};
  try {
    match_targets(config, module_names(1));
    FAIL();
  } catch (const Error& error) {
    const std::string text = error.what();
    for (const char* name : {"query_key_value", "q_proj", "down_proj", "all-linear"})
      EXPECT_NE(text.find(name), std::string::npos) << text;
    EXPECT_EQ(text.find("lm_head"), std::string::npos) << text;
  }
}

TEST(Lora, SaysWhichLayersThereAre) {
  LoraConfig config;
  config.layers_to_transform = {7};
  try {
    match_targets(config, module_names(3));
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()),
              "lora: layers_to_transform holds 7, but the layers of the model are 0 to 2");
  }
}

TEST(Lora, RefusesOverlappingPatterns) {
  LoraConfig config;
  config.rank_pattern = {{"q_proj", 4}, {"self_attn.q_proj", 8}};
  EXPECT_THROW(match_targets(config, module_names(1)), Error);
  config.rank_pattern = {{"q_proj", 4}, {"k_proj", 8}};
  EXPECT_EQ(match_targets(config, module_names(1))[1].r, 8);
}

// PEFT (check_target_module_exists): a name in full is looked up before the layers are.
TEST(Lora, AFullNameIsTakenWhateverItsLayer) {
  LoraConfig config;
  config.target_modules = {"v_proj", "model.layers.0.self_attn.q_proj"};
  config.layers_to_transform = {2};
  const auto targets = match_targets(config, module_names(3));
  ASSERT_EQ(targets.size(), 2u);
  EXPECT_EQ(targets[0].name, "model.layers.0.self_attn.q_proj");
  EXPECT_EQ(targets[1].name, "model.layers.2.self_attn.v_proj");
}

// PEFT refuses such a configuration, so an adapter written with it would not load there.
TEST(Lora, RefusesTargetsThatAreNoLinearLayers) {
  LoraConfig config;
  for (const char* name : {"norm", "mlp", "act_fn", "input_layernorm", "q_norm", "self_attn"}) {
    config.target_modules = {"q_proj", name};
    EXPECT_THROW(match_targets(config, module_names(2)), Error) << name;
  }
  config.target_is_regex = true;
  config.target_modules = {R"(model\.layers\.\d\.mlp\..*)"};
  EXPECT_THROW(match_targets(config, module_names(2)), Error);
  config.target_modules = {R"(model\.layers\.\d\.mlp\..*_proj)"};
  EXPECT_EQ(match_targets(config, module_names(2)).size(), 6u);
}

TEST(Lora, DefaultsAreThoseOfTheReadme) {
  const LoraConfig config;
  EXPECT_EQ(config.r, 16);
  EXPECT_EQ(config.alpha(), 32);
  EXPECT_EQ(config.lora_dropout, 0.05);
  const auto targets = match_targets(config, module_names(3));
  EXPECT_EQ(targets.size(), 21u);
  EXPECT_EQ(targets[0].scaling, 2);
}

TEST(Lora, RefusesValuesOutOfRange) {
  for (const char* text :
       {R"({"r": 0})", R"({"r": -1})", R"({"r": 2.5})", R"({"lora_alpha": "x"})",
        R"({"lora_dropout": 1.0})", R"({"lora_dropout": -0.1})", R"({"use_rslora": 1})",
        R"({"rank_pattern": {"q_proj": 0}})", R"({"target_modules": [1]})",
        R"({"init_lora_weights": "pissa"})", R"({"target_modules": "("})"})
    EXPECT_THROW(match_targets(config_of(Json::parse(text)), module_names(1)), Error) << text;
}

TEST(AdapterConfig, RefusesByNameWhatChangesTheArithmetic) {
  for (const char* text :
       {R"({"bias": "some"})", R"({"modules_to_save": "lm_head"})", R"({"lora_bias": true})",
        R"({"alora_invocation_tokens": [1]})", R"({"layer_replication": [[0, 1]]})",
        R"({"target_parameters": ["x"]})", R"({"use_qalora": true})", R"({"fan_in_fan_out": true})",
        R"({"trainable_token_indices": {"lm_head": [3]}})",
        R"({"trainable_token_indices": [3, 3]})", R"({"some_key_of_tomorrow": 3})"}) {
    const Json json = Json::parse(text);
    try {
      config_of(json);
      FAIL() << text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(json.begin().key()), std::string::npos)
          << error.what();
    }
  }
  EXPECT_NO_THROW(config_of(Json::parse(R"({"some_key_of_tomorrow": null})")));
  EXPECT_THROW(parse_adapter_config(Json::parse(R"({"peft_type": "IA3"})"), "a"), Error);
  EXPECT_THROW(parse_adapter_config(Json::parse(R"({"r": 8})"), "a"), Error);
}

TEST(AdapterConfig, SurvivesTheRoundTrip) {
  LoraConfig config;
  config.r = 4;
  config.lora_alpha = 6.5;
  config.lora_dropout = 0.25;
  config.target_modules = {"q_proj", "up_proj"};
  config.exclude_modules = {"layers.0.mlp.up_proj"};
  config.layers_to_transform = {0, 2};
  config.bias = LoraConfig::Bias::LoraOnly;
  config.modules_to_save = {"lm_head", "embed_tokens"};
  config.rank_pattern = {{"q_proj", 2}};
  config.alpha_pattern = {{"up_proj", 3}};
  config.use_rslora = true;
  config.use_dora = true;
  config.init_lora_weights = LoraConfig::Init::Gaussian;
  config.base_model_name_or_path = "Qwen/Qwen2.5-0.5B";
  const std::string text = format_adapter_config(config, {});
  EXPECT_NE(text.back(), '\n');
  const LoraConfig back = parse_adapter_config(Json::parse(text), "adapter_config.json");
  EXPECT_EQ(format_adapter_config(back, {}), text);
  EXPECT_EQ(back.rank_pattern, config.rank_pattern);
  EXPECT_EQ(back.alpha_pattern, config.alpha_pattern);
  EXPECT_EQ(back.layers_to_transform, config.layers_to_transform);
  EXPECT_EQ(back.bias, config.bias);
  EXPECT_EQ(back.modules_to_save, config.modules_to_save);
  EXPECT_TRUE(back.use_rslora);
  EXPECT_TRUE(back.use_dora);
}

// The set of keys that every PEFT since 2024 can read; older ones stop at a key they don't know.
TEST(AdapterConfig, WritesTheKeysOf2024) {
  const Json json = Json::parse(format_adapter_config(LoraConfig{}, {}));
  EXPECT_EQ(json.size(), 24u);
  LoraConfig all;
  all.target_modules = {"all-linear"};
  EXPECT_EQ(Json::parse(format_adapter_config(all, {"k_proj", "q_proj"}))["target_modules"],
            Json::parse(R"(["k_proj", "q_proj"])"));
}

}  // namespace
}  // namespace graft
