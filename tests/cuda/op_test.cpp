// Every row of the table of ops (tests/op_cases.h) on the device, against the reference backend on
// the CPU: forward and all gradients, every needs mask, the same bytes twice, inputs unchanged, no
// byte live after backward; and the rows with products once more without cuBLAS.
#include <gtest/gtest.h>

#include <set>

#include "autograd/tape.h"
#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

constexpr OpDtypes kF32{DType::F32, DType::F32};
constexpr OpDtypes kBF16{DType::BF16, DType::BF16};

uint64_t full_mask(const OpCase& op) { return (uint64_t(1) << op.inputs.size()) - 1; }

std::vector<Variable> inputs_on(Device device, const OpCase& op, const OpDtypes& dtypes,
                                uint64_t mask) {
  std::vector<Variable> inputs;
  for (const Variable& input : make_inputs(op, dtypes, mask))
    inputs.emplace_back(input.value().to(device), input.requires_grad());
  return inputs;
}

Tensor random_dy(const Tensor& y) {
  return random_tensor(y.shape(), y.dtype(), 999).to(y.device());
}

struct Result {
  Tensor y;
  std::vector<Tensor> grads;  // on the CPU; undefined where not in the mask
};

Result run_case(Device device, const OpCase& op, const OpDtypes& dtypes, uint64_t mask) {
  std::vector<Variable> inputs = inputs_on(device, op, dtypes, mask);
  const Variable y = op.run(inputs, dtypes.activation);
  Result result{y.value().to(Device::CPU).clone(), {}};
  if (y.requires_grad()) backward(y, random_dy(y.value()));
  for (const Variable& input : inputs)
    result.grads.push_back(input.grad().defined() ? input.grad().to(Device::CPU) : Tensor());
  return result;
}

// Of the activations and of every input.
std::vector<DType> dtypes_of(const OpCase& op, const OpDtypes& dtypes) {
  std::vector<DType> all = {dtypes.activation};
  for (const Variable& input : make_inputs(op, dtypes, 0)) all.push_back(input.value().dtype());
  return all;
}

class EveryOpOnCuda : public testing::TestWithParam<size_t> {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
  OpCase at(const OpSizes& sizes) const { return op_cases(sizes)[GetParam()]; }
};

void expect_the_references(const std::function<OpCase(const OpSizes&)>& at,
                           const std::vector<OpSizes>& all_sizes) {
  const OpDtypes all[] = {
      kF32, kBF16, {DType::F32, DType::BF16}, {DType::F32, DType::F16}, {DType::BF16, DType::F32}};
  for (const OpSizes& sizes : all_sizes) {
    const OpCase op = at(sizes);
    std::set<std::vector<DType>> seen;  // an op without weights would do the same work three times
    for (const OpDtypes& dtypes : all) {
      if (!seen.insert(dtypes_of(op, dtypes)).second) continue;
      const Result device = run_case(Device::CUDA, op, dtypes, full_mask(op));
      const UseReferenceBackend reference;
      const Result plain = run_case(Device::CPU, op, dtypes, full_mask(op));
      const std::string what = concat(op.name, " T=", sizes.T, " ", dtype_name(dtypes.activation),
                                      " with weights ", dtype_name(dtypes.weight));
      const double tolerance = tolerance_of(dtypes.activation);
      expect_close(device.y, plain.y, tolerance, what);
      for (size_t k = 0; k < device.grads.size(); ++k)
        expect_close(device.grads[k], plain.grads[k], tolerance, concat(what, ", d input ", k));
    }
  }
}

TEST_P(EveryOpOnCuda, AgreesWithTheReference) {
  expect_the_references([&](const OpSizes& sizes) { return at(sizes); },
                        {kTinySizes, kRaggedSizes, kWideSizes});
}

TEST_P(EveryOpOnCuda, EveryNeedsMaskGivesTheGradientsOfTheFullOne) {
  const OpCase op = at(kRaggedSizes);
  for (const OpDtypes& dtypes : {kF32, kBF16}) {
    const Result full = run_case(Device::CUDA, op, dtypes, full_mask(op));
    for (uint64_t mask = 0; mask <= full_mask(op); ++mask) {  // the full one again: same bytes
      const Result part = run_case(Device::CUDA, op, dtypes, mask);
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

TEST_P(EveryOpOnCuda, NoByteOfTheGraphLivesAfterBackward) {
  const OpCase op = at(kRaggedSizes);
  const auto live = [] { return allocator_of(Device::CUDA).stats().live_total; };
  // What the backend keeps is there from here on: its buffers, and the last batch's lists of tiles.
  run_case(Device::CUDA, op, kBF16, full_mask(op));
  const int64_t before = live();
  run_case(Device::CUDA, op, kBF16, full_mask(op));
  EXPECT_EQ(live(), before) << op.name << ": a saved tensor outlives the backward";
}

TEST_P(EveryOpOnCuda, LeavesItsInputsAsTheyWere) {
  const OpCase op = at(kRaggedSizes);
  for (const OpDtypes& dtypes : {kF32, kBF16}) {
    const std::vector<Variable> inputs = inputs_on(Device::CUDA, op, dtypes, full_mask(op));
    const std::vector<Variable> twins = make_inputs(op, dtypes, full_mask(op));
    const Variable y = op.run(inputs, dtypes.activation);
    const Tensor dy = random_dy(y.value()), y_before = y.value().to(Device::CPU);
    backward(y, dy);
    for (size_t k = 0; k < inputs.size(); ++k)
      expect_same_bytes(inputs[k].value().to(Device::CPU), twins[k].value(),
                        concat(op.name, ", input ", k));
    expect_same_bytes(dy.to(Device::CPU), random_dy(y_before), op.name + ", dy");
    expect_same_bytes(y.value().to(Device::CPU), y_before, op.name + ", y");
  }
}

std::string name_of_case(const testing::TestParamInfo<size_t>& info) {
  return op_cases(kTinySizes)[info.param].name;
}
INSTANTIATE_TEST_SUITE_P(Ops, EveryOpOnCuda, testing::Range<size_t>(0, op_cases(kTinySizes).size()),
                         name_of_case);

class EveryProductWithoutCublas : public EveryOpOnCuda {
 protected:
  void SetUp() override {
    EveryOpOnCuda::SetUp();
    if (IsSkipped()) return;
    used_ = backend().uses_cublas();
    backend().use_cublas(false);
  }
  void TearDown() override {
    if (used_) backend().use_cublas(true);
  }
  static CudaBackend& backend() { return static_cast<CudaBackend&>(cuda_backend()); }
  bool used_ = false;
};

// Products of several tiles: own_gemm_test.cpp.
TEST_P(EveryProductWithoutCublas, AgreesWithTheReference) {
  expect_the_references([&](const OpSizes& sizes) { return at(sizes); },
                        {kTinySizes, kRaggedSizes});
}

std::vector<size_t> cases_with_products() {
  std::vector<size_t> found;
  const std::vector<OpCase> all = op_cases(kTinySizes);
  for (size_t i = 0; i < all.size(); ++i)
    if (all[i].name.find("linear") != std::string::npos ||
        all[i].name.find("lora") != std::string::npos ||
        all[i].name.find("low_rank") != std::string::npos)
      found.push_back(i);
  return found;
}
INSTANTIATE_TEST_SUITE_P(Ops, EveryProductWithoutCublas, testing::ValuesIn(cases_with_products()),
                         name_of_case);

}  // namespace
}  // namespace graft
