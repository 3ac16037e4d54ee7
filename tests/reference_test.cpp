// The reference kernels against numbers from elsewhere: PyTorch 2 in F64 where nothing else is
// said. Everything else is tested against the reference, so it must not be its own witness.
#include <gtest/gtest.h>

#include <cmath>

#include "cuda/cuda_backend.h"
#include "tensor/backend.h"
#include "tensor/random.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

Backend& ref() { return reference_backend(); }

Tensor f64(Shape shape, const std::vector<double>& values) {
  return Tensor::from_floats(shape, values, DType::F64);
}

Tensor zeros(Shape shape) { return Tensor::zeros(shape, DType::F64); }

void expect_values(const Tensor& actual, const std::vector<double>& expected, const char* what) {
  expect_close(actual, f64(actual.shape(), expected), 1e-10, what);
}

// By hand: [1 2; 3 4] [5 6; 7 8] = [19 22; 43 50], and every transpose of the operands.
TEST(Reference, GemmMultipliesAndTransposes) {
  const Tensor a = f64({2, 2}, {1, 2, 3, 4}), at = f64({2, 2}, {1, 3, 2, 4});
  const Tensor b = f64({2, 2}, {5, 6, 7, 8}), bt = f64({2, 2}, {5, 7, 6, 8});
  for (const GemmTerm& term :
       {GemmTerm{.a = a, .b = b}, GemmTerm{.a = at, .b = b, .transpose_a = true},
        GemmTerm{.a = a, .b = bt, .transpose_b = true},
        GemmTerm{.a = at, .b = bt, .transpose_a = true, .transpose_b = true}}) {
    Tensor c = zeros({2, 2});
    ref().gemm(c, {&term, 1});
    expect_values(c, {19, 22, 43, 50}, "gemm");
  }
}

// By hand: 2 [1 2; 3 4] + (-1) [1; 2] [10 20] + [100 200] on every row + c itself.
TEST(Reference, GemmAddsTermsBiasAndAddend) {
  const Tensor identity = f64({2, 2}, {1, 0, 0, 1});
  const GemmTerm terms[] = {{.a = f64({2, 2}, {1, 2, 3, 4}), .b = identity, .alpha = 2},
                            {.a = f64({2, 1}, {1, 2}), .b = f64({1, 2}, {10, 20}), .alpha = -1}};
  Tensor c = f64({2, 2}, {1000, 1000, 1000, 1000});
  ref().gemm(c, terms, c, f64({2}, {100, 200}));
  expect_values(c, {1092, 1184, 1086, 1168}, "gemm");
}

TEST(Reference, RmsNormAgreesWithTorch) {
  const Tensor x = f64({1, 3}, {1, -2, 3}), w = f64({3}, {0.5, 1, 2});
  Tensor y = zeros({1, 3}), rstd = zeros({1}), dx = zeros({1, 3}), dw = zeros({3});
  ref().rms_norm_forward(y, rstd, x, w, 1e-5);
  expect_values(y, {0.2314547769560097, -0.9258191078240388, 2.7774573234721163}, "y");
  ref().rms_norm_backward(dx, dw, f64({1, 3}, {1, 1, -1}), x, w, rstd);
  expect_values(dx, {0.4794415065801708, -0.033063905336302934, -0.18185891895155526}, "dx");
  expect_values(dw, {0.4629095539120194, -0.9258191078240388, -1.3887286617360581}, "dw");
}

TEST(Reference, SwigluAgreesWithTorch) {
  Tensor gate = f64({1, 3}, {-2, 0.5, 3}), up = f64({1, 3}, {1.5, -1, 0.25}), y = zeros({1, 3});
  ref().swiglu_forward(y, gate, up);
  expect_values(y, {-0.3576087660663526, -0.3112296656009273, 0.7144305951168249}, "y");
  ref().swiglu_backward(gate, up, f64({1, 3}, {1, 2, -1}), gate, up);  // in place
  expect_values(gate, {-0.13617637317734319, -1.4799223746053038, -0.2720260265037923}, "dgate");
  expect_values(up, {-0.2384058440442351, 0.6224593312018546, -2.8577223804672998}, "dup");
}

// scaled_dot_product_attention(is_causal=True, scale=0.7)
TEST(Reference, AttentionAgreesWithTorch) {
  const Tensor q = f64({3, 1, 2}, {1, 0, 0.5, -1, 2, 1}), k = f64({3, 1, 2}, {1, 1, -1, 0.5, 0, 2});
  const Tensor v = f64({3, 1, 2}, {1, 2, 3, -1, 0.5, 0});
  const Tensor cu = Tensor::from_ints({2}, {0, 3});
  Tensor out = zeros({3, 1, 2}), lse = zeros({1, 3});
  ref().attention_forward(out, lse, q, k, v, cu, cu, 0.7);
  expect_close(out,
               f64({3, 1, 2}, {1, 2, 1.82676484217, 0.759852736752, 0.894384536244, 1.27133966874}),
               1e-10, "out");
  EXPECT_NEAR(lse.to_doubles()[0], 0.7, 1e-12);  // one key: its own score
  Tensor dq = zeros({3, 1, 2}), dk = zeros({3, 1, 2}), dv = zeros({3, 1, 2});
  ref().attention_backward(dq, dk, dv, f64({3, 1, 2}, {1, -1, 0.5, 2, -1, 1}), q, k, v, out, lse,
                           cu, 0.7);
  expect_close(
      dq, f64({3, 1, 2}, {0, 0, 1.69748176516, 0.424370441289, 0.368592241293, -0.155375901633}),
      1e-10, "dq");
  expect_close(dk,
               f64({3, 1, 2}, {0.990981852147, -0.56543517715, -0.594943513017, 0.763454346715,
                               -0.396038339129, -0.198019169565}),
               1e-10, "dk");
  expect_close(dv,
               f64({3, 1, 2}, {0.643720842534, 0.822823104759, 0.178854985428, 0.854601067278,
                               -0.322575827963, 0.322575827963}),
               1e-10, "dv");
}

// Documents and the keys of a cache change nothing for the query that sees the same keys.
TEST(Reference, AttentionWithACacheContinuesTheDocument) {
  const int64_t T = 9, heads = 4, kv = 2, D = 6;
  const Tensor q = random_tensor({T, heads, D}, DType::F64, 1);
  const Tensor k = random_tensor({T, kv, D}, DType::F64, 2);
  const Tensor v = random_tensor({T, kv, D}, DType::F64, 3);
  const Tensor cu = Tensor::from_ints({3}, {0, 4, 9});
  Tensor out = zeros({T, heads, D}), lse = zeros({heads, T});
  ref().attention_forward(out, lse, q, k, v, cu, cu, 0.3);
  // The last two queries of each document alone.
  const Tensor cu_q = Tensor::from_ints({3}, {0, 2, 4});
  Tensor some_q = zeros({4, heads, D}), some = zeros({4, heads, D}), some_lse = zeros({heads, 4});
  const Tensor rows = Tensor::from_ints({4}, {2, 3, 7, 8});
  Tensor flat = some_q.reshape({4, heads * D});
  ref().gather_rows(flat, q.reshape({T, heads * D}), rows);
  ref().attention_forward(some, some_lse, some_q, k, v, cu_q, cu, 0.3);
  Tensor expected = zeros({4, heads * D});
  ref().gather_rows(expected, out.reshape({T, heads * D}), rows);
  expect_close(some, expected.reshape({4, heads, D}), 1e-12, "cached attention");
}

TEST(Reference, CrossEntropyAgreesWithTorch) {
  Tensor z = f64({2, 3}, {1, 2, -1, 0, 0.5, 100}), losses = zeros({2});
  const Tensor labels = Tensor::from_ints({2}, {1, 0});
  ref().cross_entropy(losses, z, labels, 2, false);
  expect_values(losses, {0.34901221676818633, 100}, "losses");
  expect_values(z, {1, 2, -1, 0, 0.5, 100}, "logits without gradient");
  ref().cross_entropy(losses, z, labels, 2, true);
  expect_values(z,
                {2 * 0.25949646034241913, 2 * -0.2946154873017588, 2 * 0.03511902695933973, -2,
                 2 * 6.133368390286092e-44, 2},
                "gradient");
}

// A quarter turn of the pair (1, 3) and half a turn of (2, 4), and back.
TEST(Reference, RopeTurnsPairsOfHalves) {
  const Tensor table = f64({2, 4}, {1, 1, 0, 0, 0, -1, 1, 0});  // position 1: 90 and 180 degrees
  const Tensor at = Tensor::from_ints({2}, {1, 0});
  Tensor x = f64({2, 1, 4}, {1, 2, 3, 4, 5, 6, 7, 8});
  ref().rope(x, x, at, table, +1);
  expect_values(x, {-3, -2, 1, -4, 5, 6, 7, 8}, "forward");
  ref().rope(x, x, at, table, -1);
  expect_values(x, {1, 2, 3, 4, 5, 6, 7, 8}, "backward");
}

// torch.optim.AdamW, F32, three steps, gradients halved as by clipping.
TEST(Reference, AdamWAgreesWithTorch) {
  for (Backend* backend : {&reference_backend(), &cpu_backend()}) {
    const auto f32 = [](const std::vector<double>& values) {
      return Tensor::from_floats({4}, values, DType::F32);
    };
    Tensor w = f32({0.5, -1.25, 2, 0}), m = f32({0, 0, 0, 0}), v = f32({0, 0, 0, 0});
    const std::vector<std::vector<double>> gradients{
        {0.3, -0.2, 1.5, 0.01}, {-0.6, 0.4, 1.0, 0.02}, {0.1, 0.0, -2.0, 0.03}};
    for (int64_t step = 1; step <= 3; ++step)
      backend->adamw(w, m, v, f32(gradients[size_t(step - 1)]),
                     Tensor::from_floats({}, {0.5}, DType::F64),
                     {.learning_rate = 0.1,
                      .beta1 = 0.9,
                      .beta2 = 0.99,
                      .epsilon = 1e-3,
                      .weight_decay = 0.05,
                      .step = step});
    expect_close(w, f32({0.448902309, -1.19757891, 1.77207363, -0.255130708}), 1e-6, "w");
    expect_close(m,
                 f32({-0.009850000031292439, 0.009900000877678394, 0.005749998614192009,
                      0.002804999938234687}),
                 1e-6, "m");
    expect_close(v,
                 f32({0.0011365226237103343, 0.0004940100479871035, 0.017988063395023346,
                      3.485024762994726e-06}),
                 1e-6, "v");
  }
}

// Element by element from tensor/random.h: words of philox at (row, col / 4).
void expect_mask_of_the_rule(Backend& backend, int64_t first_row) {
  const DropoutKey key{
      .seed = 0xfeedbeef12345678u, .step = 4, .module = 11, .first_row = first_row};
  const Tensor x = Tensor::from_floats({9, 23}, std::vector<double>(9 * 23, 1), DType::F32);
  Tensor y = Tensor::empty({9, 23}, DType::F32);
  backend.dropout(y, x, 0.3, key, false);
  for (int64_t r = 0; r < 9; ++r)
    for (int64_t c = 0; c < 23; ++c) {
      const uint64_t row = uint64_t(first_row + r);
      const auto words = philox({uint32_t(c / 4), uint32_t(row), 11, 4},
                                {0x12345678u, 0xfeedbeefu ^ uint32_t(row >> 32)});
      const double expected = double(words[size_t(c % 4)]) >= 0.3 * 4294967296.0 ? 1 / 0.7 : 0;
      ASSERT_NEAR(y.data<float>()[r * 23 + c], expected, 1e-6) << r << ", " << c;
    }
}

TEST(Dropout, FollowsTheRuleElementByElement) {
  for (Backend* backend : {&reference_backend(), &cpu_backend()})
    for (int64_t first_row : {int64_t(0), int64_t(1) << 20, (int64_t(5) << 32) - 4})
      expect_mask_of_the_rule(*backend, first_row);
}

std::vector<double> mask_of(const DropoutKey& key, double p) {
  const Tensor x = Tensor::from_floats({64, 64}, std::vector<double>(64 * 64, 1), DType::F32);
  Tensor y = Tensor::empty({64, 64}, DType::F32);
  cpu_backend().dropout(y, x, p, key, false);
  return y.to_doubles();
}

// The mean of 4096 values 0 or 1/(1-p) has a standard deviation of sqrt(p / (1-p) / 4096): five of
// it.
TEST(Dropout, PreservesTheMean) {
  for (double p : {0.05, 0.5, 0.9})
    for (uint64_t seed = 0; seed < 8; ++seed) {
      double sum = 0;
      for (double value : mask_of({.seed = seed}, p)) sum += value;
      EXPECT_NEAR(sum / 4096, 1, 5 * std::sqrt(p / (1 - p) / 4096)) << "p " << p;
    }
}

// Two independent masks with p = 0.5 agree in half of their 4096 elements, give or take 32.
TEST(Dropout, MasksDifferByModuleStepSeedAndRow) {
  const DropoutKey key{.seed = 1, .step = 2, .module = 3, .first_row = 4};
  const std::vector<double> base = mask_of(key, 0.5);
  EXPECT_EQ(mask_of(key, 0.5), base);
  for (const DropoutKey& other : {DropoutKey{2, 2, 3, 4}, DropoutKey{1, 3, 3, 4},
                                  DropoutKey{1, 2, 4, 4}, DropoutKey{1, 2, 3, 5}}) {
    const std::vector<double> mask = mask_of(other, 0.5);
    int agree = 0;
    for (size_t i = 0; i < mask.size(); ++i) agree += mask[i] == base[i];
    EXPECT_NEAR(agree, 2048, 160);
  }
}

// Two micro-batches of 32 rows draw the mask of one of 64.
TEST(Dropout, RowsAreNumberedThroughTheStep) {
  const std::vector<double> whole = mask_of({.seed = 7, .first_row = 100}, 0.5);
  const std::vector<double> second = mask_of({.seed = 7, .first_row = 132}, 0.5);
  EXPECT_TRUE(std::equal(whole.begin() + 32 * 64, whole.end(), second.begin()));
}

TEST(Backend, IsChosenByDeviceAndDtype) {
  EXPECT_EQ(&backend_of(zeros({2})), &reference_backend());  // CPU F64
  EXPECT_EQ(&backend_of(Tensor::zeros({2}, DType::F32)), &cpu_backend());
  EXPECT_EQ(&backend_of(Tensor::empty({2}, DType::F64, Device::Meta)), &meta_backend());
  {
    const UseReferenceBackend outer;
    { const UseReferenceBackend inner; }
    EXPECT_EQ(&backend_of(Device::CPU), &reference_backend());
  }
  EXPECT_EQ(&backend_of(Device::CPU), &cpu_backend());
}

TEST(Backend, OfABuildWithoutCudaSaysSo) {
  std::string reason;
  if (cuda_available(&reason)) GTEST_SKIP() << "this build has CUDA";
  EXPECT_NE(reason, "");
  EXPECT_THROW(backend_of(Device::CUDA), Error);
}

// Known answers of Random123 (kat_vectors, philox4x32-10).
TEST(Philox, AgreesWithTheKnownAnswersOfRandom123) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

}  // namespace
}  // namespace graft
