// Training options: files, flags, errors, and the resolved configuration.
#include "train/options.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "train/option_keys.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

class Options : public testing::Test {
 protected:
  Options() {
    folder_ = fs::temp_directory_path() / ("graft_options_" + std::to_string(getpid()));
    fs::create_directories(folder_);
  }
  ~Options() override { fs::remove_all(folder_); }

  std::string write(const std::string& text) {
    const std::string path = folder_ / "train.yaml";
    std::ofstream(path) << text;
    return path;
  }
  TrainOptions read(const std::string& text) {
    TrainOptions options;
    read_config_file(options, write(text));
    return options;
  }
  // The message, without the path before it.
  std::string error(const std::string& text) {
    try {
      read(text);
    } catch (const Error& error) {
      const std::string what = error.what(), path = (folder_ / "train.yaml").string();
      EXPECT_EQ(what.find(path), 0u) << what;
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      return what.substr(std::min(what.size(), path.size()));
    }
    return "no error";
  }
  static TrainOptions flags(const std::vector<std::string>& args) {
    CommandLine rest;
    return read_train_options(args, rest);
  }
  static std::string flag_error(const std::vector<std::string>& args) {
    try {
      flags(args);
    } catch (const UsageError& error) {
      return error.what();
    }
    return "no error";
  }

  fs::path folder_;
};

// The defaults that issue and README promise.
TEST_F(Options, DefaultsAreThePromisedOnes) {
  const TrainOptions o;
  EXPECT_EQ(o.learning_rate, 2e-4);
  EXPECT_EQ(o.lr_scheduler_type, Schedule::Type::Cosine);
  EXPECT_EQ(o.warmup_ratio, 0.03);
  EXPECT_EQ(o.max_grad_norm, 1.0);
  EXPECT_EQ(o.weight_decay, 0.0);
  EXPECT_EQ(o.per_device_train_batch_size, 1);
  EXPECT_EQ(o.gradient_accumulation_steps, 8);
  EXPECT_EQ(o.num_epochs, 1);
  EXPECT_EQ(o.max_seq_length, 1024);
  EXPECT_EQ(o.lora.r, 16);
  EXPECT_EQ(o.lora.alpha(), 32);
  EXPECT_EQ(o.lora.lora_dropout, 0.05);
  EXPECT_EQ(o.lora.target_modules.size(), 7u);
}

TEST_F(Options, TheBlockOfPeftRecipesWorksAsItStands) {
  const TrainOptions o = read(
      "lora: {r: 32, lora_alpha: 64, lora_dropout: 0.05, target_modules: [q_proj, k_proj, v_proj, "
      "o_proj, gate_proj, up_proj, down_proj]}\nlearning_rate: 1e-4\nnum_train_epochs: 3\n");
  EXPECT_EQ(o.lora.r, 32);
  EXPECT_EQ(o.lora.alpha(), 64);
  EXPECT_EQ(o.lora.lora_dropout, 0.05);
  EXPECT_EQ(o.lora.target_modules.size(), 7u);
  EXPECT_FALSE(o.lora.target_is_regex);
  EXPECT_EQ(o.learning_rate, 1e-4);
  EXPECT_EQ(o.num_epochs, 3);
}

TEST_F(Options, LoraKeysAtTopLevelMeanTheSame) {
  const TrainOptions o = read(
      "r: 4\ntarget_modules: .*\\.(q|v)_proj\ninit_lora_weights: gaussian\n"
      "rank_pattern: {q_proj: 8}\nalpha_pattern:\n  q_proj: 3.5\n");
  EXPECT_EQ(o.lora.r, 4);
  EXPECT_TRUE(o.lora.target_is_regex);
  EXPECT_EQ(o.lora.target_modules, std::vector<std::string>{".*\\.(q|v)_proj"});
  EXPECT_EQ(o.lora.init_lora_weights, LoraConfig::Init::Gaussian);
  ASSERT_EQ(o.lora.rank_pattern.size(), 1u);
  EXPECT_EQ(o.lora.rank_pattern[0], (std::pair<std::string, int64_t>("q_proj", 8)));
  ASSERT_EQ(o.lora.alpha_pattern.size(), 1u);
  EXPECT_EQ(o.lora.alpha_pattern[0], (std::pair<std::string, double>("q_proj", 3.5)));
  EXPECT_EQ(
      error("lora: {r: 4}\nlora_alpha: 8\n"),
      ":2: 'lora_alpha' stands at top level beside a lora block; put all LoRA keys in one place");
  EXPECT_EQ(
      error("lora_alpha: 8\nlora: {r: 4}\n"),
      ":2: 'lora_alpha' stands at top level beside a lora block; put all LoRA keys in one place");
}

TEST_F(Options, AllLinearIsNoRegularExpression) {
  const TrainOptions o = read("target_modules: all-linear\n");
  EXPECT_FALSE(o.lora.target_is_regex);
  EXPECT_EQ(o.lora.target_modules, std::vector<std::string>{"all-linear"});
}

TEST_F(Options, UnknownKeysAreErrorsWithTheNearestName) {
  EXPECT_EQ(error("seed: 1\n\nlearning_rat: 1\n"),
            ":3: unknown key 'learning_rat'; did you mean learning_rate?");
  EXPECT_EQ(error("lora:\n  lora_alfa: 1\n"),
            ":2: unknown key 'lora_alfa'; did you mean lora_alpha?");
  EXPECT_EQ(error("lora: {seed: 1}\n"),
            ":1: unknown key 'seed' in the lora block; it stands at top level");
  EXPECT_EQ(error("lr: 1\n"), ":1: unknown key 'lr'; did you mean learning_rate?");
  EXPECT_EQ(nearest_option_name("target_module"), "target_modules");
  EXPECT_EQ(error("megatron_core: megatron\n"),
            ":1: unknown key 'megatron_core'; graft train --help lists all");
  EXPECT_EQ(error("\x7f" + std::string("ELF\x02\x01") + std::string(200, 'x') + "\n"),
            ": got '?ELF??" + std::string(54, 'x') +
                "...', expected keys and values, one 'key: value' a line");
  EXPECT_EQ(nearest_option_name("num_train_epoch"), "num_train_epochs");
}

TEST_F(Options, DoubledKeysAreErrors) {
  EXPECT_EQ(error("seed: 1\nr: 3\nseed: 1\n"),
            ":3: key 'seed' is given twice; leave one of the two");
  EXPECT_EQ(
      error("num_epochs: 1\nnum_train_epochs: 1\n"),
      ":2: key 'num_train_epochs' is given twice (num_epochs = num_train_epochs); leave one of "
      "the two");
  EXPECT_EQ(error("lora: {r: 1}\nlora: {r: 2}\n"),
            ":2: key 'lora' is given twice; leave one of the two");
  EXPECT_EQ(error("lora: {r: 1, r: 2}\n"), ":1: key 'r' is given twice; leave one of the two");
}

TEST_F(Options, WrongTypesAndRangesNameLineGotAndExpected) {
  EXPECT_EQ(error("learning_rate: fast\n"),
            ":1: learning_rate: got 'fast', expected a number from 0 up");
  EXPECT_EQ(error("seed: 1\nr: 0\n"), ":2: r: got '0', expected an integer from 1 up, below 2^31");
  EXPECT_EQ(error("r: '16'\n"),
            ":1: r: got the text '16', expected an integer from 1 up, below 2^31");
  EXPECT_EQ(error("r: 1.5\n"), ":1: r: got '1.5', expected an integer from 1 up, below 2^31");
  EXPECT_EQ(error("r:\n"), ":1: r: got nothing, expected an integer from 1 up, below 2^31");
  EXPECT_EQ(error("r: 99999999999999999999\n"),
            ":1: r: got '99999999999999999999', expected an integer from 1 up, below 2^31");
  EXPECT_EQ(error("lora_dropout: 1\n"),
            ":1: lora_dropout: got '1', expected a number from 0 to below 1");
  EXPECT_EQ(error("warmup_ratio: nan\n"),
            ":1: warmup_ratio: got 'nan', expected a number from 0 to 1");
  EXPECT_EQ(error("shuffle: maybe\n"), ":1: shuffle: got 'maybe', expected true or false");
  EXPECT_EQ(error("model: [a, b]\n"),
            ":1: model: got the list [a, b], expected a directory or a hub id");
  EXPECT_EQ(error("bias: some\n"), ":1: bias: got 'some', expected none, lora_only or all");
  EXPECT_EQ(error("modules_to_save: {a: b}\n"),
            ":1: modules_to_save: got a map, expected a list of module names");
  EXPECT_EQ(error("exclude_modules: all-linear\n"),
            ":1: exclude_modules: got 'all-linear', expected a list of module names or a regular "
            "expression");
  EXPECT_EQ(error("dtype: int8\n"), ":1: dtype: got 'int8', expected float32 or bfloat16");
  EXPECT_EQ(error("lr_scheduler_type: step\n"),
            ":1: lr_scheduler_type: got 'step', expected constant, constant_with_warmup, linear or "
            "cosine");
  EXPECT_EQ(
      error("rank_pattern: {q_proj: 0}\n"),
      ":1: rank_pattern: got a map, expected a map from module patterns to integers from 1 up");
  EXPECT_EQ(error("trainable_token_indices: [3, -1]\n"),
            ":1: trainable_token_indices: got the list [3, -1], expected token ids");
  EXPECT_EQ(error("- r\n"),
            ": got the list [r], expected keys and values, one 'key: value' a line");
  EXPECT_EQ(error("lora: 3\n"),
            ":1: lora: got '3', expected a map such as {r: 16, lora_alpha: 32}");
  EXPECT_EQ(error("a: [1\n").substr(0, 14), ":2: not YAML: ");
}

TEST_F(Options, PathsInAFileAreRelativeToTheFile) {
  fs::create_directories(folder_ / "base");
  const TrainOptions o = read("model: base\ndata: [a.txt, ../b.jsonl]\noutput_dir: out\n");
  EXPECT_EQ(o.model, (folder_ / "base").string());
  EXPECT_EQ(o.lora.base_model_name_or_path, "base");
  EXPECT_EQ(o.data[0], (folder_ / "a.txt").string());
  EXPECT_EQ(o.data[1], (folder_.parent_path() / "b.jsonl").string());
  EXPECT_EQ(o.output_dir, (folder_ / "out").string());
  EXPECT_EQ(read("model: Qwen/Qwen2.5-0.5B\n").model, "Qwen/Qwen2.5-0.5B");
}

TEST_F(Options, EveryKeyIsAFlagAndFlagsWin) {
  const std::string file = write("learning_rate: 1e-3\nr: 8\nshuffle: true\n");
  const TrainOptions o =
      flags({file, "--learning-rate", "0.5", "--lora_alpha=7", "--target-modules", "q_proj,v_proj",
             "--no-shuffle", "--gradient-checkpointing", "--resume", "false", "--max-steps", "-1",
             "--model", "x/y", "--rank-pattern", "q_proj: 4", "--layers-to-transform", "0,2"});
  EXPECT_EQ(o.learning_rate, 0.5);
  EXPECT_EQ(o.lora.r, 8);
  EXPECT_EQ(o.lora.alpha(), 7);
  EXPECT_EQ(o.lora.target_modules, (std::vector<std::string>{"q_proj", "v_proj"}));
  EXPECT_FALSE(o.lora.target_is_regex);
  EXPECT_FALSE(o.shuffle);
  EXPECT_TRUE(o.gradient_checkpointing);
  EXPECT_FALSE(o.resume);
  EXPECT_EQ(o.max_steps, -1);
  EXPECT_EQ(o.model, "x/y");
  EXPECT_EQ(o.lora.base_model_name_or_path, "x/y");
  EXPECT_EQ(o.lora.rank_pattern[0].second, 4);
  EXPECT_EQ(o.lora.layers_to_transform, (std::vector<int64_t>{0, 2}));
  for (const OptionKey& key : option_keys()) {
    std::string flag = key.name;
    std::replace(flag.begin(), flag.end(), '_', '-');
    EXPECT_NE(train_flags_help().find("--" + flag), std::string::npos) << key.name;
  }
}

TEST_F(Options, ASingleModuleNameOnTheCommandLineIsAList) {
  EXPECT_FALSE(flags({"--target-modules", "q_proj"}).lora.target_is_regex);
  EXPECT_TRUE(flags({"--target-modules", ".*q_proj"}).lora.target_is_regex);
  EXPECT_FALSE(flags({"--target-modules", "all-linear"}).lora.target_is_regex);
}

TEST_F(Options, WrongFlagsAreUsageErrors) {
  EXPECT_EQ(flag_error({"--learning-rat", "1"}),
            "unknown flag --learning-rat; did you mean --learning-rate?");
  EXPECT_EQ(flag_error({"--r", "0"}), "--r: got '0', expected an integer from 1 up, below 2^31");
  EXPECT_EQ(flag_error({"--r", "1", "--r", "2"}), "--r is given twice; leave one of the two");
  EXPECT_EQ(flag_error({"a.yaml", "b.yaml"}),
            "unexpected argument 'b.yaml'; expected one config file and flags");
}

TEST_F(Options, TheResolvedConfigurationGivesTheSameRun) {
  fs::create_directories(folder_ / "base");
  std::string file = write(
      "model: base\ndata: a.txt\noutput_dir: out\nlearning_rate: 3.3e-5\nseed: "
      "18446744073709551615\n"
      "lora:\n  r: 3\n  target_modules: '.*\\.(q|v)_proj'\n  rank_pattern: {'layers.0.\"q': 8}\n"
      "  init_lora_weights: false\n");
  const TrainOptions first = flags({file, "--eval-split", "0.1", "--dtype", "bfloat16"});
  file = write(resolved_yaml(first));
  const TrainOptions second = flags({file});
  EXPECT_EQ(resolved_yaml(second), resolved_yaml(first));
  EXPECT_EQ(result_keys(second), result_keys(first));
  EXPECT_EQ(second.lora.base_model_name_or_path, "base");
  EXPECT_EQ(second.model, first.model);
  EXPECT_EQ(second.seed, 18446744073709551615u);
  EXPECT_TRUE(second.lora.target_is_regex);
  EXPECT_EQ(second.lora.rank_pattern, first.lora.rank_pattern);
}

// Either key asks for DoRA, and both are written as if both had.
TEST_F(Options, MethodDoraAndUseDoraAreOne) {
  const TrainOptions method = flags({write("model: m\noutput_dir: o\nmethod: dora\n")});
  const TrainOptions key = flags({write("model: m\noutput_dir: o\nlora: {use_dora: true}\n")});
  const TrainOptions plain = flags({write("model: m\noutput_dir: o\n")});
  EXPECT_TRUE(uses_dora(method) && uses_dora(key) && !uses_dora(plain));
  EXPECT_NO_THROW(validate(method));
  EXPECT_EQ(resolved_yaml(method), resolved_yaml(key));
  EXPECT_EQ(result_keys(method), result_keys(key));
  EXPECT_NE(result_keys(method), result_keys(plain));
  EXPECT_EQ(result_keys(flags({write(resolved_yaml(method))})), result_keys(method));
}

TEST_F(Options, OfQuantisationAreThoseOfBitsAndBytesConfig) {
  const std::string start = "model: m\ndata: a.txt\noutput_dir: out\n";
  TrainOptions o = read(start + "method: qlora\noptim: adamw_8bit\n");
  EXPECT_EQ(o.method, TrainOptions::Method::Qlora);
  EXPECT_EQ(o.optim, TrainOptions::Optimizer::AdamW8bit);
  EXPECT_TRUE(o.bnb_4bit_use_double_quant);
  EXPECT_NO_THROW(validate(o));
  o = read(start + "method: qlora\nbnb_4bit_quant_type: nf4\nbnb_4bit_use_double_quant: false\n");
  EXPECT_FALSE(o.bnb_4bit_use_double_quant);
  EXPECT_NO_THROW(validate(o));
  EXPECT_FALSE(read(resolved_yaml(o)).bnb_4bit_use_double_quant);
  EXPECT_EQ(error("bnb_4bit_quant_type: fp4\n"),
            ":1: bnb_4bit_quant_type: got 'fp4', expected nf4");
  // They are written, and given, where they say something.
  EXPECT_THROW(validate(read(start + "bnb_4bit_use_double_quant: true\n")), Error);
  EXPECT_EQ(resolved_yaml(read(start)).find("bnb_4bit"), std::string::npos);
}

TEST_F(Options, ContradictionsAreRefused) {
  TrainOptions good;
  good.model = "m";
  good.output_dir = "o";
  EXPECT_NO_THROW(validate(good));
  const auto refused = [&](auto change) {
    TrainOptions bad = good;
    change(bad);
    EXPECT_THROW(validate(bad), Error);
  };
  refused([](auto& o) { o.model = ""; });
  refused([](auto& o) { o.output_dir = ""; });
  refused([](auto& o) { o.eval_split = 0.1, o.eval_data = {"x.txt"}; });
  refused([](auto& o) { o.eval_split = 1.5; });
  refused([](auto& o) {
    o.min_lr_ratio = 0.1;
    o.lr_scheduler_type = Schedule::Type::Linear;
  });
  refused([](auto& o) { o.random_init = true; });
  refused([](auto& o) {
    o.method = TrainOptions::Method::Dora;
    o.given = {"use_dora"};
  });
  refused([](auto& o) {
    o.method = TrainOptions::Method::Full;
    o.given = {"use_dora"};
  });
  refused([](auto& o) {
    o.method = TrainOptions::Method::Full;
    o.given = {"r"};
  });
}

}  // namespace
}  // namespace graft
