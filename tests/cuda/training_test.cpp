// graft train on the device: what a step costs beside its kernels, steps as graphs, and what is
// said when memory is out.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <functional>

#include "cuda/blas.h"
#include "cuda/cuda_backend.h"
#include "tests/tiny_run.h"
#include "train/finetune.h"
#include "train/step_graphs.h"

#if defined(CUDA_EMU)
#include "cuda/emulator/emulator.h"
#endif

namespace graft {
namespace {

namespace fs = std::filesystem;

// A variable of the environment, for as long as it lives.
class Environment {
 public:
  Environment(const char* name, const std::string& value) : name_(name) {
    setenv(name, value.c_str(), 1);
  }
  ~Environment() { unsetenv(name_); }

 private:
  const char* name_;
};

class CudaTraining : public TinyRun {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
    cuda_backend();  // its own buffers exist from here on
  }

  TrainOptions options(const std::string& output_dir, int64_t steps) {
    TrainOptions o;
    o.model = model();
    o.lora.base_model_name_or_path = "tiny";
    o.output_dir = path(output_dir);
    o.device = TrainOptions::DeviceChoice::Cuda;
    o.learning_rate = 1e-2;
    o.weight_decay = 0.1;
    o.gradient_accumulation_steps = 2;
    o.shuffle = false;
    o.max_steps = steps;
    o.save_steps = 0;
    o.lora.r = 4;
    o.lora.lora_dropout = 0.3;
    return o;
  }

  // Of a run with graphs; a checker sees in five all that it can.
  static int64_t steps() {
#if defined(CUDA_EMU)
    if (emu::checks() != emu::Checks::kNone) return 5;
#endif
    return 7;
  }

  // Rows of these lengths, all different; the first token that is predicted is the third.
  static Dataset rows(const std::vector<int>& lengths) {
    Dataset data;
    for (size_t r = 0; r < lengths.size(); ++r) {
      Row row;
      for (int t = 0; t < lengths[r]; ++t) {
        row.ids.push_back(int32_t(3 + (t * 7 + int(r) * 13) % 90));
        row.labels.push_back(t < 2 ? -100 : row.ids.back());
      }
      data.rows.push_back(row);
    }
    return data;
  }

  // Graphs or none: the same losses, norms and bytes of the adapter, with an evaluation between.
  void expect_same_with_graphs(TrainOptions o, const std::string& file) {
    // Two steps of one signature and one of another, over and over: S T S | S T S | ...
    const TrainData data{rows({5, 9, 7, 3, 5, 9}), rows({4, 6})};
    o.eval_steps = 4;
    const auto into = [&](const std::string& output_dir) {
      o.output_dir = path(output_dir);
      if (!plan_.empty()) write(output_dir + "/gemm_plan.json", plan_);
    };
    into("plain");
    const TrainResult plain = finetune(o, data);
    into("graphs");
    o.cuda_graph = true;
#if defined(CUDA_EMU)
    const uint64_t launches = emu::stats().graph_launches;
#endif
    const TrainResult graphs = finetune(o, data);
#if defined(CUDA_EMU)
    // S and T plainly, S and T captured, and then replays.
    EXPECT_EQ(emu::stats().graph_launches - launches, uint64_t(o.max_steps) - 2);
#endif
    EXPECT_EQ(graphs.losses, plain.losses);
    EXPECT_EQ(graphs.grad_norms, plain.grad_norms);
    EXPECT_EQ(graphs.last_eval_loss, plain.last_eval_loss);
    EXPECT_NE(plain.losses[0], plain.losses[3]);
    EXPECT_EQ(read("graphs/" + file), read("plain/" + file));
    EXPECT_GT(read("plain/" + file).size(), 1000u);
  }
  std::string plan_;  // of products, that both find in their folders
};

TEST_F(CudaTraining, GraphsGiveTheSameBytes) {
  expect_same_with_graphs(options("", steps()), "adapter_model.safetensors");
}

TEST_F(CudaTraining, GraphsGiveTheSameBytesInBf16WithCheckpointing) {
  TrainOptions o = options("", steps());
  o.dtype = DType::BF16;
  o.gradient_checkpointing = true;
  expect_same_with_graphs(o, "adapter_model.safetensors");
}

// The norms are renewed inside of the captured step.
TEST_F(CudaTraining, GraphsGiveTheSameBytesWithDora) {
  TrainOptions o = options("", steps());
  o.method = TrainOptions::Method::Dora;
  expect_same_with_graphs(o, "adapter_model.safetensors");
}

// Vectors in F32 and matrices in BF16 with a master copy, which each replay brings up to date.
TEST_F(CudaTraining, GraphsGiveTheSameBytesWithBiasesAndWholeModules) {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    TrainOptions o = options("", 5);
    o.dtype = dtype;
    o.model = "tests/golden/models/llama_bias";
    o.lora.bias = LoraConfig::Bias::All;
    o.lora.modules_to_save = {"lm_head", "embed_tokens", "norm"};
    expect_same_with_graphs(o, "adapter_model.safetensors");
    fs::remove_all(path("plain"));
    fs::remove_all(path("graphs"));
  }
}

// The head's adapter works inside of the loss, chunk by chunk; rows of tokens are copied into the
// embedding and the tied head.
TEST_F(CudaTraining, GraphsGiveTheSameBytesWithAdaptersOfEmbeddingHeadAndTokens) {
  for (const bool tokens : {false, true}) {
    TrainOptions o = options("", 5);
    o.dtype = tokens ? DType::F32 : DType::BF16;
    o.lora.target_modules = {"v_proj"};
    if (tokens)
      o.lora.trainable_token_indices = {3, 10, 17, 24};
    else
      o.lora.target_modules.insert(o.lora.target_modules.end(), {"embed_tokens", "lm_head"});
    expect_same_with_graphs(o, "adapter_model.safetensors");
    fs::remove_all(path("plain"));
    fs::remove_all(path("graphs"));
  }
}

// Two rates in one captured step, both of which the schedule moves.
TEST_F(CudaTraining, GraphsGiveTheSameBytesWithLoraPlus) {
  TrainOptions o = options("", steps());
  o.loraplus_lr_ratio = 4;
  o.learning_rate = 2e-3;
  expect_same_with_graphs(o, "adapter_model.safetensors");
}

TEST_F(CudaTraining, GraphsGiveTheSameBytesWithNf4WeightsAndStateIn8Bits) {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    TrainOptions o = options("", 5);
    o.method = dtype == DType::F32 ? TrainOptions::Method::Qlora : TrainOptions::Method::Qdora;
    o.optim = TrainOptions::Optimizer::AdamW8bit;
    o.loraplus_lr_ratio = 2;
    o.dtype = dtype;
    // At rank 128 all leaves are large enough for 8 bits, at 88 lora_B (of 48 rows). DoRA's norms
    // at the higher one take a minute when emulated.
    const bool dora = o.method == TrainOptions::Method::Qdora;
    o.lora.r = dora ? 88 : 128;
    o.lora.target_modules = {"up_proj"};
    if (!dora) o.lora.target_modules.push_back("v_proj");
    o.lora.layers_to_transform = {1};
    expect_same_with_graphs(o, "adapter_model.safetensors");
    std::filesystem::remove_all(path("plain"));
    std::filesystem::remove_all(path("graphs"));
  }
}

TEST_F(CudaTraining, GraphsGiveTheSameBytesForAllWeights) {
  TrainOptions o = options("", steps());
  o.method = TrainOptions::Method::Full;
  expect_same_with_graphs(o, "model.safetensors");
}

TEST_F(CudaTraining, GraphsGiveTheSameBytesForMergedProducts) {
  TrainOptions o = options("", steps());
  o.lora_layout = LoraLayout::Merged;
  expect_same_with_graphs(o, "adapter_model.safetensors");
}

// The borders are written anew within the step that is captured.
TEST_F(CudaTraining, GraphsGiveTheSameBytesForBorderedProductsWithCheckpointing) {
  TrainOptions o = options("", steps());
  o.lora_layout = LoraLayout::Bordered;
  o.lora.lora_dropout = 0;
  o.dtype = DType::BF16;
  o.gradient_checkpointing = true;
  expect_same_with_graphs(o, "adapter_model.safetensors");
}

TEST_F(CudaTraining, GraphsGiveTheSameBytesForBatchesOfRowsOfUnequalLength) {
  TrainOptions o = options("", 4);  // {5, 9 | 7, 3}, {5, 9} and again
  o.per_device_train_batch_size = 2;
  expect_same_with_graphs(o, "adapter_model.safetensors");
}

// Products are timed in the steps that are not captured, and every shape comes in one of those; so
// nothing is left to be timed in the runs that find the plan.
TEST_F(CudaTraining, GraphsGiveTheSameBytesByATunedPlan) {
  if (!cublas_lt_functions()) GTEST_SKIP() << "there is no cublasLt";
  TrainOptions o = options("tuned", 7);
  o.lora_layout = LoraLayout::Bordered;
  o.lora.lora_dropout = 0;
  o.tune = true;
  o.cuda_graph = true;
  finetune(o, {rows({5, 9, 7, 3, 5, 9}), rows({4, 6})});
  plan_ = read("tuned/gemm_plan.json");
  ASSERT_GT(nlohmann::json::parse(plan_)["products"].size(), 20u);
  o.cuda_graph = false;
  expect_same_with_graphs(o, "adapter_model.safetensors");
  for (const char* name : {"plain", "graphs"}) {
    EXPECT_EQ(read(name + std::string("/gemm_plan.json")), plan_) << name;
    EXPECT_EQ(read(name + std::string("/adapter_model.safetensors")),
              read("tuned/adapter_model.safetensors"))
        << name;
  }
}

TEST_F(CudaTraining, AResumedRunWithGraphsEndsWithTheBytesOfAnUnbrokenOneWithout) {
  const TrainData data{rows({5, 9, 7, 3, 5, 9}), {}};
  finetune(options("plain", 7), data);
  TrainOptions o = options("graphs", 7);
  o.cuda_graph = true;
  o.save_steps = 2;
  finetune(o, data);
  // As if it had died in step 4. What is left is S | S T S | S: the second S is captured.
  for (const char* name : {"adapter_model.safetensors", "checkpoint-4", "checkpoint-6"})
    ASSERT_GT(fs::remove_all(path("graphs/" + std::string(name))), 0u) << name;
  o.resume = true;
#if defined(CUDA_EMU)
  const uint64_t launches = emu::stats().graph_launches;
#endif
  EXPECT_EQ(finetune(o, data).losses.size(), 5u);
#if defined(CUDA_EMU)
  EXPECT_EQ(emu::stats().graph_launches - launches, 3u);
#endif
  EXPECT_EQ(read("graphs/adapter_model.safetensors"), read("plain/adapter_model.safetensors"));
}

#if defined(CUDA_EMU)

// What a run of so many steps asked of the device and its runtime.
struct Costs {
  uint64_t waits, pageable_copies, allocations;
  int64_t system_calls;
};

class CudaStepCosts : public CudaTraining {
 protected:
  Costs run(const std::vector<int>& lengths, int64_t steps, bool cuda_graph) {
    TrainOptions o = options("run" + std::to_string(++runs_), steps);
    o.cuda_graph = cuda_graph;
    o.method = method_;
    allocator_of(Device::CUDA).release_cached();
    const emu::Stats before = emu::stats();
    const int64_t calls = allocator_of(Device::CUDA).stats().system_calls;
    finetune(o, {rows(lengths), {}});
    const emu::Stats& after = emu::stats();
    return {after.synchronisations - before.synchronisations,
            after.pageable_copies - before.pageable_copies, after.allocations - before.allocations,
            allocator_of(Device::CUDA).stats().system_calls - calls};
  }
  int runs_ = 0;
  TrainOptions::Method method_ = TrainOptions::Method::Lora;
};

TEST_F(CudaStepCosts, AStepWaitsOnceAndAfterTheFirstAllocatesNothing) {
  const Environment cached("EMU_CACHED", "1");
  const std::vector<int> lengths(4, 6);
  run(lengths, 1, false);  // pinned memory is there from now on
  const Costs one = run(lengths, 1, false), three = run(lengths, 3, false);
  EXPECT_EQ(three.waits - one.waits, 2u);
  EXPECT_EQ(three.pageable_copies, one.pageable_copies);
  EXPECT_EQ(three.allocations, one.allocations);
  EXPECT_EQ(three.system_calls, one.system_calls);
  EXPECT_GT(one.system_calls, 0);
}

TEST_F(CudaStepCosts, ADoraStepWaitsOnceToo) {
  const Environment cached("EMU_CACHED", "1");
  method_ = TrainOptions::Method::Dora;
  const std::vector<int> lengths(4, 6);
  run(lengths, 1, false);
  const Costs one = run(lengths, 1, false), three = run(lengths, 3, false);
  EXPECT_EQ(three.waits - one.waits, 2u);
  EXPECT_EQ(three.pageable_copies, one.pageable_copies);
  EXPECT_EQ(three.allocations, one.allocations);
  EXPECT_EQ(three.system_calls, one.system_calls);
}

TEST_F(CudaStepCosts, RaggedRowsAllocateNothingOnceEverySizeWasSeen) {
  const Environment cached("EMU_CACHED", "1");
  const std::vector<int> lengths{3, 17, 9, 30, 12, 5};  // three steps
  run(lengths, 1, false);
  EXPECT_EQ(run(lengths, 8, false).system_calls, run(lengths, 3, false).system_calls);
}

TEST_F(CudaStepCosts, AReplayedStepAllocatesNothingAndWaitsOnce) {
  const std::vector<int> lengths{6, 6, 4, 8};  // two steps of two signatures
  run(lengths, 4, true);                       // what a process allocates once is there from now on
  const Costs captured = run(lengths, 4, true), replayed = run(lengths, 7, true);
  EXPECT_EQ(replayed.waits - captured.waits, 3u);
  EXPECT_EQ(replayed.pageable_copies, captured.pageable_copies);
  EXPECT_EQ(replayed.allocations, captured.allocations);
  EXPECT_EQ(replayed.system_calls, captured.system_calls);
}

class CudaMemory : public CudaTraining {
 public:
  static int64_t used_mib() {
    return (allocator_of(Device::CUDA).stats().reserved + (1 << 20) - 1) >> 20;
  }

 protected:
  // What is said where the device has so many MiB beyond those in use.
  std::string error(const TrainOptions& o, const TrainData& data, int64_t spare_mib) {
    allocator_of(Device::CUDA).release_cached();
    const Environment limit("EMU_MEMORY_MB", std::to_string(used_mib() + spare_mib));
    try {
      finetune(o, data);
    } catch (const OutOfMemory& error) {
      return error.what();
    }
    return "no error";
  }
};

TEST_F(CudaMemory, AStepWithoutRoomNamesTheTotalsAndWhatToChange) {
  const TrainOptions o = options("new/out", 1);
  const int64_t live = allocator_of(Device::CUDA).stats().live_total;
  const std::string what = error(o, {rows({3000}), {}}, 2);
  for (const char* part : {"out of memory: ", "the GPU, of ", "  weights: ", "  adapters: ",
                           "  optimizer: ", "  activations: ", "  total: ", "max_seq_length",
                           "gradient_checkpointing", "dtype: bfloat16"})
    EXPECT_NE(what.find(part), std::string::npos) << part << " is not in\n" << what;
  EXPECT_FALSE(fs::exists(path("new")));
  EXPECT_EQ(allocator_of(Device::CUDA).stats().live_total, live);
  // And the same with more room.
  EXPECT_EQ(finetune(o, {rows({30}), {}}).steps, 1);
}

// So that the same command can be given again with more room.
TEST_F(CudaMemory, ARunThatHasNoCheckpointLeavesNothingBehind) {
  TrainOptions o = options("new/out/", 3);
  o.eval_steps = 4;
  o.tune = cublas_lt_functions() != nullptr;  // a plan is written before memory is out
  const TrainData in_evaluation{rows({4, 4}), rows({3000})},
      in_second_step{rows({4, 4, 3000, 3000}), {}};
  for (const TrainData* data : {&in_evaluation, &in_second_step}) {
    EXPECT_EQ(error(o, *data, 2).rfind("out of memory: ", 0), 0u);
    EXPECT_FALSE(fs::exists(path("new")));
  }
  write("new/notes.txt", "somebody else's");
  error(o, in_second_step, 2);
  EXPECT_EQ(read("new/notes.txt"), "somebody else's");
  EXPECT_FALSE(fs::exists(path("new/out")));
  o.save_steps = 1;
  error(o, in_second_step, 2);
  for (const char* name : {"checkpoint-1", "metrics.jsonl", "train_config.yaml"})
    EXPECT_TRUE(fs::exists(path(concat("new/out/", name)))) << name;
}

TEST_F(CudaMemory, WhatIsTrainedWithoutRoomAsksForALowerRank) {
  TrainOptions o = options("out", 1);
  o.lora.r = 2048;
  const std::string what = error(o, {rows({5}), {}}, 1);
  for (const char* part : {" more for adapters; ", "lower r", "target_modules", "adamw_8bit"})
    EXPECT_NE(what.find(part), std::string::npos) << part << " is not in\n" << what;
}

TEST_F(CudaMemory, WeightsWithoutRoomAskForASmallerModel) {
  const TrainOptions o = options("out", 1);
  const std::string what = error(o, {rows({30}), {}}, -1);
  EXPECT_NE(what.find("the weights do not fit"), std::string::npos) << what;
  EXPECT_FALSE(fs::exists(o.output_dir));
}

// Steps that do no more than fill a tensor, of as many MiB as the step has tokens.
class CudaStepGraphs : public CudaTraining {
 protected:
  void run(int tokens) {
    Dataset data = rows({tokens});
    data.rows[0].ids[0] = int32_t(++step_);
    graphs_.run(
        step_inputs(data, {{0}}, 96), {1e-3, 0.9, 0.999, 1e-8, 0, step_},
        {.step =
             [&](const StepInputs& here) {
               Tensor bytes = Tensor::empty({here.num_tokens << 20}, DType::U8, Device::CUDA);
               backend_of(bytes).fill(bytes, 0);
               backend_of(first_id_).copy(first_id_, here.batches[0].input_ids.slice_rows(0, 1));
               if (also_) also_(bytes);
             },
         .publish =
             [&] {
               if (publish_) publish_();
             }});
    EXPECT_EQ(first_id_.item(), step_);  // this step's inputs, also in a replay
  }
  void expect_counts(int64_t plain, int64_t captured, int64_t replayed) const {
    EXPECT_EQ(graphs_.counts().plain, plain);
    EXPECT_EQ(graphs_.counts().captured, captured);
    EXPECT_EQ(graphs_.counts().replayed, replayed);
  }

  void SetUp() override {
    CudaTraining::SetUp();
    first_id_ = Tensor::zeros({1}, DType::I32, Device::CUDA);
  }
  void TearDown() override { kept_ = Tensor(); }

  StepGraphs graphs_;
  Tensor first_id_, kept_;
  std::function<void(Tensor&)> also_;
  std::function<void()> publish_;
  int64_t step_ = 0;
};

TEST_F(CudaStepGraphs, KeepTheLastEightSignatures) {
  for (int round = 0; round < 2; ++round)
    for (int tokens = 3; tokens < 12; ++tokens) run(tokens);  // nine
  expect_counts(9, 9, 0);
  run(11);
  run(4);
  expect_counts(9, 9, 2);
  run(3);  // the one that had to go
  run(5);  // went for it: 11 and 4 were used since
  run(4);
  expect_counts(9, 11, 3);
}

// The blocks of the pool are of no use to a larger step; the graphs that keep them are given up.
TEST_F(CudaStepGraphs, MakeRoomForAStepThatNeedsIt) {
  const Environment limit("EMU_MEMORY_MB", std::to_string(CudaMemory::used_mib() + 12));
  for (int i = 0; i < 3; ++i) run(7);
  expect_counts(1, 1, 1);
  run(9);
  expect_counts(2, 1, 1);
  run(7);  // to be captured, but the 9 MiB lie in the pool now
  expect_counts(3, 1, 1);
  run(7);
  expect_counts(3, 2, 1);
  EXPECT_THROW(run(20), OutOfMemory);
}

TEST_F(CudaStepGraphs, MakeRoomForAnEvaluation) {
  const Environment limit("EMU_MEMORY_MB", std::to_string(CudaMemory::used_mib() + 12));
  for (int i = 0; i < 3; ++i) run(7);
  double sum = -1;
  const auto evaluate = [&](int64_t mib) {
    Tensor values = Tensor::empty({mib << 18}, DType::F32, Device::CUDA);
    backend_of(values).fill(values, 3);
    sum = values.slice_rows(0, 1).item();
  };
  graphs_.run_beside([&] { evaluate(9); });
  EXPECT_EQ(sum, 3);
  EXPECT_THROW(graphs_.run_beside([&] { evaluate(20); }), OutOfMemory);
  for (int i = 0; i < 2; ++i) run(7);  // the graph was given up
  expect_counts(1, 2, 2);
}

// AdamW has moved the values when what follows from them (DoRA's norms) finds no memory: a second
// AdamW would be a wrong step, and nobody would see it.
TEST_F(CudaStepGraphs, DoNotRepeatAStepWhoseValuesHaveMoved) {
  Tensor value = Tensor::zeros({1}, DType::F64, Device::CUDA);
  const Tensor one = Tensor::from_floats({1}, {1}, DType::F32).to(Device::CUDA);
  int published = 0;
  also_ = [&](Tensor&) { backend_of(value).add_sum(value, one, 1); };
  publish_ = [&] {
    if (++published == 1) throw OutOfMemory("none is left");
  };
  run(4);
  EXPECT_EQ(value.item(), 1);
  EXPECT_EQ(published, 2);
  published = 0;  // in a capture nothing has been done yet
  run(4);
  EXPECT_EQ(value.item(), 2);
  EXPECT_EQ(published, 2);
  expect_counts(2, 0, 0);
}

TEST_F(CudaStepGraphs, RefuseAStepThatLeavesSomethingInThePool) {
  run(4);
  also_ = [&](Tensor& bytes) { kept_ = bytes; };
  EXPECT_THROW(run(4), Error);
}

// It would read the bytes of the capture in every launch.
TEST_F(CudaStepGraphs, RefuseAStepThatCopiesFromOrToTheHost) {
  const Tensor host = Tensor::zeros({4}, DType::F32);
  also_ = [&](Tensor&) { host.to(Device::CUDA); };
  run(4);
  EXPECT_THROW(run(4), Error);
  also_ = [&](Tensor& bytes) { bytes.slice_rows(0, 1).to(Device::CPU); };
  EXPECT_THROW(run(4), Error);
  also_ = nullptr;  // and the stream is as before
  run(4);
  run(4);
  expect_counts(1, 1, 1);
}

TEST_F(CudaTraining, TheBinarySaysSoAndEndsWithOne) {
  const std::string graft = fs::absolute("build/emu/fast/graft");
  if (!fs::exists(graft)) GTEST_SKIP() << "build/emu/fast/graft is not built";
  write_data("data.jsonl", 4);
  // Room for cuBLAS's workspace and nothing else.
  const Outcome outcome = shell("unset GRAFT_CUBLAS; EMU_MEMORY_MB=4 " + graft +
                                " train --model model --data data.jsonl --device cuda "
                                "--output-dir out");
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(outcome.err.rfind("graft: error: out of memory: ", 0), 0u) << outcome.err;
  EXPECT_NE(outcome.err.find("\n  weights: "), std::string::npos) << outcome.err;
  EXPECT_FALSE(fs::exists(path("out")));
}

#endif

}  // namespace
}  // namespace graft
