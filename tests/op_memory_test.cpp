// What ops allocate: no T x T scores, no T x V logits, and on Device::Meta the same bytes as on the
// CPU, which is how the memory of a step is predicted.
#include <gtest/gtest.h>

#include "autograd/checkpoint.h"
#include "autograd/ops.h"
#include "autograd/tape.h"
#include "tensor/backend.h"
#include "tests/op_cases.h"

namespace graft {
namespace {

// The most that was live above the start while body ran, on a device.
template <class Body>
int64_t peak_of(Device device, Body&& body) {
  Allocator& allocator = allocator_of(device);
  const int64_t before = allocator.stats().live_total;
  allocator.reset_peak();
  body();
  return allocator.stats().peak_total - before;
}

int64_t attention_peak(int64_t T) {
  const int64_t heads = 2, D = 8;
  const Tensor cu = Tensor::from_ints({2}, {0, int32_t(T)});
  const Variable q(random_tensor({T, heads, D}, DType::F32, 1), true);
  const Variable k(random_tensor({T, 1, D}, DType::F32, 2), true);
  const Variable v(random_tensor({T, 1, D}, DType::F32, 3), true);
  const Tensor dy = random_tensor({T, heads, D}, DType::F32, 4);
  return peak_of(Device::CPU, [&] {
    const Variable y = ops::attention(q, k, v, cu, 0.35);
    backward(y, dy);
  });
}

// Twice the tokens, twice the bytes: a matrix of T x T would take four times. What there is, is
// mostly the gradients of k and v of eight segments of queries, with D rounded up to a vector: 2
// MiB at T = 1024 with AVX-512, as much as half a T x T matrix.
TEST(AttentionMemory, NeverHoldsAllScores) {
  const int64_t T = 2048, peak = attention_peak(T);
  EXPECT_LT(peak, T * T * 4 / 2);
  EXPECT_LE(double(peak), 2.05 * double(attention_peak(T / 2)));
}

// On the reference backend: the fast one packs operands into buffers of its own, of a fixed size.
TEST(CrossEntropyMemory, HoldsOneChunkOfLogits) {
  const UseReferenceBackend plain;
  const int64_t T = 600, V = 1000, H = 16, chunk = 64;
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < T; ++t) ids.push_back(int32_t(t * 7 % V));
  const Tensor labels = Tensor::from_ints({T}, ids);
  const Variable hidden(random_tensor({T, H}, DType::F32, 1), true);
  const Variable weight(random_tensor({V, H}, DType::F32, 2), true);
  const int64_t peak = peak_of(Device::CPU, [&] {
    const Variable loss = ops::linear_cross_entropy(hidden, weight, labels, 1, nullptr, chunk);
    backward(loss);
  });
  EXPECT_LT(peak, T * V * 4 / 3);
  EXPECT_GT(peak, chunk * V * 4);
}

// Rows without a label cost nothing: one labelled row makes a chunk of one row.
TEST(CrossEntropyMemory, PaysForLabelledRowsAlone) {
  const UseReferenceBackend plain;
  const int64_t T = 600, V = 1000, H = 16;
  std::vector<int32_t> ids(T, ops::kIgnoreLabel);
  ids[17] = 3;
  const Variable hidden(random_tensor({T, H}, DType::F32, 1), true);
  const Variable weight(random_tensor({V, H}, DType::F32, 2), false);
  const int64_t peak = peak_of(Device::CPU, [&] {
    backward(ops::linear_cross_entropy(hidden, weight, Tensor::from_ints({T}, ids), 1));
  });
  EXPECT_LT(peak, 3 * hidden.value().num_bytes());
}

Variable random_or_meta(Device device, Shape shape, DType dtype, bool requires_grad) {
  return Variable(device == Device::Meta ? Tensor::empty(shape, dtype, device)
                                         : random_tensor(shape, dtype, 1, 0.1),
                  requires_grad);
}

// One decoder-like block and the loss, forward and backward, with every op of ops.h.
void train_step(Device device, DType dtype, bool checkpointed) {
  const int64_t T = 70, H = 32, V = 90, heads = 4, D = 8;
  const auto weight = [&](Shape shape) { return random_or_meta(device, shape, dtype, false); };
  const auto adapter = [&](Shape shape) { return random_or_meta(device, shape, DType::F32, true); };
  std::vector<int32_t> ids, at;
  for (int32_t t = 0; t < T; ++t) {
    ids.push_back(t % 5 ? t : ops::kIgnoreLabel);
    at.push_back(t);
  }
  const Tensor labels = Tensor::from_ints({T}, ids), positions = Tensor::from_ints({T}, at);
  const Tensor cu = make_cu_seqlens(T);
  const Tensor table = random_or_meta(device, {T, D}, DType::F32, false).value();
  const Variable embed = random_or_meta(device, {V, H}, dtype, true);
  const Variable norm = weight({H}), head_norm = weight({D}), w = weight({H, H}),
                 bias = weight({H});
  const ops::LoraArguments lora{adapter({4, H}), adapter({H, 4}), 2, 0.1};
  const auto block = [&](const Variable& x) {
    const Variable h = ops::rms_norm(x, norm, 1e-5);
    const Variable q = ops::reshape(ops::lora_linear(h, w, bias, lora), {T, heads, D});
    const Variable k = ops::reshape(ops::linear(h, w), {T, heads, D});
    const Variable turned = ops::qk_norm_rope(k, head_norm, 1e-5, positions, table);
    const Variable y = ops::attention(ops::rope(q, positions, table), turned, k, cu, 0.3);
    const Variable out = ops::add(x, ops::reshape(y, {T, H}));
    return ops::add(out, ops::scale(ops::swiglu(ops::lora_linear(out, w, {}, lora), out), 0.5));
  };
  Variable x = ops::embedding(positions, embed, dtype);
  for (int layer = 0; layer < 3; ++layer) x = checkpointed ? checkpoint(block, x) : block(x);
  backward(ops::linear_cross_entropy(x, embed, labels, 0.01, nullptr, 16));
}

// The reference backend asks the allocator for nothing of its own. CPU integers are no part of it.
TEST(Meta, AStepTakesTheBytesThatItTakesOnTheCpu) {
  const UseReferenceBackend plain;
  for (DType dtype : {DType::F32, DType::BF16})
    for (bool checkpointed : {false, true}) {
      const auto step = [&](Device device) {
        return peak_of(device, [&] { train_step(device, dtype, checkpointed); });
      };
      const int64_t meta = step(Device::Meta), cpu = step(Device::CPU);
      EXPECT_NEAR(double(meta) / double(cpu), 1, 0.02) << meta << " and " << cpu << " bytes";
    }
  EXPECT_EQ(allocator_of(Device::Meta).stats().live_total, 0);
}

TEST(Meta, CheckpointingLowersThePeak) {
  const auto step = [](bool checkpointed) {
    return peak_of(Device::Meta, [&] { train_step(Device::Meta, DType::F32, checkpointed); });
  };
  EXPECT_LT(step(true), step(false) * 2 / 3);
}

}  // namespace
}  // namespace graft
