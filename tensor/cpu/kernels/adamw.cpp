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
  typedef double Wide __attribute__((vector_size(8 * kLanes)));
  Wide sum{};
  for_each_vector(n, [&](int64_t i, auto lanes) {
    const Wide wide = __builtin_convertvector(load(x + i, lanes), Wide);
    sum += wide * wide;
  });
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

}  // namespace

void install_adamw(CpuKernels& kernels) {
  kernels.adamw = adamw;
  kernels.sum_of_squares = sum_of_squares;
}

}  // namespace graft::GRAFT_ISA
