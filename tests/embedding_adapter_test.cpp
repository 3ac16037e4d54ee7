// Adapters on the embedding and the output head, and tokens whose rows are trained, beyond what
// adapter_test.cpp and trajectory_test.cpp hold every adapter of PEFT to: stacked, merged, resumed,
// and refused.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "models/adapter.h"
#include "models/adapter_config.h"
#include "models/adapter_stack.h"
#include "models/combine.h"
#include "models/gguf_adapter.h"
#include "models/merge.h"
#include "models/mlx_adapter.h"
#include "models/weights.h"
#include "tensor/safetensors.h"
#include "tests/golden_case.h"
#include "tests/tiny_run.h"
#include "train/finetune.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
const std::string kAdapters = "tests/golden/adapters/";

class OnTheEmbedding : public testing::TestWithParam<const char*> {
 protected:
  std::string directory() const { return kAdapters + GetParam(); }
  Json golden() const { return golden_json(directory() + "/golden.json"); }
};

// PEFT's logits, from the adapter as the only one of a stack; and the base's when it is taken off.
TEST_P(OnTheEmbedding, StacksAndComesOff) {
  const Json golden = this->golden();
  auto model = load_model(golden["model"]);
  const std::vector<double> bare = logits_of(*model, golden["input_ids"]);
  AdapterStack stack(*model);
  const int64_t id = stack.attach(directory());
  EXPECT_LT(worst_share(logits_of(*model, golden["input_ids"]), golden_numbers(golden["logits"])),
            1e-5);
  stack.set_weight(id, 0);
  EXPECT_EQ(logits_of(*model, golden["input_ids"]), bare);
  stack.set_weight(id, 0.5);
  EXPECT_NE(logits_of(*model, golden["input_ids"]), bare);
  stack.detach(id);
  EXPECT_EQ(logits_of(*model, golden["input_ids"]), bare);
}

// PEFT's logits, from the files that hold the base and the adapter as one.
TEST_P(OnTheEmbedding, Merges) {
  const Json golden = this->golden();
  const std::string model_dir = golden["model"];
  const ScratchFolder scratch;
  write_merged(*load_model(model_dir), model_dir, {{read_adapter(directory()), 1}}, DType::F32,
               scratch / "m");
  EXPECT_LT(worst_share(logits_of(*load_model(scratch / "m"), golden["input_ids"]),
                        golden_numbers(golden["logits"])),
            1e-5);
}
INSTANTIATE_TEST_SUITE_P(Golden, OnTheEmbedding,
                         testing::Values("embedding_and_head", "embedding_tied", "head_tied",
                                         "tokens", "tokens_tied"),
                         [](const auto& info) { return std::string(info.param); });

// Two of them with weights: the same from the stack and from the merged files, tied as before where
// only tokens have changed.
TEST(EmbeddingAdapters, StackAsTheyMerge) {
  const std::string model_dir = golden_json(kAdapters + "tokens_tied/golden.json")["model"];
  const Json rows = golden_json(kAdapters + "tokens_tied/golden.json")["input_ids"];
  for (const char* other : {"embedding_tied", "head_tied", "qwen2_tied"}) {
    auto model = load_model(model_dir);
    AdapterStack stack(*model);
    stack.attach(kAdapters + "tokens_tied", 0.6);
    stack.attach(kAdapters + other, -0.3);
    const ScratchFolder scratch;
    write_merged(
        *load_model(model_dir), model_dir,
        {{read_adapter(kAdapters + "tokens_tied"), 0.6}, {read_adapter(kAdapters + other), -0.3}},
        DType::F32, scratch / "m");
    EXPECT_LT(worst_share(logits_of(*load_model(scratch / "m"), rows), logits_of(*model, rows)),
              1e-5)
        << other;
    EXPECT_EQ(ModelConfig::load(scratch / "m").tie_word_embeddings,
              std::string(other) == "qwen2_tied");
  }
}

TEST(EmbeddingAdapters, BeginAsNothing) {
  const Json golden = golden_json(kAdapters + "tokens_tied/golden.json");
  LoraConfig config;
  config.target_modules = {"embed_tokens", "lm_head"};
  auto model = load_model(golden["model"]);
  const std::vector<double> bare = logits_of(*model, golden["input_ids"]);
  attach_lora(*model, config, 1);
  EXPECT_EQ(logits_of(*model, golden["input_ids"]), bare);
  double squares = 0;
  const std::vector<double> a = model->embed_tokens.lora->a.value().to_doubles();
  for (const double x : a) squares += x * x;
  EXPECT_NEAR(squares / double(a.size()), 1, 0.25);  // N(0, 1), as PEFT begins
  config.target_modules = {"q_proj"};
  config.trainable_token_indices = {3, 8};
  attach_lora(*model, config, 1);
  EXPECT_EQ(model->embed_tokens.lora, nullptr);
  EXPECT_LT(worst_share(logits_of(*model, golden["input_ids"]), bare), 1e-6);
}

template <class Run>
std::string message_of(Run run) {
  try {
    run();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(EmbeddingAdapters, WhatCannotBeIsRefusedInOneLine) {
  const auto attach = [](const std::string& change) {
    return message_of([&] {
      Json json = {{"peft_type", "LORA"}, {"target_modules", {"q_proj"}}};
      json.merge_patch(Json::parse(change));
      auto model = load_model("tests/golden/models/llama_gqa");
      attach_lora(*model, parse_adapter_config(json, "a"), 1);
    });
  };
  EXPECT_EQ(attach(R"({"trainable_token_indices": [5, 96]})"),
            "lora: trainable_token_indices holds 96, but the embedding has rows 0 to 95");
  EXPECT_EQ(
      attach(R"({"trainable_token_indices": [5], "target_modules": ["embed_tokens"]})"),
      "lora: target_modules and trainable_token_indices both take model.embed_tokens; leave it "
      "out of one");
  EXPECT_EQ(
      attach(R"({"use_dora": true, "target_modules": ["lm_head"]})"),
      "lora: target_modules matches lm_head, on which DoRA is not supported; leave it out, or "
      "take use_dora: false");
  EXPECT_EQ(
      attach(R"({"modules_to_save": ["model"]})")
          .find(
              "lora: target_modules (q_proj) matches no module of the model after exclude_modules, "
              "layers_to_transform and modules_to_save"),
      0u);
  EXPECT_EQ(attach(R"({"trainable_token_indices": {"xembed_tokens": [5]}})")
                .find("a: trainable_token_indices is {"),
            0u);
  const AdapterFile tokens = read_adapter(kAdapters + "tokens");
  const ScratchFolder scratch;
  for (const std::string& message :
       {message_of([&] {
          combine_cat({{tokens, 1}});
        }),
        message_of([&] {
          combine_svd({{tokens, 1}}, 2);
        }),
        message_of([&] { write_mlx_adapter(tokens, 2, scratch / "mlx"); }), message_of([&] {
          write_gguf_adapter(tokens, ModelConfig::load("tests/golden/models/llama_gqa"),
                             scratch / "a.gguf");
        })})
    EXPECT_NE(message.find("tokens: has trainable_token_indices, which "), std::string::npos)
        << message;
  EXPECT_FALSE(fs::exists(scratch / "mlx"));
  EXPECT_FALSE(fs::exists(scratch / "a.gguf"));
}

TEST(EmbeddingAdapters, FilesThatAreNotWholeAreRefused) {
  const ScratchFolder scratch;
  const auto refuse = [&](const std::string& from, const auto& change, const std::string& part) {
    fs::remove_all(scratch / "a");
    fs::create_directories(scratch / "a");
    Json config = golden_json(kAdapters + from + "/adapter_config.json");
    const SafetensorsFile file(kAdapters + from + "/adapter_model.safetensors");
    std::vector<NamedTensor> tensors;
    for (const auto& entry : file.entries())
      tensors.push_back({entry.name, file.tensor(entry.name)});
    change(config, tensors);
    write_safetensors(scratch / "a/adapter_model.safetensors", tensors, DType::F32, {});
    write_file_atomically(scratch / "a/adapter_config.json", config.dump());
    auto model = load_model("tests/golden/models/llama_gqa");
    const std::string message = message_of([&] { load_adapter(*model, scratch / "a"); });
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_FALSE(model->embed_tokens.tokens || model->embed_tokens.lora);
  };
  const auto drop = [](const std::string& part) {
    return [part](Json&, std::vector<NamedTensor>& tensors) {
      std::erase_if(tensors, [&](const NamedTensor& one) {
        return one.name.find(part) != std::string::npos;
      });
    };
  };
  refuse("tokens", drop("trainable_tokens"), "trainable_tokens_delta' is missing");
  refuse(
      "tokens",
      [](Json& config, auto&) {
        config["trainable_token_indices"] = {7, 3};
      },
      "has 3 rows, but trainable_token_indices of adapter_config.json 2 tokens");
  refuse(
      "tokens",
      [](Json& config, auto&) {
        config["trainable_token_indices"] = {7, 3, 900};
      },
      "trainable_token_indices holds 900, but the embedding has rows 0 to 95");
  refuse(
      "tokens", [](Json& config, auto&) { config.erase("trainable_token_indices"); },
      "adapter_config.json has no trainable_token_indices");
  refuse("embedding_and_head", drop("lora_embedding_A"), "lora_embedding_A' is missing");
  refuse("embedding_and_head", drop("lora_embedding_B"), "lora_embedding_B' is missing");
  refuse(
      "embedding_and_head",
      [](Json& config, auto&) {
        config["target_modules"] = {"q_proj", "lm_head"};
      },
      "do not name model.embed_tokens");
}

class EmbeddingRun : public TinyRun {
 protected:
  TrainOptions options(const std::string& out, const std::vector<std::string>& targets,
                       const std::vector<int64_t>& tokens) {
    write_data("data.jsonl", 24);
    TrainOptions o;
    o.model = model();
    o.data = o.eval_data = {path("data.jsonl")};
    o.output_dir = path(out);
    o.lora.r = 4;
    o.lora.lora_dropout = 0.1;
    o.lora.target_modules = targets;
    o.lora.trainable_token_indices = tokens;
    o.lora.base_model_name_or_path = model();
    o.learning_rate = 1e-2;
    o.per_device_train_batch_size = 2;
    o.gradient_accumulation_steps = 2;
    o.max_steps = 6;
    o.save_steps = 2;
    return o;
  }
};

// The learned rows and pairs are in the file, a resumed run and one with checkpointed layers end
// with the same bytes, and what is read back is the model that was trained.
TEST_F(EmbeddingRun, ResumesAndCheckpointsToTheSameBytes) {
  const std::vector<std::pair<std::vector<std::string>, std::vector<int64_t>>> cases = {
      {{"embed_tokens", "q_proj", "lm_head"}, {}}, {{"v_proj", "lm_head"}, {4, 65, 10}}};
  for (size_t i = 0; i < cases.size(); ++i) {
    const auto& [targets, tokens] = cases[i];
    const std::string whole = concat("whole", i), parts = concat("parts", i);
    TrainOptions o = options(whole, targets, tokens);
    const TrainResult result = finetune(o);
    EXPECT_LT(result.last_eval_loss.value(), result.first_eval_loss.value());
    const std::string bytes = read(whole + "/adapter_model.safetensors");
    o = options(parts, targets, tokens);
    o.gradient_checkpointing = true;
    finetune(o);
    EXPECT_EQ(read(parts + "/adapter_model.safetensors"), bytes);
    fs::remove_all(path(parts + "/checkpoint-6"));
    fs::remove_all(path(parts + "/checkpoint-4"));
    fs::remove(path(parts + "/adapter_model.safetensors"));
    o = options(parts, targets, tokens);
    o.resume = true;
    EXPECT_EQ(finetune(o).losses.size(), 4u);
    EXPECT_EQ(read(parts + "/adapter_model.safetensors"), bytes);
  }
}

// PEFT cannot read what comes of both on the one matrix; on an untied model it can.
TEST_F(EmbeddingRun, TokensBesideAWholeHeadThatIsTiedAreRefused) {
  TrainOptions o = options("out", {"q_proj"}, {5});
  o.lora.modules_to_save = {"lm_head"};
  const std::string message = message_of([&] { finetune(o); });
  EXPECT_NE(message.find("trainable_token_indices and modules_to_save both take lm_head"),
            std::string::npos)
      << message;
  EXPECT_FALSE(fs::exists(path("out/adapter_config.json")));
}

TEST_F(EmbeddingRun, LoraPlusOnTheEmbeddingIsRefused) {
  TrainOptions o = options("out", {"embed_tokens"}, {});
  o.loraplus_lr_ratio = 4;
  const std::string message = message_of([&] { finetune(o); });
  EXPECT_NE(message.find("loraplus_lr_ratio is given, and target_modules name the embedding"),
            std::string::npos)
      << message;
  EXPECT_FALSE(fs::exists(path("out/adapter_config.json")));
}

}  // namespace
}  // namespace graft
