// Decoding of the bundled model on the device: the ids of the CPU, and no more waiting for the
// device than one id a token.
#include "models/generate.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/cuda_backend.h"
#include "models/tokenizer.h"
#include "models/weights.h"
#include "tensor/backend.h"
#include "tests/tolerance.h"
#if defined(CUDA_EMU)
#include "cuda/emulator/emulator.h"
#endif

namespace graft {
namespace {

const std::string kModel = "models/demo";
using Ids = std::vector<int32_t>;

class DeviceGenerate : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
    config_.do_sample = false;
    config_.max_new_tokens = 16;
  }
  Ids prompt() const {
    return Tokenizer::load(kModel)
        .encode("Tara, a baker from Delhi, bought a clock.\nWhich city?")
        .ids;
  }
  GenerationConfig config_;
};

TEST_F(DeviceGenerate, GreedyIdsAreThoseOfTheCpu) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    const auto cpu = load_model(kModel, dtype), device = load_model(kModel, dtype, Device::CUDA);
    const Ids expected = generate(*cpu, prompt(), config_);
    ASSERT_EQ(expected.size(), 16u);
    EXPECT_EQ(generate(*device, prompt(), config_), expected) << dtype_name(dtype);
  }
}

// Sampling, and a penalty, want the whole row of logits.
TEST_F(DeviceGenerate, SampledIdsAreThoseOfTheCpu) {
  const auto cpu = load_model(kModel, DType::F32);
  const auto device = load_model(kModel, DType::F32, Device::CUDA);
  config_.repetition_penalty = 1.3;
  EXPECT_EQ(generate(*device, prompt(), config_), generate(*cpu, prompt(), config_));
  config_.do_sample = true;
  config_.seed = 4;
  EXPECT_EQ(generate(*device, prompt(), config_), generate(*cpu, prompt(), config_));
}

TEST_F(DeviceGenerate, HiddenStatesAreThoseOfTheCpuAtEveryStep) {
  const auto cpu = load_model(kModel, DType::F32);
  const auto device = load_model(kModel, DType::F32, Device::CUDA);
  KvCache cpu_cache = cpu->make_cache(80), device_cache = device->make_cache(80);
  Ids next = prompt();
  for (int step = 0; step < 3; ++step) {
    const Tensor expected = cpu->forward_cached(next, cpu_cache);
    expect_close(device->forward_cached(next, device_cache).to(Device::CPU), expected, 1e-4,
                 concat("step ", step));
    next = {int32_t(7 + step)};
  }
}

#if defined(CUDA_EMU)
// Ids and positions go up from pinned memory, and nothing is waited for before the next id.
TEST_F(DeviceGenerate, AStepWaitsForOneIdAlone) {
  const auto model = load_model(kModel, DType::BF16, Device::CUDA);
  const Tensor id = Tensor::zeros({1}, DType::I32, Device::CUDA);
  const uint64_t before = emu::stats().synchronisations;
  id.to(Device::CPU);
  const uint64_t of_one_id = emu::stats().synchronisations - before;
  std::vector<emu::Stats> after;
  generate(*model, prompt(), config_, [&](int32_t) {
    after.push_back(emu::stats());
    return after.size() < 4;
  });
  for (size_t i = 2; i < after.size(); ++i) {
    EXPECT_EQ(after[i].synchronisations - after[i - 1].synchronisations, of_one_id) << "step " << i;
    EXPECT_EQ(after[i].pageable_copies, after[i - 1].pageable_copies) << "step " << i;
    EXPECT_GT(after[i].launches - after[i - 1].launches, 10u);
  }
}
#endif

}  // namespace
}  // namespace graft
