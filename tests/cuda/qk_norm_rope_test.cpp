// RMSNorm of heads and their rotation in one pass, on the device against the reference backend.
// Tolerances as in small_kernels_test.cpp.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "tensor/random.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

constexpr double kEps = 1e-5;
constexpr int64_t kPositions = 19;

// (tokens, heads, D), or the same as columns of a wider product, `gap` elements more to a row.
struct Inputs {
  Tensor x, dy, weight, table, positions;
  Inputs(int64_t tokens, int64_t heads, int64_t head_dim, int64_t gap, DType dtype,
         DType weight_dtype, Device device) {
    Random random(7);
    const auto tensor = [&](Shape shape, DType type) {
      std::vector<double> values(size_t(shape.num_elements()));
      for (double& value : values) value = random.normal();
      return Tensor::from_floats(shape, values, type).to(device);
    };
    const auto heads_of = [&] {
      if (gap == 0) return tensor({tokens, heads, head_dim}, dtype);
      return tensor({tokens, heads * head_dim + gap}, dtype)
          .slice_cols(gap, heads * head_dim + gap);
    };
    x = heads_of();
    dy = heads_of();
    weight = tensor({head_dim}, weight_dtype);
    table = tensor({kPositions, head_dim}, DType::F32);
    std::vector<int32_t> at(static_cast<size_t>(tokens));
    for (int32_t& position : at) position = int32_t(random.below(kPositions));
    positions = Tensor::from_ints({tokens}, at);
  }
};

Tensor like(const Tensor& t) { return Tensor::empty(t.shape(), t.dtype(), t.device()); }

// y, rstd, dx, dweight; y and dx in place; then y and dx without a norm.
std::vector<Tensor> outputs_of(Backend& backend, const Inputs& in, bool with_dweight) {
  const int64_t rows = in.x.num_elements() / in.table.size(1);
  Tensor y = like(in.x), over = in.x.clone(), dx = like(in.x), over_dx = in.dy.clone();
  Tensor turned = like(in.x), turned_back = like(in.x), none;
  Tensor rstd = Tensor::empty({rows}, DType::F32, in.x.device()), again = like(rstd);
  Tensor dweight = Tensor::zeros(in.weight.shape(), DType::F32, in.x.device());
  const auto forward = [&](Tensor& to, Tensor& statistic, const Tensor& x, const Tensor& weight) {
    backend.qk_norm_rope_forward(to, statistic, x, weight, kEps, in.positions, in.table);
  };
  forward(y, rstd, in.x, in.weight);
  forward(over, again, over, in.weight);
  forward(turned, none, in.x, none);
  const auto backward = [&](Tensor& to, Tensor& dw, const Tensor& dy, const Tensor& weight) {
    backend.qk_norm_rope_backward(to, dw, dy, in.x, weight, rstd, in.positions, in.table);
  };
  backward(dx, with_dweight ? dweight : none, in.dy, in.weight);
  backward(over_dx, none, over_dx, in.weight);
  backward(turned_back, none, in.dy, none);
  std::vector<Tensor> outputs = {y, rstd, dx, dweight, over, over_dx, turned, turned_back};
  for (Tensor& output : outputs) output = output.to(Device::CPU);
  return outputs;
}

class QkNormRopeOnDevice : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
  void check(int64_t tokens, int64_t heads, int64_t head_dim, int64_t gap, DType dtype,
             DType weight_dtype, bool with_dweight) {
    const auto run = [&](Device device, bool positions_on_device) {
      Inputs in(tokens, heads, head_dim, gap, dtype, weight_dtype, device);
      if (positions_on_device) in.positions = in.positions.to(device);
      return outputs_of(device == Device::CUDA ? cuda_backend() : reference_backend(), in,
                        with_dweight);
    };
    const auto expected = run(Device::CPU, false), actual = run(Device::CUDA, false);
    const auto again = run(Device::CUDA, true);
    for (size_t i = 0; i < expected.size(); ++i) {
      const std::string name = concat("(", tokens, ", ", heads, ", ", head_dim, ") gap ", gap, " ",
                                      dtype_name(dtype), " output ", i);
      expect_close(actual[i], expected[i], dtype == DType::BF16 ? 1.0 / 128 : 1e-5, name);
      expect_same_bytes(again[i], actual[i], name);
    }
  }
};

// A gap of 8 leaves 16-byte loads possible, 3 does not.
TEST_F(QkNormRopeOnDevice, AgreesWithTheReferenceInEveryLayout) {
  for (int64_t head_dim : {2, 6, 16, 64, 128, 256})
    for (DType dtype : {DType::F32, DType::BF16})
      for (int64_t gap : {0, 3, 8}) check(5, 3, head_dim, gap, dtype, dtype, true);
}

TEST_F(QkNormRopeOnDevice, TakesWeightsOfEveryFloatType) {
  for (DType dtype : {DType::F32, DType::BF16})
    for (DType weight : {DType::F32, DType::BF16, DType::F16})
      check(3, 2, 64, 0, dtype, weight, true);
}

TEST_F(QkNormRopeOnDevice, TakesAnyNumberOfHeads) {
  for (int64_t tokens : {0, 1, 37})
    for (int64_t heads : {1, 14}) check(tokens, heads, 64, 0, DType::BF16, DType::BF16, true);
  check(1, 1, 1026, 0, DType::F32, DType::F32, true);
}

TEST_F(QkNormRopeOnDevice, RefusesAPositionOutsideTheTable) {
  Inputs in(2, 1, 8, 0, DType::F32, DType::F32, Device::CUDA);
  in.positions.data<int32_t>()[1] = kPositions;
  EXPECT_THROW(outputs_of(cuda_backend(), in, false), Error);
  in.positions = in.positions.to(Device::CUDA);  // the device answers with NaN
  const auto outputs = outputs_of(cuda_backend(), in, false);
  for (size_t i : {0, 2})
    for (double value : outputs[i].slice_rows(1, 2).to_doubles()) EXPECT_TRUE(std::isnan(value));
}

}  // namespace
}  // namespace graft
