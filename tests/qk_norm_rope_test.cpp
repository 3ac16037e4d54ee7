// RMSNorm of heads and their rotation in one pass: the reference against rms_norm and rope one
// after the other, and the fast kernels of every instruction set against the reference. Tolerances
// as in cpu_kernels_test.cpp.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "autograd/ops.h"
#include "autograd/tape.h"
#include "tensor/backend.h"
#include "tensor/cpu/cpu_backend.h"
#include "tensor/cpu/cpu_kernels.h"
#include "tensor/random.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

constexpr int64_t kTokens = 35, kHeads = 3, kPositions = 50;
constexpr double kEps = 1e-5;

Tensor random_tensor(Random& random, Shape shape, DType dtype, double scale = 1) {
  std::vector<double> values(size_t(shape.num_elements()));
  for (double& value : values) value = scale * random.normal();
  return Tensor::from_floats(shape, values, dtype);
}

// The heads as (T, heads, D), dense or `gap` elements apart, or as columns of a wider product.
enum class Layout { Dense, Apart, Columns };

Tensor heads_tensor(Random& random, Layout layout, int64_t heads, int64_t head_dim, DType dtype) {
  const Shape dense{kTokens, heads, head_dim};
  if (layout == Layout::Dense) return random_tensor(random, dense, dtype);
  if (layout == Layout::Columns)
    return random_tensor(random, {kTokens, heads * head_dim + 13}, dtype)
        .slice_cols(5, 5 + heads * head_dim);
  return random_tensor(random, {kTokens * heads, head_dim + 3}, dtype).slice_cols(0, head_dim);
}

// Inputs from one seed. Rows that are apart are seen as (T * heads, D): a token has one head then.
struct Inputs {
  Tensor x, dy, weight, table, positions;
  Inputs(Layout layout, int64_t head_dim, DType dtype, DType weight_dtype, int64_t heads = kHeads) {
    Random random(7);
    x = heads_tensor(random, layout, heads, head_dim, dtype);
    dy = heads_tensor(random, layout, heads, head_dim, dtype);
    weight = random_tensor(random, {head_dim}, weight_dtype);
    table = random_tensor(random, {kPositions, head_dim},
                          dtype == DType::F64 ? DType::F64 : DType::F32);
    std::vector<int32_t> at;
    for (int64_t t = 0; t < x.size(0); ++t) at.push_back(int32_t(random.below(kPositions)));
    positions = Tensor::from_ints({x.size(0)}, at);
  }
  int64_t rows() const { return x.num_elements() / table.size(1); }
  DType wide() const { return x.dtype() == DType::F64 ? DType::F64 : DType::F32; }
};

Tensor empty_like(const Tensor& t) { return Tensor::empty(t.shape(), t.dtype()); }

// y, rstd, dx, dweight; then y and dx in place, dx alone, dweight alone.
std::vector<Tensor> outputs_of(Backend& backend, const Inputs& in) {
  Tensor y = empty_like(in.x), over = in.x.clone(), dx = empty_like(in.x), over_dx = in.dy.clone();
  Tensor only_dx = empty_like(in.x), none;
  Tensor rstd = Tensor::empty({in.rows()}, in.wide()), same_rstd = empty_like(rstd);
  Tensor dweight = Tensor::zeros(in.weight.shape(), in.wide()), only_dweight = dweight.clone();
  const auto forward = [&](Tensor& to, Tensor& statistic, const Tensor& x) {
    backend.qk_norm_rope_forward(to, statistic, x, in.weight, kEps, in.positions, in.table);
  };
  const auto backward = [&](Tensor& to, Tensor& dw, const Tensor& dy) {
    backend.qk_norm_rope_backward(to, dw, dy, in.x, in.weight, rstd, in.positions, in.table);
  };
  forward(y, rstd, in.x);
  forward(over, same_rstd, over);
  backward(dx, dweight, in.dy);
  backward(over_dx, none, over_dx);
  backward(only_dx, none, in.dy);
  backward(none, only_dweight, in.dy);
  return {y, rstd, dx, dweight, over, over_dx, only_dx, only_dweight};
}

std::vector<Tensor> outputs_without_norm(Backend& backend, const Inputs& in) {
  Tensor y = empty_like(in.x), dx = empty_like(in.x), over = in.dy.clone(), none;
  const Tensor no_weight;
  backend.qk_norm_rope_forward(y, none, in.x, no_weight, kEps, in.positions, in.table);
  backend.qk_norm_rope_backward(dx, none, in.dy, none, no_weight, none, in.positions, in.table);
  backend.qk_norm_rope_backward(over, none, over, none, no_weight, none, in.positions, in.table);
  return {y, dx, over};
}

// The meaning is that of two kernels that were there before; in F64 they round nothing between.
TEST(QkNormRope, IsTheNormAndThenTheRotation) {
  UseReferenceBackend plain;
  Backend& backend = reference_backend();
  const Inputs in(Layout::Dense, 10, DType::F64, DType::F64);
  const std::vector<Tensor> out = outputs_of(backend, in);
  Tensor normed = empty_like(in.x), y = empty_like(in.x), rstd = Tensor::empty({105}, DType::F64);
  backend.rms_norm_forward(normed, rstd, in.x, in.weight, kEps);
  backend.rope(y, normed, in.positions, in.table, +1);
  Tensor dn = empty_like(in.x), dx = empty_like(in.x), dw = Tensor::zeros({10}, DType::F64);
  backend.rope(dn, in.dy, in.positions, in.table, -1);
  backend.rms_norm_backward(dx, dw, dn, in.x, in.weight, rstd);
  const std::vector<Tensor> expected = {y, rstd, dx, dw, y, dx, dx, dw};
  for (size_t i = 0; i < out.size(); ++i)
    expect_close(out[i], expected[i], 1e-13, concat("output ", i));
  const std::vector<Tensor> turned = outputs_without_norm(backend, in);
  backend.rope(y, in.x, in.positions, in.table, +1);
  expect_same_bytes(turned[0], y, "y without a norm");
  expect_same_bytes(turned[1], dn, "dx without a norm");
  expect_same_bytes(turned[2], dn, "dx without a norm, in place");
}

std::vector<const CpuKernels*> runnable_tables() {
  std::vector<const CpuKernels*> tables = {&cpu_kernels(CpuPath::Portable)};
  if (cpu_choice().path >= CpuPath::Avx2)
    tables.insert(tables.end(), {&cpu_kernels(CpuPath::Avx2), &cpu_kernels_wide16()});
  if (cpu_choice().path >= CpuPath::Avx512) tables.push_back(&cpu_kernels(CpuPath::Avx512));
  return tables;
}

void compare(const std::string& what, const Inputs& in,
             std::vector<Tensor> (*outputs)(Backend&, const Inputs&)) {
  const std::vector<Tensor> expected = outputs(reference_backend(), in);
  for (const CpuKernels* table : runnable_tables()) {
    CpuBackend fast(*table);
    const std::vector<Tensor> actual = outputs(fast, in);
    for (size_t i = 0; i < expected.size(); ++i)
      expect_close(actual[i], expected[i], in.x.dtype() == DType::BF16 ? 1.0 / 128 : 1e-5,
                   concat(what, " ", dtype_name(in.x.dtype()), " output ", i));
  }
}

TEST(QkNormRope, FastAgreesWithReferenceInEveryLayout) {
  for (Layout layout : {Layout::Dense, Layout::Apart, Layout::Columns})
    for (int64_t head_dim : {2, 8, 20, 64, 128})
      for (DType dtype : {DType::F32, DType::BF16})
        for (DType weight_dtype : {DType::F32, DType::BF16, DType::F16}) {
          const Inputs in(layout, head_dim, dtype, weight_dtype);
          compare(concat("head_dim ", head_dim, " layout ", int(layout)), in, outputs_of);
          compare(concat("no norm, head_dim ", head_dim), in, outputs_without_norm);
        }
}

// The fast backward takes 32 heads at a time.
TEST(QkNormRope, FastAgreesWithReferenceOfManyHeads) {
  for (int64_t heads : {32, 33, 70})
    for (DType dtype : {DType::F32, DType::BF16})
      compare(concat(heads, " heads"), Inputs(Layout::Dense, 20, dtype, dtype, heads), outputs_of);
}

// Columns of a merged product are read where they lie: the same bytes as from a copy of them.
TEST(QkNormRope, ColumnsOfAProductGiveTheBytesOfDenseHeads) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    Inputs in(Layout::Columns, 64, dtype, dtype);
    const std::vector<Tensor> from_columns = outputs_of(cpu_backend(), in);
    in.x = in.x.clone().reshape({kTokens, kHeads, 64});
    in.dy = in.dy.clone().reshape({kTokens, kHeads, 64});
    const std::vector<Tensor> dense = outputs_of(cpu_backend(), in);
    for (size_t i = 0; i < dense.size(); ++i)
      expect_same_bytes(from_columns[i].reshape(dense[i].shape()), dense[i], concat("output ", i));
  }
}

TEST(QkNormRope, RefusesPositionsAndHeadsThatDoNotFit) {
  Inputs in(Layout::Dense, 8, DType::F32, DType::F32);
  in.positions.data<int32_t>()[3] = kPositions;
  for (Backend* backend : {&cpu_backend(), &reference_backend()})
    EXPECT_THROW(outputs_of(*backend, in), Error);
  in.positions.data<int32_t>()[3] = 0;
  in.table = Tensor::zeros({kPositions, 6}, DType::F32);
  for (Backend* backend : {&cpu_backend(), &reference_backend()})
    EXPECT_THROW(outputs_of(*backend, in), Error);
  const Variable x(in.x), weight(in.weight);
  EXPECT_THROW(ops::qk_norm_rope(x, weight, kEps, in.positions, in.table), Error);
  in.table = Tensor::zeros({kPositions, 8}, DType::F32);
  EXPECT_THROW(
      ops::qk_norm_rope(x, Variable(Tensor::zeros({4}, DType::F32)), kEps, in.positions, in.table),
      Error);
}

// What is saved between forward and backward: x, which the caller holds anyway, and rstd.
TEST(QkNormRope, SavesNoNormedHeads) {
  const Inputs in(Layout::Dense, 64, DType::F32, DType::F32);
  const Variable x(in.x, true), weight(in.weight);
  const auto live = [] { return allocator_of(Device::CPU).stats().live_total; };
  const int64_t before = live();
  const Variable y = ops::qk_norm_rope(x, weight, kEps, in.positions, in.table);
  const int64_t output_and_rstd = in.x.num_bytes() + in.rows() * 4;
  EXPECT_GE(live() - before, output_and_rstd);
  EXPECT_LT(live() - before, output_and_rstd + in.x.num_bytes() / 2);  // blocks are rounded up
}

}  // namespace
}  // namespace graft
