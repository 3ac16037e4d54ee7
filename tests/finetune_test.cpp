// The training loop as a whole, on a tiny model: evaluation, resuming, what is written and what is
// refused.
#include "train/finetune.h"

#include <cmath>

#include "models/adapter.h"
#include "models/weights.h"
#include "tensor/allocator.h"
#include "tensor/safetensors.h"
#include "tests/tiny_run.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

class Finetune : public TinyRun {
 protected:
  TrainOptions options(const std::string& output_dir) {
    TrainOptions o;
    o.model = model();
    o.lora.base_model_name_or_path = "tiny";
    write_data("data.jsonl", 22);
    o.data = {path("data.jsonl")};
    o.output_dir = path(output_dir);
    o.learning_rate = 1e-2;
    o.gradient_accumulation_steps = 2;
    o.per_device_train_batch_size = 2;
    o.max_steps = 8;
    o.save_steps = 0;
    o.lora.r = 4;
    o.lora.lora_dropout = 0.1;
    return o;
  }
  // What finetune refuses, without the test's folder in it; nothing may have been written.
  std::string error(const TrainOptions& o) {
    const bool existed = fs::exists(o.output_dir);
    try {
      finetune(o);
    } catch (const Error& error) {
      std::string what = error.what();
      for (size_t at; (at = what.find(folder_.string() + "/")) != std::string::npos;)
        what.erase(at, folder_.string().size() + 1);
      EXPECT_EQ(fs::exists(o.output_dir), existed);
      return what;
    }
    return "no error";
  }
  // Metrics without what depends on the clock and the machine.
  std::vector<nlohmann::json> lasting_metrics(const std::string& output_dir) {
    auto lines = metrics(output_dir);
    for (auto& line : lines) {
      line.erase("tokens_per_second");
      line.erase("peak_memory_bytes");
    }
    return lines;
  }
};

TEST_F(Finetune, TheLossFallsAndTheOutputIsAnAdapter) {
  TrainOptions o = options("out");
  o.max_steps = 40;
  const TrainResult result = finetune(o);
  EXPECT_EQ(result.steps, 40);
  EXPECT_LT(result.losses.back(), 0.7 * result.losses.front());
  auto model = load_model(o.model);
  const LoraConfig config = load_adapter(*model, o.output_dir);
  EXPECT_EQ(config.r, 4);
  EXPECT_EQ(config.base_model_name_or_path, "tiny");
  EXPECT_EQ(result.trainable_line.substr(0, 18), "trainable params: ");
}

TEST_F(Finetune, RefusesGraphsOnTheCpu) {
  TrainOptions o = options("out");
  o.device = TrainOptions::DeviceChoice::Cpu;
  o.cuda_graph = true;
  EXPECT_EQ(error(o), "cuda_graph: the device is cpu, which has no graphs; leave cuda_graph out");
}

TEST_F(Finetune, EvaluatesBeforeTheFirstAndAfterTheLastStepAndInBetween) {
  TrainOptions o = options("out");
  write_data("eval.jsonl", 5);
  o.eval_data = {path("eval.jsonl")};
  o.eval_steps = 3;
  const TrainResult result = finetune(o);
  std::vector<int64_t> steps;
  for (const auto& line : metrics("out"))
    if (line.contains("eval_loss")) steps.push_back(line["step"]);
  EXPECT_EQ(steps, (std::vector<int64_t>{0, 3, 6, 8}));
  EXPECT_LT(*result.last_eval_loss, *result.first_eval_loss);

  // The same rows as one training step at learning rate 0 without dropout: the same mean.
  TrainOptions same = options("same");
  same.data = o.eval_data;
  same.lora.lora_dropout = 0;
  same.learning_rate = 0;
  same.max_steps = 1;
  same.gradient_accumulation_steps = 5;
  EXPECT_NEAR(finetune(same).losses[0], *result.first_eval_loss, 1e-5);
}

TEST_F(Finetune, MetricsHoldWhatIsPromised) {
  TrainOptions o = options("out");
  o.logging_steps = 3;
  const TrainResult result = finetune(o);
  const auto lines = metrics("out");
  ASSERT_EQ(lines.size(), 3u);  // steps 3, 6 and the last
  EXPECT_EQ(lines[2]["step"], 8);
  for (const auto& line : lines)
    for (const char* key : {"step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens",
                            "num_label_tokens", "tokens_per_second", "peak_memory_bytes"})
      EXPECT_TRUE(line[key].is_number()) << key;
  // The loss over the tokens since the last line, weighted by token.
  TrainOptions every = options("every");
  finetune(every);
  double sum = 0, before = 0;
  for (const auto& line : metrics("every")) {
    const double labels = line["num_label_tokens"].get<double>() - before;
    before += labels;
    if (line["step"] <= 3) sum += line["loss"].get<double>() * labels;
    if (line["step"] == 3) {
      EXPECT_NEAR(lines[0]["loss"].get<double>(), sum / before, 1e-9);
    }
  }
  EXPECT_EQ(lines[2]["num_label_tokens"], before);
}

// 22 rows by 4 are 6 steps an epoch, the last of 2 rows.
TEST_F(Finetune, EpochsCountStepsWithTheIncompleteOne) {
  TrainOptions o = options("out");
  o.max_steps = 0;
  EXPECT_EQ(finetune(o).steps, 6);
  EXPECT_DOUBLE_EQ(metrics("out").back()["epoch"], 1.0);
  TrainOptions fraction = options("fraction");
  fraction.max_steps = 0;
  fraction.num_epochs = 1.5;
  EXPECT_EQ(finetune(fraction).steps, 9);
}

class FinetuneResume : public Finetune, public testing::WithParamInterface<const char*> {
 protected:
  TrainOptions resumable(const std::string& output_dir) {
    TrainOptions o = options(output_dir);
    const std::string kind = GetParam();
    if (kind != "lora") {
      o.method = TrainOptions::Method::Full;
      o.dtype = kind == "full_bf16" ? DType::BF16 : DType::F32;
    }
    o.max_steps = 9;
    o.save_steps = 2;
    o.logging_steps = 3;
    o.eval_split = 3;
    o.eval_steps = 4;
    return o;
  }
  std::string result(const std::string& output_dir) {
    return read(output_dir + (std::string(GetParam()) == "lora" ? "/adapter_model.safetensors"
                                                                : "/model.safetensors"));
  }
};

TEST_P(FinetuneResume, EndsWithTheBytesOfAnUnbrokenRun) {
  const TrainResult unbroken = finetune(resumable("whole"));
  const std::string bytes = result("whole");
  ASSERT_GT(bytes.size(), 1000u);
  // As if the machine had died in step 8: the newest checkpoint is torn, the one before whole.
  TrainOptions o = resumable("broken");
  finetune(o);
  for (const auto& entry : fs::directory_iterator(o.output_dir))
    if (entry.is_regular_file() && entry.path().filename() != "metrics.jsonl")
      fs::remove(entry.path());
  fs::remove_all(path("broken/checkpoint-8"));
  fs::resize_file(path("broken/checkpoint-6/optimizer.safetensors"), 100);
  o.resume = true;
  const TrainResult resumed = finetune(o);
  EXPECT_EQ(resumed.losses.size(), 5u);  // from step 5 on
  EXPECT_EQ(resumed.steps, 9);
  EXPECT_TRUE(result("broken") == bytes);
  EXPECT_EQ(lasting_metrics("broken"), lasting_metrics("whole"));
  EXPECT_EQ(resumed.first_eval_loss, unbroken.first_eval_loss);
  EXPECT_EQ(resumed.last_eval_loss, unbroken.last_eval_loss);
}

INSTANTIATE_TEST_SUITE_P(Methods, FinetuneResume, testing::Values("lora", "full", "full_bf16"),
                         [](const auto& info) { return std::string(info.param); });

TEST_F(Finetune, ResumingWithoutACheckpointStartsAtTheFirstStep) {
  TrainOptions o = options("out");
  o.resume = true;
  EXPECT_EQ(finetune(o).losses.size(), 8u);
}

TEST_F(Finetune, AResultWithoutACheckpointIsNotOverwrittenByResuming) {
  TrainOptions o = options("out");
  finetune(o);
  const std::string bytes = read("out/adapter_model.safetensors"), log = read("out/metrics.jsonl");
  o.resume = true;
  o.seed = 5;
  EXPECT_EQ(error(o),
            "resume: out holds a result (adapter_model.safetensors) but no whole checkpoint; train "
            "into another output_dir");
  EXPECT_EQ(read("out/adapter_model.safetensors"), bytes);
  EXPECT_EQ(read("out/metrics.jsonl"), log);
}

TEST_F(Finetune, ResumingWithOtherOptionsNamesThem) {
  TrainOptions o = options("out");
  o.save_steps = 4;
  finetune(o);
  o.resume = true;
  o.learning_rate = 1;
  o.lora.lora_alpha = 5;
  o.logging_steps = 7;  // does not touch the result
  EXPECT_EQ(error(o),
            "resume: out/checkpoint-8 belongs to another run: learning_rate (was 0.01, now 1.0), "
            "lora_alpha (was 8.0, now 5.0); set them back, or train into another output_dir");
  o = options("out");
  o.resume = true;
  write_data("data.jsonl", 23);
  EXPECT_NE(error(o).find("data (was 22 rows"), std::string::npos);
}

TEST_F(Finetune, StopsAtANonFiniteLossAndKeepsTheCheckpoint) {
  TrainOptions o = options("out");
  o.learning_rate = 1e30;
  o.warmup_ratio = 0;
  o.save_steps = 1;
  try {
    finetune(o);
    FAIL() << "went on";
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).rfind("training: step 2 gave loss ", 0), 0u)
        << error.what();
  }
  EXPECT_TRUE(fs::exists(path("out/checkpoint-1/adapter_model.safetensors")));
  EXPECT_FALSE(fs::exists(path("out/checkpoint-2")));
  EXPECT_FALSE(fs::exists(path("out/adapter_model.safetensors")));
}

TEST_F(Finetune, AnAdapterToStartFromKeepsItsShape) {
  finetune(options("first"));
  TrainOptions o = options("second");
  o.adapter = path("first");
  o.lora = LoraConfig{};  // nothing was given
  finetune(o);
  auto model = load_model(o.model);
  EXPECT_EQ(load_adapter(*model, path("second")).r, 4);
  // What is given must agree.
  o.output_dir = path("third");
  o.given = {"r"};
  EXPECT_EQ(error(o), "adapter: first has r 4, but the options say 16; leave the key out");
}

// At learning rate 0 nothing moves: what comes out is what went in.
TEST_F(Finetune, AnAdapterToStartFromIsWhereTrainingStarts) {
  finetune(options("first"));
  TrainOptions o = options("second");
  o.adapter = path("first");
  o.learning_rate = 0;
  finetune(o);
  EXPECT_EQ(read("second/adapter_model.safetensors"), read("first/adapter_model.safetensors"));
}

TEST_F(Finetune, AllWeightsFromRandomOnesGiveAModelDirectory) {
  TrainOptions o = options("out");
  o.method = TrainOptions::Method::Full;
  o.random_init = true;
  o.max_steps = 60;
  fs::remove(path("model/model.safetensors"));
  const TrainResult result = finetune(o);
  EXPECT_LT(result.losses.back(), 0.7 * result.losses.front());
  TrainOptions again = options("again");
  again.model = path("out");  // with its tokenizer
  again.learning_rate = 0;
  again.lora.lora_dropout = 0;
  EXPECT_LT(finetune(again).losses.front(), 0.8 * result.losses.front());
}

// transformers.Trainer.get_decay_parameter_names. A decay of 1 / learning_rate sets what it acts on
// to zero before AdamW's own step of at most learning_rate.
TEST_F(Finetune, WeightDecaySparesNorms) {
  TrainOptions o = options("out");
  o.method = TrainOptions::Method::Full;
  o.lr_scheduler_type = Schedule::Type::Constant;
  o.max_steps = 1;
  o.weight_decay = 1 / o.learning_rate;
  finetune(o);
  auto largest = [&](const std::string& name) {
    double most = 0;
    const SafetensorsFile file(path("out/model.safetensors"));
    for (double x : file.tensor(name).to_doubles()) most = std::max(most, std::abs(x));
    return most;
  };
  EXPECT_LE(largest("model.layers.0.mlp.up_proj.weight"), 1.01 * o.learning_rate);
  EXPECT_LE(largest("model.embed_tokens.weight"), 1.01 * o.learning_rate);
  EXPECT_GT(largest("model.layers.0.input_layernorm.weight"), 0.5);
  EXPECT_GT(largest("model.layers.0.self_attn.q_norm.weight"), 0.5);
  EXPECT_GT(largest("model.norm.weight"), 0.5);
}

TEST_F(Finetune, AskTheSystemForNoMemoryAfterTheFirstStep) {
  TrainOptions o = options("warm");
  // Rows of one length: what a step needs is what the first one needed.
  std::string text;
  for (int i = 0; i < 24; ++i) text += "{\"text\": \"row " + std::to_string(10 + i) + "\"}\n";
  write("data.jsonl", text);
  const auto calls = [&](const std::string& output_dir, int64_t steps) {
    o.output_dir = path(output_dir);
    o.max_steps = steps;
    allocator_of(Device::CPU).release_cached();
    const int64_t before = allocator_of(Device::CPU).stats().system_calls;
    finetune(o);
    return allocator_of(Device::CPU).stats().system_calls - before;
  };
  finetune(o);  // buffers that live as long as the process
  const int64_t one = calls("one", 1);
  EXPECT_GT(one, 0);
  EXPECT_EQ(calls("six", 6), one);
}

TEST_F(Finetune, RefusesAnOutputDirectoryThatHoldsAnotherRun) {
  finetune(options("out"));
  const std::string bytes = read("out/adapter_model.safetensors");
  EXPECT_NE(error(options("out")).find("output_dir: out holds another run ("), std::string::npos);
  EXPECT_EQ(read("out/adapter_model.safetensors"), bytes);
  TrainOptions into_model = options("model");
  EXPECT_NE(error(into_model).find("holds another run (model.safetensors)"), std::string::npos);
  write("notes/todo.txt", "x");  // what is not a run is no hindrance
  EXPECT_EQ(finetune(options("notes")).steps, 8);
}

TEST_F(Finetune, RefusesWhatDoesNotFitBeforeAnythingIsWritten) {
  TrainOptions o = options("out");
  o.data = {};
  EXPECT_EQ(error(o),
            "train: data is missing; give .txt or .jsonl files in the config file or as --data");
  o = options("out");
  o.lora.target_modules = {"query"};
  EXPECT_NE(error(o), "no error");
  o = options("out");
  o.lora.r = 0;
  EXPECT_NE(error(o), "no error");
  o = options("out");
  o.eval_split = 22;
  EXPECT_EQ(error(o), "eval_split: 22 rows are asked for, but the data has 22");
  o = options("out");
  o.device = TrainOptions::DeviceChoice::Cpu;
  o.lora_layout = LoraLayout::Merged;
  EXPECT_EQ(error(o), "train: lora_layout needs a GPU; use device: cuda, or lora_layout: plain");
  o.method = TrainOptions::Method::Full;
  EXPECT_EQ(error(o), "train: lora_layout is given with method full; it needs method lora");
  o = options("out");
  o.method = TrainOptions::Method::Full;
  o.loraplus_lr_ratio = 4;
  EXPECT_EQ(error(o), "train: loraplus_lr_ratio is given with method full; it needs method lora");
  o = options("out");
  o.device = TrainOptions::DeviceChoice::Cpu;
  o.tune = true;
  EXPECT_EQ(error(o), "train: tune needs a GPU; use device: cuda, or tune: false");
  o = options("out");
  o.model = path("nowhere");
  EXPECT_NE(error(o), "no error");
  o = options("out");
  auto vocab = nlohmann::json::parse(read("model/tokenizer.json"));
  auto pad = vocab["added_tokens"][0];
  pad["content"] = "<pad>";
  vocab["added_tokens"][0]["id"] = 96;
  vocab["added_tokens"].insert(vocab["added_tokens"].begin(), pad);
  write("model/tokenizer.json", vocab.dump());
  EXPECT_EQ(error(o),
            "data: the tokenizer gives id 96, but the model has 96 tokens; tokenizer.json and "
            "config.json do not belong together");
  write("model/tokenizer_config.json", "{}");
  EXPECT_EQ(error(o),
            "data: the tokenizer has no eos_token, which ends every example; set eos_token in "
            "tokenizer_config.json");
}

TEST_F(Finetune, AnInterruptBeforeTheFirstStepLeavesNoCheckpoint) {
  const volatile std::sig_atomic_t interrupt = 1;
  const TrainResult result = finetune(options("out"), {.interrupt = &interrupt});
  EXPECT_TRUE(result.interrupted);
  EXPECT_EQ(result.steps, 0);
  EXPECT_FALSE(fs::exists(path("out/adapter_model.safetensors")));
}

}  // namespace
}  // namespace graft
