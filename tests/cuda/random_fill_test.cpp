// Random weights made on the device against those that the CPU makes.
#include <gtest/gtest.h>

#include "bench/gpu_model.h"
#include "models/weights.h"
#include "tensor/random.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

class RandomFill : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
};

// Every number of two models, in their order. A last bit of the logarithm may move a BF16 to its
// neighbour, hardly ever: 2^-29 of the roundings of F64 to F32 differ, and 2^-16 of these show.
TEST_F(RandomFill, MakesTheModelThatTheCpuMakes) {
  ModelConfig config = ModelConfig::load("models/demo");
  config.num_hidden_layers = 1;
  for (DType dtype : {DType::F32, DType::BF16}) {
    struct Collect : Visitor {
      std::vector<std::pair<std::string, Tensor>> all;
      void parameter(const std::string& name, Variable& value) override {
        all.emplace_back(name, value.value().to(Device::CPU));
      }
    } cpu, gpu;
    random_model(config, dtype, 0x123456789, 0.5)->visit("", cpu);
    random_gpu_model(config, dtype, 0x123456789, 0.5)->visit("", gpu);
    ASSERT_EQ(cpu.all.size(), gpu.all.size());
    for (size_t i = 0; i < cpu.all.size(); ++i) {
      EXPECT_EQ(gpu.all[i].first, cpu.all[i].first);
      if (dtype == DType::BF16)
        expect_same_bytes(gpu.all[i].second, cpu.all[i].second, cpu.all[i].first);
      else
        expect_close(gpu.all[i].second, cpu.all[i].second, 1e-7, cpu.all[i].first);
    }
  }
}

// The last element of one piece and the first of the next, by the definition in tensor/random.h.
TEST_F(RandomFill, TakesAStreamForEachPiece) {
  Tensor y = Tensor::empty({kNormalPiece + 3}, DType::F32, Device::CUDA);
  cuda_fill_normal(y, 5, 9, 2.0);
  const std::vector<double> got = y.to_doubles();
  Random first(5, uint64_t(9) << 32), second(5, uint64_t(9) << 32 | 1);
  for (int64_t i = 0; i < kNormalPiece + 3; ++i) {
    const double expected = 2.0 * (i < kNormalPiece ? first : second).normal();
    if (i < 3 || i >= kNormalPiece - 3) {
      EXPECT_NEAR(got[size_t(i)], expected, 1e-6) << i;
    }
  }
}

}  // namespace
}  // namespace graft
