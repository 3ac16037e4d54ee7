// linear_cross_entropy beyond the table of ops: chunks, missing labels, losses by token; and views
// with strided rows, which the table does not have.
#include <gtest/gtest.h>

#include <cmath>

#include "autograd/ops.h"
#include "autograd/tape.h"
#include "tensor/backend.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

constexpr int32_t kNone = ops::kIgnoreLabel;

struct Head {  // a language-model head of 11 tokens on 6 rows
  Variable hidden{random_tensor({6, 8}, DType::F32, 1), true};
  Variable weight{random_tensor({11, 8}, DType::F32, 2, 0.3), true};
};

TEST(Loss, IsTheScaledSumOfTheTokenLosses) {
  const Head s;
  const Tensor labels = Tensor::from_ints({6}, {4, kNone, 0, 10, kNone, 7});
  Tensor by_token;
  const Variable loss = ops::linear_cross_entropy(s.hidden, s.weight, labels, 0.25, &by_token, 2);
  // By the definition, one row at a time.
  const std::vector<double> h = s.hidden.value().to_doubles(), w = s.weight.value().to_doubles();
  double sum = 0;
  for (int64_t t = 0; t < 6; ++t) {
    const int32_t label = labels.data<int32_t>()[t];
    double total = 0, of_label = 0;
    for (int64_t v = 0; v < 11; ++v) {
      double logit = 0;
      for (int64_t c = 0; c < 8; ++c) logit += h[size_t(t * 8 + c)] * w[size_t(v * 8 + c)];
      total += std::exp(logit);
      if (v == label) of_label = logit;
    }
    const double expected = label == kNone ? 0 : std::log(total) - of_label;
    EXPECT_NEAR(by_token.to_doubles()[size_t(t)], expected, 1e-5) << "row " << t;
    sum += expected;
  }
  EXPECT_NEAR(loss.value().item(), 0.25 * sum, 1e-5);
  EXPECT_EQ(loss.value().rank(), 0);
}

TEST(Loss, DoesNotDependOnTheChunks) {
  const Tensor labels = Tensor::from_ints({6}, {4, 3, 0, 10, kNone, 7});
  const auto run = [&](int64_t chunk) {
    const Head s;
    const Variable loss = ops::linear_cross_entropy(s.hidden, s.weight, labels, 1, nullptr, chunk);
    backward(loss);
    return std::vector<Tensor>{loss.value(), s.hidden.grad(), s.weight.grad()};
  };
  const std::vector<Tensor> whole = run(100);
  for (int64_t chunk : {1, 2, 5})
    for (size_t i = 0; i < whole.size(); ++i)
      expect_close(run(chunk)[i], whole[i], 1e-5, concat("chunks of ", chunk, ", result ", i));
}

TEST(Loss, OfNoLabelledRowIsZeroWithZeroGradients) {
  const Head s;
  const Tensor labels = Tensor::from_ints({6}, std::vector<int32_t>(6, kNone));
  const Variable loss = ops::linear_cross_entropy(s.hidden, s.weight, labels, 1);
  backward(loss);
  EXPECT_EQ(loss.value().item(), 0);
  EXPECT_EQ(s.hidden.grad().to_doubles(), std::vector<double>(48, 0.0));
  EXPECT_EQ(s.weight.grad().to_doubles(), std::vector<double>(88, 0.0));
}

TEST(Loss, WithoutRecordingEqualsTheRecordedOne) {
  const Head s;
  const Tensor labels = Tensor::from_ints({6}, {4, 3, 0, 10, kNone, 7});
  const Variable loss = ops::linear_cross_entropy(s.hidden, s.weight, labels, 1);
  const NoRecord off;
  const Variable again = ops::linear_cross_entropy(s.hidden, s.weight, labels, 1);
  expect_same_bytes(again.value(), loss.value(), "loss");
}

TEST(Loss, GradientScalesWithDy) {
  const Tensor labels = Tensor::from_ints({6}, {4, 3, 0, 10, kNone, 7});
  const Head one, half;
  backward(ops::linear_cross_entropy(one.hidden, one.weight, labels, 1));
  backward(ops::scale(ops::linear_cross_entropy(half.hidden, half.weight, labels, 1), 0.5));
  expect_close(half.hidden.grad(), ops::scale(Variable(one.hidden.grad()), 0.5).value(), 1e-6,
               "dhidden");
  expect_close(half.weight.grad(), ops::scale(Variable(one.weight.grad()), 0.5).value(), 1e-6,
               "dweight");
}

// In BF16 dlogits are rounded before their product with the weight. What this costs must not exceed
// the rounding of the result itself: against the same inputs in F64, at most one unit in the last
// place of the largest element, and over all elements less than half of that.
TEST(Loss, GradientInBf16IsAsPreciseAsItsOwnRounding) {
  const int64_t T = 40, H = 64, V = 5000;
  std::vector<int32_t> ids;
  for (int32_t t = 0; t < T; ++t) ids.push_back(t % 7 ? t * 113 % int32_t(V) : kNone);
  const Tensor labels = Tensor::from_ints({T}, ids);
  const Tensor h = random_tensor({T, H}, DType::BF16, 5), w = random_tensor({V, H}, DType::BF16, 6);
  const auto dhidden = [&](DType dtype) {
    const Variable hidden(h.to(dtype), true), weight(w.to(dtype), false);
    backward(ops::linear_cross_entropy(hidden, weight, labels, 1));
    return hidden.grad();
  };
  const Tensor got = dhidden(DType::BF16), exact = dhidden(DType::F64);
  expect_close(got, exact, 1.0 / 256, "dhidden");
  const std::vector<double> a = got.to_doubles(), e = exact.to_doubles();
  double squares = 0, error_squares = 0;
  for (size_t i = 0; i < e.size(); ++i) {
    squares += e[i] * e[i];
    error_squares += (a[i] - e[i]) * (a[i] - e[i]);
  }
  EXPECT_LE(std::sqrt(error_squares / squares), 1.0 / 512);
}

// q, k, v are column slices of one product: their rows are further apart than they are wide.
TEST(StridedRows, GiveWhatADenseCopyGives) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    const Tensor wide = random_tensor({21, 50}, dtype, 1);
    const Tensor view = wide.slice_cols(7, 37);
    const Variable weight(random_tensor({13, 30}, dtype, 2, 0.2), true);
    const Variable norm(random_tensor({30}, dtype, 3), true);
    std::vector<std::vector<Tensor>> results;
    for (const Tensor& value : {view, view.clone()}) {
      const Variable x(value, true), w(weight.value(), true), n(norm.value(), true);
      const Variable y = ops::linear(ops::rms_norm(x, n, 1e-5), w);
      const Variable direct = ops::linear(x, w);
      backward(y, random_tensor({21, 13}, dtype, 4));
      backward(direct, random_tensor({21, 13}, dtype, 5));
      results.push_back({y.value(), direct.value(), x.grad(), w.grad(), n.grad()});
    }
    for (size_t i = 0; i < results[0].size(); ++i)
      expect_close(results[0][i], results[1][i], tolerance_of(dtype), concat("result ", i));
  }
}

}  // namespace
}  // namespace graft
