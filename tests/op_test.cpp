// What holds for every op, over the table of op_cases.h.
#include <gtest/gtest.h>

#include "autograd/tape.h"
#include "tensor/backend.h"
#include "tensor/random.h"
#include "tensor/thread_pool.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

constexpr OpDtypes kF64{DType::F64, DType::F64};
constexpr OpDtypes kF32{DType::F32, DType::F32};
constexpr OpDtypes kBF16{DType::BF16, DType::BF16};

uint64_t full_mask(const OpCase& op) { return (uint64_t(1) << op.inputs.size()) - 1; }

struct Result {
  Tensor y;
  std::vector<Tensor> grads;  // undefined where not in the mask
};

// dy is a fixed random tensor of the shape of y.
Tensor random_dy(const Tensor& y) { return random_tensor(y.shape(), y.dtype(), 999); }

Result run_case(const OpCase& op, const OpDtypes& dtypes, uint64_t mask) {
  std::vector<Variable> inputs = make_inputs(op, dtypes, mask);
  const Variable y = op.run(inputs, dtypes.activation);
  const Tensor value = y.value().clone();
  if (y.requires_grad()) backward(y, random_dy(value));
  Result result{value, {}};
  for (const Variable& input : inputs) result.grads.push_back(input.grad());
  return result;
}

// The scalar whose gradient is checked: sum of y dy.
double probe(const OpCase& op, const std::vector<Variable>& inputs) {
  NoRecord off;
  const Variable y = op.run(inputs, DType::F64);
  const std::vector<double> value = y.value().to_doubles(), dy = random_dy(y.value()).to_doubles();
  double sum = 0;
  for (size_t i = 0; i < value.size(); ++i) sum += value[i] * dy[i];
  return sum;
}

// (f(x + step) - f(x - step)) / 2, the inputs' values left as they were.
double half_difference(const OpCase& op, std::vector<Variable>& inputs, size_t input,
                       const std::vector<double>& step) {
  const Tensor value = inputs[input].value();
  const auto moved = [&](double sign) {
    Tensor at = value.clone();
    for (size_t i = 0; i < step.size(); ++i) at.data<double>()[i] += sign * step[i];
    inputs[input].set_value(at);
    return probe(op, inputs);
  };
  const double difference = (moved(+1) - moved(-1)) / 2;
  inputs[input].set_value(value);
  return difference;
}

class EveryOp : public testing::TestWithParam<size_t> {
 protected:
  OpCase at(const OpSizes& sizes) const { return op_cases(sizes)[GetParam()]; }
};

// Central differences with h = 1e-5 err by about h^2 = 1e-10 and 1e-16 / h = 1e-11.
TEST_P(EveryOp, GradientAgreesWithFiniteDifferencesElementByElement) {
  const OpCase op = at(kTinySizes);
  std::vector<Variable> inputs = make_inputs(op, kF64, full_mask(op));
  const Result result = run_case(op, kF64, full_mask(op));
  const double h = 1e-5;
  for (size_t k = 0; k < inputs.size(); ++k) {
    Tensor numeric = Tensor::zeros(inputs[k].shape(), DType::F64);
    for (int64_t i = 0; i < numeric.num_elements(); ++i) {
      std::vector<double> step(size_t(numeric.num_elements()), 0.0);
      step[size_t(i)] = h;
      numeric.data<double>()[i] = half_difference(op, inputs, k, step) / h;
    }
    expect_close(result.grads[k], numeric, tolerance_of(DType::F64),
                 op.name + ", input " + std::to_string(k));
  }
}

TEST_P(EveryOp, GradientAgreesWithFiniteDifferencesAlongRandomDirections) {
  const OpCase op = at(kRaggedSizes);
  std::vector<Variable> inputs = make_inputs(op, kF64, full_mask(op));
  const Result result = run_case(op, kF64, full_mask(op));
  const double h = 1e-5;
  for (size_t k = 0; k < inputs.size(); ++k) {
    const std::vector<double> grad = result.grads[k].to_doubles();
    for (uint64_t seed = 0; seed < 2; ++seed) {
      std::vector<double> step = random_tensor(inputs[k].shape(), DType::F64, seed).to_doubles();
      double along = 0;
      for (size_t i = 0; i < step.size(); ++i) {
        along += grad[i] * step[i];
        step[i] *= h;
      }
      const double numeric = half_difference(op, inputs, k, step) / h;
      EXPECT_NEAR(along / numeric, 1, tolerance_of(DType::F64)) << op.name << ", input " << k;
    }
  }
}

// The tolerance is that of the coarser of the two dtypes: the reference sees the same rounded
// inputs.
TEST_P(EveryOp, FastAgreesWithReference) {
  const OpDtypes all[] = {
      kF32, kBF16, {DType::F32, DType::BF16}, {DType::F32, DType::F16}, {DType::BF16, DType::F32}};
  for (const OpSizes& sizes : {kTinySizes, kRaggedSizes, kWideSizes}) {
    const OpCase op = at(sizes);
    for (const OpDtypes& dtypes : all) {
      const Result fast = run_case(op, dtypes, full_mask(op));
      const UseReferenceBackend reference;
      const Result plain = run_case(op, dtypes, full_mask(op));
      const std::string what = concat(op.name, " T=", sizes.T, " ", dtype_name(dtypes.activation),
                                      " with weights ", dtype_name(dtypes.weight));
      const double tolerance = tolerance_of(dtypes.activation);
      expect_close(fast.y, plain.y, tolerance, what);
      for (size_t k = 0; k < fast.grads.size(); ++k)
        expect_close(fast.grads[k], plain.grads[k], tolerance, concat(what, ", d input ", k));
    }
  }
}

TEST_P(EveryOp, EveryNeedsMaskGivesTheGradientsOfTheFullOne) {
  const OpCase op = at(kRaggedSizes);
  for (const OpDtypes& dtypes : {kF32, kBF16}) {
    const Result full = run_case(op, dtypes, full_mask(op));
    for (uint64_t mask = 0; mask < full_mask(op); ++mask) {
      const Result part = run_case(op, dtypes, mask);
      expect_same_bytes(part.y, full.y, op.name);
      for (size_t k = 0; k < part.grads.size(); ++k) {
        const std::string what = concat(op.name, ", mask ", mask, ", input ", k);
        if (mask >> k & 1)
          expect_same_bytes(part.grads[k], full.grads[k], what);
        else
          EXPECT_FALSE(part.grads[k].defined()) << what;
      }
    }
  }
}

TEST_P(EveryOp, NoByteOfTheGraphLivesAfterBackward) {
  const OpCase op = at(kRaggedSizes);
  run_case(op, kF32,
           full_mask(op));  // buffers that the backend keeps for itself exist from here on
  std::vector<Variable> inputs = make_inputs(op, kF32, full_mask(op));
  const auto live = [] { return allocator_of(Device::CPU).stats().live_total; };
  const int64_t before = live();
  int64_t with_output = 0;
  {
    const NoRecord off;
    const Variable y = op.run(inputs, DType::F32);
    with_output = live();
  }
  ASSERT_EQ(live(), before) << op.name;
  {
    const Variable y = op.run(inputs, DType::F32);
    backward(y, random_dy(y.value()));
    for (Variable& input : inputs) input.set_grad({});
    EXPECT_EQ(live(), with_output) << op.name << ": a saved tensor outlives the backward";
  }
  EXPECT_EQ(live(), before) << op.name;
}

TEST_P(EveryOp, LeavesItsInputsAsTheyWere) {
  const OpCase op = at(kRaggedSizes);
  for (const OpDtypes& dtypes : {kF32, kBF16}) {
    std::vector<Variable> inputs = make_inputs(op, dtypes, full_mask(op));
    const std::vector<Variable> twins = make_inputs(op, dtypes, full_mask(op));
    const Variable y = op.run(inputs, dtypes.activation);
    const Tensor dy = random_dy(y.value()), y_before = y.value().clone();
    backward(y, dy);
    for (size_t k = 0; k < inputs.size(); ++k)
      expect_same_bytes(inputs[k].value(), twins[k].value(), concat(op.name, ", input ", k));
    expect_same_bytes(dy, random_dy(dy), op.name + ", dy");
    expect_same_bytes(y.value(), y_before, op.name + ", y");
  }
}

TEST_P(EveryOp, GivesTheSameBytesWithAnyNumberOfThreads) {
  const OpCase op = at(kWideSizes);
  for (const OpDtypes& dtypes : {kF32, kBF16}) {
    set_num_threads(1);
    const Result one = run_case(op, dtypes, full_mask(op));
    for (int threads : {2, 3, 8}) {
      set_num_threads(threads);
      const Result many = run_case(op, dtypes, full_mask(op));
      expect_same_bytes(many.y, one.y, concat(op.name, ", ", threads, " threads"));
      for (size_t k = 0; k < one.grads.size(); ++k)
        expect_same_bytes(many.grads[k], one.grads[k],
                          concat(op.name, ", ", threads, " threads, input ", k));
    }
  }
  set_num_threads(0);
}

INSTANTIATE_TEST_SUITE_P(Ops, EveryOp, testing::Range<size_t>(0, op_cases(kTinySizes).size()),
                         [](const testing::TestParamInfo<size_t>& info) {
                           return op_cases(kTinySizes)[info.param].name;
                         });

}  // namespace
}  // namespace graft
