// AdamW in one pass over parameter, moments and gradient, and the sum of squares that clipping
// needs.
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

// The order of operations of torch.optim.AdamW (its plain, unfused form):
//   p *= 1 - lr wd; m += (g - m) (1 - beta1); v = v beta2 + (1 - beta2) g g;
//   p -= step_size m / (sqrt(v) / sqrt(correction2) + epsilon)
void adamw(float* parameter, float* m, float* v, const float* gradient, int64_t n,
           const AdamWFactors& f) {
  for_each_vector(n, [&](int64_t i, auto lanes) {
    const Vec g = load(gradient + i, lanes) * f.grad_scale;
    const Vec old_m = load(m + i, lanes);
    const Vec new_m = old_m + f.one_minus_beta1 * (g - old_m);
    const Vec new_v = load(v + i, lanes) * f.beta2 + f.one_minus_beta2 * g * g;
    const Vec denominator = sqrt(new_v) / f.sqrt_correction2 + f.epsilon;
    const Vec p = load(parameter + i, lanes) * f.decay;
    store(m + i, new_m, lanes);
    store(v + i, new_v, lanes);
    store(parameter + i, p - f.step_size * new_m / denominator, lanes);
  });
}

double sum_of_squares(const float* x, int64_t n) {
  constexpr int kHalf = kLanes / 2, kSums = 8;
  typedef float Narrow __attribute__((vector_size(4 * kHalf)));
  typedef double Wide __attribute__((vector_size(8 * kHalf)));
  Wide sums[kSums]{};
  int64_t i = 0;
  for (; i + kSums * kHalf <= n; i += kSums * kHalf)
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) {
      Narrow narrow;
      std::memcpy(&narrow, x + i + s * kHalf, sizeof narrow);
      const Wide wide = __builtin_convertvector(narrow, Wide);
      sums[s] += wide * wide;
    }
  double total = 0;
  for (; i < n; ++i) total += double(x[i]) * double(x[i]);
  for (int s = 1; s < kSums; ++s) sums[0] += sums[s];
  for (int lane = 0; lane < kHalf; ++lane) total += sums[0][lane];
  return total;
}

}  // namespace

void install_adamw(CpuKernels& kernels) {
  kernels.adamw = adamw;
  kernels.sum_of_squares = sum_of_squares;
}

}  // namespace graft::GRAFT_ISA
