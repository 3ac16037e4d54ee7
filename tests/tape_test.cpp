// The tape: order, accumulation, what is saved and for how long, and what it refuses.
#include "autograd/tape.h"

#include <gtest/gtest.h>

#include <array>

#include "autograd/ops.h"
#include "tensor/backend.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

Variable leaf(Shape shape, DType dtype, uint64_t seed, bool requires_grad = true) {
  return Variable(random_tensor(shape, dtype, seed), requires_grad);
}

int64_t live(Device device = Device::CPU) { return allocator_of(device).stats().live_total; }

Tensor ones(const Tensor& like) {
  return Tensor::from_floats(like.shape(), std::vector<double>(size_t(like.num_elements()), 1.0),
                             like.dtype());
}

// add() hands one dy to both branches. Summed in place, what arrives at a later shows in b, and in
// the dy of the branch that is still to run.
TEST(Tape, TwoBranchGraphKeepsSharedGradientsApart) {
  const Variable x = leaf({3}, DType::F32, 1), z = leaf({3}, DType::F32, 2);
  {
    const Variable a = ops::scale(x, 1), b = ops::scale(z, 1);
    const Variable branch = ops::scale(a, 2);
    const Variable sum = ops::add(a, b);  // runs backward before `branch`
    const Variable y = ops::add(branch, sum);
    backward(y, ones(y.value()));
  }
  EXPECT_EQ(x.grad().to_doubles(), std::vector<double>(3, 3.0));
  EXPECT_EQ(z.grad().to_doubles(), std::vector<double>(3, 1.0));
}

TEST(Tape, TwoBranchGraphAgreesWithFiniteDifferences) {
  const Variable w = leaf({5, 5}, DType::F64, 3, false);
  Variable x = leaf({4, 5}, DType::F64, 4);
  const Tensor dy = random_tensor({4, 5}, DType::F64, 5);
  const auto run = [&] {
    const Variable h = ops::linear(x, w);
    const Variable mixed = ops::add(h, ops::swiglu(h, ops::linear(h, w)));
    return ops::add(ops::scale(mixed, 0.5), ops::add(h, ops::swiglu(mixed, h)));
  };
  backward(run(), dy);
  const Tensor value = x.value();
  const auto probe = [&](int64_t i, double h) {
    Tensor moved = value.clone();
    moved.data<double>()[i] += h;
    x.set_value(moved);
    const std::vector<double> y = run().value().to_doubles(), g = dy.to_doubles();
    double sum = 0;
    for (size_t k = 0; k < y.size(); ++k) sum += y[k] * g[k];
    return sum;
  };
  Tensor numeric = Tensor::zeros({4, 5}, DType::F64);
  for (int64_t i = 0; i < 20; ++i)
    numeric.data<double>()[i] = (probe(i, 1e-5) - probe(i, -1e-5)) / 2e-5;
  expect_close(x.grad(), numeric, tolerance_of(DType::F64), "two-branch graph");
}

TEST(Tape, TellsClosuresWhichGradientsAreWanted) {
  const Variable x = leaf({2, 3}, DType::F32, 1), frozen = leaf({3}, DType::F32, 2, false);
  std::vector<Needs> seen;
  const Variable y = record("probe", x.value().clone(), {x, frozen, Variable(), x},
                            [&seen](const Tensor& dy, const Needs& needs) {
                              seen.push_back(needs);
                              return std::vector<Tensor>{dy, {}, {}, dy};
                            });
  backward(y, ones(y.value()));
  ASSERT_EQ(seen.size(), 1u);
  EXPECT_EQ(seen[0], (Needs{true, false, false, true}));
  EXPECT_FALSE(frozen.grad().defined());
  EXPECT_EQ(x.grad().to_doubles(), std::vector<double>(6, 2.0));
}

TEST(Tape, SkipsFrozenWeightGradients) {
  const Variable x = leaf({64, 32}, DType::F32, 1), w = leaf({512, 32}, DType::F32, 2, false);
  const UseReferenceBackend plain;  // asks the allocator for nothing of its own
  const Variable y = ops::linear(x, w);
  const Tensor dy = ones(y.value());
  const int64_t before = live();
  allocator_of(Device::CPU).reset_peak();
  backward(y, dy);
  const int64_t dx_bytes = x.value().num_bytes(), dw_bytes = w.value().num_bytes();
  EXPECT_LT(allocator_of(Device::CPU).stats().peak_total - before, dx_bytes + dw_bytes);
  EXPECT_FALSE(w.grad().defined());
}

TEST(Tape, FrozenLinearSavesNoActivation) {
  const UseReferenceBackend plain;
  const Variable w = leaf({8, 8}, DType::F32, 2, false);
  Variable x = leaf({512, 8}, DType::F32, 1);
  Variable h = ops::scale(x, 2);
  const int64_t before = live();  // with h
  const Variable y = ops::linear(h, w);
  const int64_t y_bytes = live() - before;
  h = Variable();
  EXPECT_EQ(live(), before) << "h and y have the same size, so h must be gone";
  EXPECT_GE(y_bytes, y.value().num_bytes());
}

TEST(Tape, RunsAndFreesAChainOf100000Nodes) {
  const int64_t before = live();
  for (bool with_backward : {true, false}) {
    const Variable x = leaf({1}, DType::F32, 1);
    Variable y = x;
    for (int i = 0; i < 100000; ++i) y = ops::scale(y, -1);
    if (with_backward) {
      backward(y);
      EXPECT_EQ(x.grad().item(), 1);
    }
  }
  EXPECT_EQ(live(), before);
}

TEST(Tape, NoRecordLeavesNoNodeButFlowsTheFlag) {
  const Variable x = leaf({2, 2}, DType::F32, 1), frozen = leaf({2, 2}, DType::F32, 2, false);
  const NoRecord off;
  EXPECT_FALSE(recording());
  const Variable y = ops::add(x, frozen), z = ops::add(frozen, frozen);
  EXPECT_TRUE(y.requires_grad());
  EXPECT_TRUE(y.is_leaf());
  EXPECT_FALSE(z.requires_grad());
  const Record on;
  EXPECT_FALSE(ops::add(x, x).is_leaf());
}

TEST(Tape, GradientOfABF16LeafIsF32) {
  const Variable x = leaf({4, 4}, DType::BF16, 1);
  const Variable y = ops::scale(x, 2);
  backward(y, ones(y.value()));
  EXPECT_EQ(x.grad().dtype(), DType::F32);
  EXPECT_EQ(x.grad().to_doubles(), std::vector<double>(16, 2.0));
}

TEST(Tape, AccumulatesIntoTheGradientViewThatWasGiven) {
  Tensor flat = Tensor::zeros({10}, DType::F32);
  Variable x = leaf({2, 3}, DType::F32, 1);
  x.set_grad(flat.slice_rows(2, 8).reshape({2, 3}));
  for (int pass = 0; pass < 2; ++pass) {
    const Variable y = ops::scale(x, 1.5);
    backward(y, ones(y.value()));
  }
  const std::vector<double> expected{0, 0, 3, 3, 3, 3, 3, 3, 0, 0};
  EXPECT_EQ(flat.to_doubles(), expected);
}

TEST(Tape, RefusesGradientsThatDoNotFit) {
  const Variable x = leaf({2, 3}, DType::F32, 1);
  const auto run = [&](std::vector<Tensor> grads) {
    const Variable y = record("wrong", x.value().clone(), {x},
                              [grads](const Tensor&, const Needs&) { return grads; });
    backward(y, ones(y.value()));
  };
  EXPECT_THROW(run({Tensor::zeros({3, 2}, DType::F32)}), Error);
  EXPECT_THROW(run({Tensor::zeros({2, 3}, DType::BF16)}), Error);
  EXPECT_THROW(run({Tensor()}), Error);
  EXPECT_THROW(run({}), Error);
  EXPECT_FALSE(x.grad().defined());
  EXPECT_NO_THROW(run({Tensor::zeros({2, 3}, DType::F32)}));
}

TEST(Tape, RefusesASecondBackwardAndALossOfManyElements) {
  const Variable x = leaf({2}, DType::F32, 1);
  const Variable y = ops::scale(x, 2);
  EXPECT_THROW(backward(y), Error);  // two elements
  backward(y, ones(y.value()));
  EXPECT_THROW(backward(y, ones(y.value())), Error);
  const Variable frozen = leaf({1}, DType::F32, 1, false);
  EXPECT_THROW(backward(frozen), Error);
}

TEST(Tape, ActivationsDieWhileBackwardGoesOn) {
  const UseReferenceBackend plain;
  const Variable x = leaf({256, 16}, DType::F32, 1), w = leaf({16}, DType::F32, 2);
  const int64_t empty = live();
  Variable y = ops::rms_norm(x, w, 1e-5);
  const int64_t layer = live() - empty;
  for (int i = 0; i < 19; ++i) y = ops::rms_norm(y, w, 1e-5);
  const Tensor dy = ones(y.value());
  const int64_t before = live();
  allocator_of(Device::CPU).reset_peak();
  backward(y, dy);
  // Above what the forward left: a dy and a dx, and the gradients of w.
  EXPECT_LE(allocator_of(Device::CPU).stats().peak_total - before, 3 * layer);
  EXPECT_GE(before - empty, 20 * layer);
}

TEST(Ops, RefuseWhatDoesNotFit) {
  const Variable x = leaf({4, 6}, DType::F32, 1), w = leaf({5, 6}, DType::F32, 2);
  const Variable bf16 = leaf({4, 6}, DType::BF16, 3), f64 = leaf({4, 6}, DType::F64, 3);
  EXPECT_THROW(ops::add(x, w), Error);
  EXPECT_THROW(ops::add(x, bf16), Error);
  EXPECT_THROW(ops::scale(Variable(x.value().slice_cols(1, 3)), 2), Error);  // strided rows
  EXPECT_THROW(ops::swiglu(x, f64), Error);
  EXPECT_THROW(ops::linear(w, leaf({5, 7}, DType::F32, 1)), Error);
  EXPECT_THROW(ops::linear(x, w, leaf({6}, DType::F32, 1)), Error);
  EXPECT_THROW(ops::rms_norm(x, leaf({5}, DType::F32, 1), 1e-5), Error);
  EXPECT_THROW(ops::reshape(x, {5, 5}), Error);
  EXPECT_THROW(ops::embedding(Tensor::from_ints({1}, {5}), w, DType::F32), Error);
  const Tensor labels = Tensor::from_ints({4}, {0, 1, 2, 5});
  EXPECT_THROW(ops::linear_cross_entropy(x, w, labels, 1), Error);
  const Variable q = leaf({4, 3, 2}, DType::F32, 1), k = leaf({4, 2, 2}, DType::F32, 1);
  const Tensor cu = Tensor::from_ints({2}, {0, 4}), torn = Tensor::from_ints({2}, {0, 3});
  EXPECT_THROW(ops::attention(q, k, k, cu, 1), Error);    // 3 heads over 2
  EXPECT_THROW(ops::attention(k, k, k, torn, 1), Error);  // a token of no document
  ops::LoraArguments lora{leaf({2, 6}, DType::F32, 1), leaf({5, 3}, DType::F32, 1)};
  EXPECT_THROW(ops::lora_linear(x, w, {}, lora), Error);  // ranks 2 and 3
}

}  // namespace
}  // namespace graft
