// NF4 weights and AdamW's state in 8 bits on the device, against the CPU.
#include "cuda/nf4.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "tensor/blockwise8.h"
#include "tensor/nf4.h"
#include "tests/nf4_values.h"
#include "tests/op_cases.h"
#include "tests/tiny_run.h"
#include "tests/tolerance.h"
#include "train/finetune.h"

#if defined(CUDA_EMU)
#include "cuda/emulator/emulator.h"
#endif

namespace graft {
namespace {

class Nf4OnCuda : public TinyRun {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
};

Tensor gemm(Backend& backend, const Tensor& a, const Tensor& weight, bool backward) {
  Tensor c = Tensor::empty({a.size(0), weight.size(backward ? 1 : 0)}, a.dtype(), a.device());
  const GemmTerm term{.a = a, .b = weight, .transpose_b = !backward};
  backend.gemm(c, {&term, 1});
  return c;
}

// Bit for bit: whole and ragged blocks, an odd number of elements, several groups of scales.
TEST_F(Nf4OnCuda, WidensToTheBytesOfTheCpu) {
  const Shape shapes[] = {{64, 64}, {5, 96}, {7, 33}, {1, 1}, {3, 100}, {130, 200}};
  for (size_t i = 0; i < std::size(shapes); ++i)
    for (const bool double_quant : {true, false}) {
      const Tensor dense = nf4_test_values(shapes[i].num_elements(), int64_t(i)).reshape(shapes[i]);
      const Tensor weight = nf4_quantise(dense, double_quant);
      const Tensor there = weight.to(Device::CUDA);
      for (const DType dtype : {DType::F32, DType::BF16})
        for (int rung = 1; rung <= kNf4Rungs; ++rung) {
          Tensor wide = Tensor::empty(shapes[i], dtype, Device::CUDA);
          launch_widen_nf4(rung, wide, there, static_cast<CudaBackend&>(cuda_backend()).stream());
          expect_same_bytes(wide.to(Device::CPU), weight.to(dtype),
                            concat("shape ", i, ", rung ", rung, ", ", dtype_name(dtype)));
        }
      const Tensor back = there.to(Device::CPU);
      ASSERT_EQ(back.num_bytes(), weight.num_bytes());
      EXPECT_EQ(std::memcmp(back.raw(), weight.raw(), size_t(weight.num_bytes())), 0);
    }
}

TEST_F(Nf4OnCuda, MultipliesAsTheWidenedWeightDoes) {
  for (const DType dtype : {DType::F32, DType::BF16})
    for (const bool backward : {false, true}) {
      const Tensor weight = nf4_quantise(random_tensor({72, 136}, DType::F32, 5, 0.1), true);
      const Tensor a = random_tensor({9, backward ? 72 : 136}, dtype, 6).to(Device::CUDA);
      expect_same_bytes(
          gemm(cuda_backend(), a, weight.to(Device::CUDA), backward).to(Device::CPU),
          gemm(cuda_backend(), a, weight.to(dtype).to(Device::CUDA), backward).to(Device::CPU),
          concat(dtype_name(dtype), backward ? " backward" : " forward"));
    }
}

// One for all weights, as large as the largest that has come here, whichever is used first.
TEST_F(Nf4OnCuda, HasOneScratch) {
  const auto weight = [](int64_t rows) {
    return nf4_quantise(random_tensor({rows, 640}, DType::F32, 1), true).to(Device::CUDA);
  };
  const Tensor small = weight(3), large = weight(500), middle = weight(100);
  const Tensor a = random_tensor({2, 640}, DType::BF16, 2).to(Device::CUDA);
  const auto scratch = [] {
    return allocator_of(Device::CUDA).stats().live[size_t(Scope::Scratch)];
  };
  gemm(cuda_backend(), a, small, false);
  const int64_t after_first = scratch();
  gemm(cuda_backend(), a, large, false);
  gemm(cuda_backend(), a, middle, false);
  EXPECT_EQ(scratch(), after_first);
}

// From the start of the golden trajectory: PEFT's losses, and the CPU's.
TEST_F(Nf4OnCuda, TrainsAsPeftOnBitsandbytes) {
#if defined(CUDA_EMU)
  if (emu::checks() != emu::Checks::kNone)
    GTEST_SKIP() << "forty steps for their numbers; this build's checks see NF4 in other tests";
#endif
  using Method = TrainOptions::Method;
  for (const auto& [name, method] : {std::pair{"qlora", Method::Qlora}, {"qdora", Method::Qdora}}) {
    SCOPED_TRACE(name);
    const std::string folder = concat("tests/golden/trajectories/", name);
    const auto golden = nlohmann::json::parse(std::ifstream(folder + "/golden.json"));
    TrainOptions o;
    o.model = golden["model"];
    o.method = method;
    o.adapter = folder + "/start";
    o.learning_rate = golden["recipe"]["learning_rate"];
    o.warmup_steps = golden["recipe"]["warmup_steps"];
    o.max_steps = golden["recipe"]["max_steps"];
    o.per_device_train_batch_size = int64_t(golden["batches"][0][0].size());
    o.gradient_accumulation_steps = int64_t(golden["batches"][0].size());
    o.shuffle = false;
    o.save_steps = 0;
    o.dtype = DType::F32;
    o.device = TrainOptions::DeviceChoice::Cuda;
    o.output_dir = path(name);
    TrainData data;
    for (const auto& step : golden["batches"])
      for (const auto& micro_batch : step)
        for (const auto& row : micro_batch)
          data.train.rows.push_back({row["input_ids"], row["labels"]});
    const TrainResult result = finetune(o, data);
    const std::vector<double> losses = golden["losses"];
    ASSERT_EQ(result.losses.size(), losses.size());
    for (size_t i = 0; i < losses.size(); ++i)
      EXPECT_NEAR(result.losses[i], losses[i], 1e-4 * losses[i]) << "loss of step " << i + 1;
  }
}

// Step by step from one state: a code that is the other of two neighbours moves the next step.
TEST_F(Nf4OnCuda, UpdatesInEightBitsAsTheReferenceDoes) {
  for (const int64_t n : {1, 255, 256, 1000, 5120}) {
    Tensor w = random_tensor({n}, DType::F32, 2);
    const auto state = [&] {
      return State8{Tensor::zeros({n}, DType::U8), Tensor::zeros({num_blocks8(n)}, DType::F32)};
    };
    State8 m = state(), v = state();
    for (int64_t step = 1; step <= 4; ++step) {
      const auto run = [&](Device device) {
        Backend& backend = device == Device::CUDA ? cuda_backend() : reference_backend();
        const auto copy = [&](const Tensor& t) { return t.clone().to(device); };
        const Tensor gradient = copy(random_tensor({n}, DType::F32, uint64_t(step), 0.3));
        const Tensor scale = copy(Tensor::from_floats({}, {step == 4 ? NAN : 0.7}, DType::F64));
        Tensor to = copy(w);
        State8 first{copy(m.codes), copy(m.absmax)}, second{copy(v.codes), copy(v.absmax)};
        backend.adamw_8bit(to, first, second, gradient, scale,
                           {1e-3, 0.9, 0.999, 1e-8, 0.01, step, 2, n % 2 == 0});
        std::vector<Tensor> all{to, first.codes, first.absmax, second.codes, second.absmax};
        for (Tensor& t : all) t = t.to(Device::CPU);
        return all;
      };
      const auto device = run(Device::CUDA), again = run(Device::CUDA), plain = run(Device::CPU);
      for (size_t i = 0; i < plain.size(); ++i) {
        const std::string what = concat("n ", n, ", step ", step, ", tensor ", i);
        expect_same_bytes(again[i], device[i], what);
        if (plain[i].dtype() != DType::U8) {
          expect_close(device[i], plain[i], 1e-6, what);
          continue;
        }
        int64_t different = 0;
        for (int64_t k = 0; k < n; ++k) {
          const int a = device[i].data<uint8_t>()[k], b = plain[i].data<uint8_t>()[k];
          EXPECT_LE(std::abs(a - b), 1) << what << ", element " << k;
          different += a != b;
        }
        EXPECT_LE(different, n / 1000) << what;
      }
      w = plain[0];
      m = {plain[1], plain[2]};
      v = {plain[3], plain[4]};
    }
  }
}

}  // namespace
}  // namespace graft
