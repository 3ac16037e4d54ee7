// graft demo: teaches the bundled model (models/demo) a notation that it has never seen, with a
// LoRA adapter, and counts exact answers before and after. With --rebuild-base the model itself is
// trained again from random weights, by the same loop.
#include <chrono>
#include <cstdio>
#include <cxxopts.hpp>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "models/adapter.h"
#include "models/tokenizer.h"
#include "models/weights.h"
#include "train/bpe_trainer.h"
#include "train/commands.h"
#include "train/demo_answers.h"
#include "train/demo_data.h"
#include "train/finetune.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

constexpr int kTrainItems = 3200, kHeldOutItems = 200;
constexpr int kBaseTexts = 80000, kTokenizerTexts = 5000, kVocabSize = 768;
constexpr double kMostBefore = 0.05, kLeastAfter = 0.95;

struct DemoOptions {
  std::string model, work_dir;
  uint64_t seed = 1;
  int64_t threads = 0;
};

TrainOptions lora_recipe(const DemoOptions& demo) {
  TrainOptions options;
  options.model = demo.model;
  options.data = {demo.work_dir + "/train.jsonl"};
  options.output_dir = demo.work_dir + "/adapter";
  options.seed = demo.seed;
  options.threads = demo.threads;
  options.lora.r = 16;
  options.lora.lora_dropout = 0;
  options.lora.base_model_name_or_path = demo.model;
  options.learning_rate = 1e-2;
  options.per_device_train_batch_size = 32;
  options.gradient_accumulation_steps = 1;
  options.max_seq_length = 64;
  options.logging_steps = 10;
  options.save_steps = 0;
  return options;
}

TrainOptions base_recipe(const DemoOptions& demo, const std::string& directory) {
  TrainOptions options;
  options.model = directory;
  options.data = {demo.work_dir + "/base.jsonl"};
  options.output_dir = demo.work_dir + "/base_run";
  options.method = TrainOptions::Method::Full;
  options.random_init = true;
  options.seed = demo.seed;
  options.threads = demo.threads;
  options.learning_rate = 3e-3;
  options.adam_beta2 = 0.95;
  options.min_lr_ratio = 0.1;
  options.per_device_train_batch_size = 32;
  options.gradient_accumulation_steps = 1;
  options.max_seq_length = 192;
  options.logging_steps = 50;
  options.save_steps = 0;
  return options;
}

// The exit status: 0 if the base could not do it and the adapter can.
int print_outcome(const TrainResult& result, const std::vector<DemoItem>& items,
                  const std::vector<std::string>& before, const std::vector<std::string>& after,
                  double seconds) {
  std::printf("\n%s\nloss:", result.trainable_line.c_str());
  const size_t last = result.losses.size();
  for (size_t step : {size_t(1), last / 20, last / 10, last / 4, last / 2, last})
    if (step > 0) std::printf(" %.4f (step %zu)", result.losses[step - 1], step);
  std::printf("\nprompt:  %s\n", items.front().prompt.c_str());
  std::printf("base:   %s\n", before.front().c_str());
  std::printf("adapter:%s\n", after.front().c_str());

  const double exact_before = exact_match(before, items), exact_after = exact_match(after, items);
  std::printf("exact match on %zu held-out items: before %.1f %%, after %.1f %% (%.1f s in all)\n",
              items.size(), 100 * exact_before, 100 * exact_after, seconds);
  const bool passed = exact_before < kMostBefore && exact_after > kLeastAfter;
  if (!passed) std::printf("demo: wanted below 5 %% before and above 95 %% after\n");
  return passed ? 0 : 1;
}

int run_demo(const DemoOptions& demo) {
  const auto start = std::chrono::steady_clock::now();
  CHECK(fs::exists(demo.model + "/model.safetensors"), "demo: ", demo.model,
        " holds no model; run it from the root of the repository, or give --model");
  fs::create_directories(demo.work_dir);
  const TrainOptions options = lora_recipe(demo);
  fs::remove_all(options.output_dir);  // of an earlier demo

  const DemoSplit split = demo_split(demo.seed, kTrainItems, kHeldOutItems);
  write_items(options.data.front(), split.train);
  write_items(demo.work_dir + "/held_out.jsonl", split.held_out);
  const Tokenizer tokenizer = Tokenizer::load(demo.model);
  const std::unique_ptr<Decoder> model = load_model(demo.model);
  std::printf("base: %s, %ld parameters; task, seed %lu: %zu items to train on, %zu held out\n",
              demo.model.c_str(), long(num_parameters(model->config())), (unsigned long)demo.seed,
              split.train.size(), split.held_out.size());
  const std::vector<std::string> before = answers(*model, tokenizer, split.held_out);

  const TrainResult result = finetune(options, {.console = stdout});
  load_adapter(*model, options.output_dir);
  const std::vector<std::string> after = answers(*model, tokenizer, split.held_out);

  const auto seconds = std::chrono::steady_clock::now() - start;
  return print_outcome(result, split.held_out, before, after,
                       std::chrono::duration<double>(seconds).count());
}

void write_model_files(const std::string& directory, const BpeVocabulary& vocabulary) {
  const auto write = [&](const char* name, const nlohmann::ordered_json& json) {
    std::ofstream file(directory + "/" + name, std::ios::binary);
    file << json.dump(2) << "\n";
    file.close();
    CHECK(file.good(), "demo: cannot write ", directory, "/", name);
  };
  write("config.json", {{"architectures", {"Qwen3ForCausalLM"}},
                        {"model_type", "qwen3"},
                        {"vocab_size", vocabulary.tokens.size()},
                        {"hidden_size", 128},
                        {"intermediate_size", 256},
                        {"num_hidden_layers", 3},
                        {"num_attention_heads", 4},
                        {"num_key_value_heads", 4},
                        {"head_dim", 32},
                        {"hidden_act", "silu"},
                        {"attention_bias", false},
                        {"rms_norm_eps", 1e-6},
                        {"rope_theta", 10000.0},
                        {"max_position_embeddings", 512},
                        {"initializer_range", 0.05},
                        {"tie_word_embeddings", true},
                        {"use_sliding_window", false},
                        {"bos_token_id", nullptr},
                        {"eos_token_id", 0},
                        {"torch_dtype", "float32"}});
  write("generation_config.json", {{"do_sample", false}, {"eos_token_id", 0}, {"pad_token_id", 0}});
  save_tokenizer(directory, vocabulary);
}

// Writes demo.model: tokenizer and weights, from nothing but the seed.
int rebuild_base(const DemoOptions& demo) {
  fs::create_directories(demo.work_dir);
  Random random(demo.seed, /*stream=*/0);
  std::vector<std::string> texts(kBaseTexts);
  for (std::string& text : texts) text = demo_base_text(random);
  std::vector<nlohmann::ordered_json> rows;
  for (const std::string& text : texts) rows.push_back({{"text", text}});
  write_jsonl(demo.work_dir + "/base.jsonl", rows);

  const std::string directory = demo.work_dir + "/base";
  fs::create_directories(directory);
  texts.resize(kTokenizerTexts);
  write_model_files(directory, train_bpe(texts, kVocabSize, {"<|endoftext|>"}));
  const TrainOptions options = base_recipe(demo, directory);
  fs::remove_all(options.output_dir);
  finetune(options, {.console = stdout});

  fs::create_directories(demo.model);
  for (const char* name :
       {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"})
    fs::copy_file(directory + "/" + name, demo.model + "/" + name,
                  fs::copy_options::overwrite_existing);
  fs::copy_file(options.output_dir + "/model.safetensors", demo.model + "/model.safetensors",
                fs::copy_options::overwrite_existing);
  std::printf("wrote %s\n", demo.model.c_str());
  return 0;
}

}  // namespace

int demo_command(int argc, char** argv) {
  cxxopts::Options flags("graft demo", "Teach the bundled model a notation with LoRA");
  flags.add_options()("seed", "which items are drawn",
                      cxxopts::value<uint64_t>()->default_value("1"))(
      "model", "the base model", cxxopts::value<std::string>()->default_value("models/demo"))(
      "work-dir", "where data and adapter go",
      cxxopts::value<std::string>()->default_value("build/demo"))(
      "threads", "0: all", cxxopts::value<int64_t>()->default_value("0"))(
      "rebuild-base", "train the base model again, from random weights")("h,help", "this text");
  const auto parsed = [&] {
    try {
      return flags.parse(argc, argv);
    } catch (const cxxopts::exceptions::exception& error) {
      const std::string hint = unknown_flag_hint(flags.help(), {argv + 1, argv + argc});
      throw UsageError(
          concat("demo: ", hint.empty() ? error.what() : hint, "; see graft demo --help"));
    }
  }();
  if (parsed.count("help")) {
    std::printf("%s", flags.help().c_str());
    return 0;
  }
  if (!parsed.unmatched().empty())
    throw UsageError("demo: got '" + parsed.unmatched().front() + "', expected flags alone");
  const DemoOptions demo{parsed["model"].as<std::string>(), parsed["work-dir"].as<std::string>(),
                         parsed["seed"].as<uint64_t>(), parsed["threads"].as<int64_t>()};
  return parsed.count("rebuild-base") ? rebuild_base(demo) : run_demo(demo);
}

}  // namespace graft
