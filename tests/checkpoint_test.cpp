// Checkpointing changes memory and nothing else.
#include "autograd/checkpoint.h"

#include <gtest/gtest.h>

#include "autograd/ops.h"
#include "tensor/backend.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

constexpr int64_t kT = 33, kH = 24;

// A residual block with a norm, two low-rank layers with dropout, and a SwiGLU: x is used twice.
struct Block {
  explicit Block(DType dtype, uint32_t module) : module(module) {
    norm = Variable(random_tensor({kH}, dtype, 10 + module), true);
    w = Variable(random_tensor({kH, kH}, dtype, 20 + module, 0.2), false);
    const DType adapter = dtype == DType::F64 ? DType::F64 : DType::F32;
    a = Variable(random_tensor({4, kH}, adapter, 30 + module, 0.2), true);
    b = Variable(random_tensor({kH, 4}, adapter, 40 + module, 0.2), true);
  }
  Variable operator()(const Variable& x) const {
    ops::LoraArguments lora{a, b, 2, 0.25, {.seed = 9, .step = 2, .module = module}};
    const Variable h = ops::rms_norm(x, norm, 1e-5);
    const Variable gate = ops::lora_linear(h, w, {}, lora);
    lora.key.module += 100;
    return ops::add(x, ops::swiglu(gate, ops::lora_linear(h, w, {}, lora)));
  }
  Variable norm, w, a, b;
  uint32_t module;
};

using Stack = std::function<Variable(const std::vector<Block>&, const Variable&)>;

// Output, gradient of the input (if wanted) and of every parameter of three blocks.
std::vector<Tensor> run(DType dtype, bool input_requires_grad, const Stack& stack) {
  const std::vector<Block> blocks{Block(dtype, 1), Block(dtype, 2), Block(dtype, 3)};
  const Variable x(random_tensor({kT, kH}, dtype, 1), input_requires_grad);
  const Variable y = stack(blocks, input_requires_grad ? ops::scale(x, 1) : x);
  backward(y, random_tensor({kT, kH}, dtype, 2));
  std::vector<Tensor> result{y.value()};
  if (input_requires_grad) result.push_back(x.grad());
  for (const Block& block : blocks)
    for (const Variable& p : {block.norm, block.a, block.b}) result.push_back(p.grad());
  return result;
}

Variable plain(const std::vector<Block>& blocks, const Variable& x) {
  Variable h = x;
  for (const Block& block : blocks) h = block(h);
  return h;
}

Variable per_block(const std::vector<Block>& blocks, const Variable& x) {
  Variable h = x;
  for (const Block& block : blocks) h = checkpoint(block, h);
  return h;
}

Variable nested(const std::vector<Block>& blocks, const Variable& x) {
  return checkpoint([blocks](const Variable& in) { return per_block(blocks, in); }, x);
}

void expect_same(const std::vector<Tensor>& actual, const std::vector<Tensor>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i)
    expect_same_bytes(actual[i], expected[i], concat("result ", i));
}

TEST(Checkpoint, GivesBitIdenticalGradients) {
  for (DType dtype : {DType::F32, DType::BF16, DType::F64})
    expect_same(run(dtype, true, per_block), run(dtype, true, plain));
}

TEST(Checkpoint, GivesBitIdenticalGradientsWhenNested) {
  for (DType dtype : {DType::F32, DType::BF16})
    expect_same(run(dtype, true, nested), run(dtype, true, plain));
}

TEST(Checkpoint, ReachesParametersWhereTheInputNeedsNoGradient) {
  expect_same(run(DType::F32, false, per_block), run(DType::F32, false, plain));
  expect_same(run(DType::F32, false, nested), run(DType::F32, false, plain));
}

TEST(Checkpoint, HoldsTheInputOfTheBlockAlone) {
  const UseReferenceBackend plain;  // keeps no buffers of its own
  const Block block(DType::F32, 1);
  const Variable x(random_tensor({kT, kH}, DType::F32, 1), true);
  const auto live = [] { return allocator_of(Device::CPU).stats().live_total; };
  const int64_t before = live();
  {
    const Variable y = block(x);
    const int64_t all = live() - before;
    EXPECT_GT(all, 4 * y.value().num_bytes());
  }
  ASSERT_EQ(live(), before);
  const Variable y = checkpoint(block, x);
  EXPECT_LT(live() - before, 2 * y.value().num_bytes());  // y, rounded up to a block
  backward(y, random_tensor({kT, kH}, DType::F32, 2));
  const int64_t grads = live() - before;
  EXPECT_LT(grads, 4 * y.value().num_bytes());  // y, and the gradients of the leaves
}

TEST(Checkpoint, RecordsNothingForAFrozenBlock) {
  const Variable x(random_tensor({3, 4}, DType::F32, 1), false);
  const Variable y = checkpoint([](const Variable& in) { return ops::scale(in, 2); }, x);
  EXPECT_FALSE(y.requires_grad());
  EXPECT_TRUE(y.is_leaf());
}

TEST(Checkpoint, GivesAZeroGradientToAnInputThatTheBlockIgnores) {
  const Variable p(random_tensor({3, 4}, DType::F32, 1), true);
  const Variable other(random_tensor({3, 4}, DType::F32, 2), true);
  const Variable y = checkpoint([p](const Variable&) { return ops::scale(p, 2); }, other);
  backward(y, random_tensor({3, 4}, DType::F32, 3));
  EXPECT_EQ(other.grad().to_doubles(), std::vector<double>(12, 0.0));
  expect_close(p.grad(), ops::scale(Variable(random_tensor({3, 4}, DType::F32, 3)), 2).value(),
               1e-6, "gradient of the parameter");
}

}  // namespace
}  // namespace graft
