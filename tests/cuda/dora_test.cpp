// DoRA on the device beyond the rows of op_cases.cpp: the norms of many layers, sums over many
// chunks of rows.
#include <gtest/gtest.h>

#include <cmath>

#include "cuda/cuda_backend.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

class DoraOnDevice : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
};

DoraNorm random_layer(int64_t N, int64_t K, int64_t r, DType dtype, uint64_t seed) {
  DoraNorm layer;
  layer.weight = random_tensor({N, K}, dtype, seed, 0.1);
  layer.a = random_tensor({r, K}, DType::F32, seed + 1, 0.1);
  layer.b = random_tensor({N, r}, DType::F32, seed + 2, 0.3);
  layer.scaling = 1.5;
  layer.squares = Tensor::zeros({N}, DType::F32);
  layer.norm = Tensor::zeros({N}, DType::F32);
  return layer;
}

DoraNorm on_device(const DoraNorm& layer) {
  DoraNorm there{layer.norm.to(Device::CUDA),   layer.squares.to(Device::CUDA),
                 layer.weight.to(Device::CUDA), layer.a.to(Device::CUDA),
                 layer.b.to(Device::CUDA),      layer.scaling};
  cuda_backend().row_squares(there.squares, there.weight);
  return there;
}

// More layers than one round of launches takes, of unlike sizes; the reference makes W + s B A.
TEST_F(DoraOnDevice, NormsAreThoseOfTheDenseMatrix) {
  for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
    std::vector<DoraNorm> here, there;
    const int64_t ranks[] = {1, 3, 8, 16, 21};
    for (int i = 0; i < 50; ++i) {
      const bool large = i == 3 || i == 49;
      here.push_back(random_layer(large ? 300 : 5 + i % 7, large ? 97 : 33 + i % 3, ranks[i % 5],
                                  dtype, uint64_t(10 * i)));
      there.push_back(on_device(here.back()));
    }
    cuda_backend().dora_norms(there);
    reference_backend().dora_norms(here);
    for (size_t i = 0; i < here.size(); ++i) {
      const auto expected = here[i].norm.to_doubles(), actual = there[i].norm.to_doubles();
      for (size_t n = 0; n < expected.size(); ++n)
        EXPECT_NEAR(actual[n], expected[n], 2e-5 * expected[n])
            << dtype_name(dtype) << ", layer " << i << ", row " << n;
    }
  }
}

TEST_F(DoraOnDevice, NormsOfRowsThatCancelAreNeverNaN) {
  DoraNorm layer = random_layer(40, 64, 1, DType::F32, 1);
  layer.scaling = 1;
  const GemmTerm term{.a = layer.b, .b = layer.a, .alpha = -1};
  cpu_backend().gemm(layer.weight, {&term, 1});
  const DoraNorm there = on_device(layer);
  cuda_backend().dora_norms({&there, 1});
  for (const double norm : there.norm.to_doubles()) {
    EXPECT_GE(norm, 0);
    EXPECT_LT(norm, 1e-2);
  }
}

TEST_F(DoraOnDevice, SquaresTakeStridedRows) {
  const Tensor whole = random_tensor({9, 80}, DType::BF16, 1);
  Tensor expected = Tensor::zeros({9}, DType::F32), actual = expected.to(Device::CUDA);
  reference_backend().row_squares(expected, whole.slice_cols(8, 75));
  cuda_backend().row_squares(actual, whole.to(Device::CUDA).slice_cols(8, 75));
  expect_close(actual.to(Device::CPU), expected, tolerance_of(DType::F32), "squares");
}

// 8300 rows are 252 chunks of 33; a norm and a magnitude of 0 give no gradient.
TEST_F(DoraOnDevice, SumsOverManyRowsAgree) {
  const int64_t T = 8300, N = 11;
  const Tensor dy = random_tensor({T, N}, DType::F32, 1), h = random_tensor({T, N}, DType::F32, 2);
  DoraScale dora{random_tensor({N}, DType::F32, 3), random_tensor({N}, DType::F32, 4)};
  dora.magnitude.data<float>()[2] = 0;
  dora.norm.data<float>()[5] = 0;
  for (const bool of_scaled : {false, true}) {
    Tensor none, sums = Tensor::zeros({N}, DType::F32), device_sums = sums.to(Device::CUDA);
    reference_backend().dora_scale_backward(none, sums, dy, h, dora, of_scaled);
    cuda_backend().dora_scale_backward(
        none, device_sums, dy.to(Device::CUDA), h.to(Device::CUDA),
        {dora.magnitude.to(Device::CUDA), dora.norm.to(Device::CUDA)}, of_scaled);
    expect_close(device_sums.to(Device::CPU), sums, tolerance_of(DType::F32), "dmagnitude");
    EXPECT_EQ(device_sums.to_doubles()[of_scaled ? 2 : 5], 0);
  }
}

}  // namespace
}  // namespace graft
