// Cross-entropy of one row of logits, with the gradient in place. A vocabulary is large (151,936
// floats are 600 KB), so the row is walked once for the sum, in blocks that stay in the L1 cache.
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

constexpr int64_t kBlock = 4096;

float block_max(const float* x, int64_t n) {
  Vec best = broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) best = max(load(x + i), best);
  float result = horizontal_max(best);
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// sum of e^(x - shift)
float block_sum(const float* x, int64_t n, float shift) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += exp(load(x + i) - shift);
  float result = horizontal_sum(sum);
  for (; i < n; ++i) result += exp(x[i] - shift);
  return result;
}

float cross_entropy(float* logits, int64_t cols, int64_t label, float scale, bool with_gradient) {
  float largest = -__builtin_inff();
  double sum = 0;  // of e^(logit - largest) so far
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
    const float in_block = block_max(logits + begin, n);
    if (in_block > largest) {
      if (begin > 0) sum *= exp(largest - in_block);
      largest = in_block;
    }
    sum += block_sum(logits + begin, n, largest);
  }
  const float log_sum_exp = largest + float(__builtin_log(sum));
  const float loss = log_sum_exp - logits[label];
  if (!with_gradient) return loss;
  const float factor = float(double(scale) / sum);
  for_each_vector(cols, [&](int64_t i, auto lanes) {
    store(logits + i, exp(load(logits + i, lanes) - largest) * factor, lanes);
  });
  logits[label] -= scale;
  return loss;
}

}  // namespace

void install_cross_entropy(CpuKernels& kernels) { kernels.cross_entropy = cross_entropy; }

}  // namespace graft::GRAFT_ISA
