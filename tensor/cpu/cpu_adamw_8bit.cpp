// AdamW with its moments in 8 bits: a block of 256 is widened into the stack, updated and quantised
// anew. Compiled for every x86-64: it is a small part of a step, and the bytes of a state do not
// depend on the machine.
#include <algorithm>
#include <cmath>

#include "tensor/blockwise8.h"
#include "tensor/cpu/cpu_backend.h"
#include "tensor/thread_pool.h"

namespace graft {
namespace {

constexpr int64_t kBlocks = 64;  // of one piece

struct Factors {
  float grad_scale, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, root_correction2,
      epsilon, step_size;
};

void update_block(float* w, uint8_t* m, float* m_absmax, uint8_t* v, float* v_absmax,
                  const float* gradient, int64_t n, const Factors& f) {
  float first[kBlock8], second[kBlock8];
  const float *signed_map = dynamic_map(true), *unsigned_map = dynamic_map(false);
  for (int64_t i = 0; i < n; ++i) first[i] = signed_map[m[i]] * *m_absmax;
  for (int64_t i = 0; i < n; ++i) second[i] = unsigned_map[v[i]] * *v_absmax;
  for (int64_t i = 0; i < n; ++i) {
    const float g = gradient[i] * f.grad_scale;
    first[i] = first[i] * f.beta1 + f.one_minus_beta1 * g;
    second[i] = second[i] * f.beta2 + f.one_minus_beta2 * g * g;
    const float denominator = std::sqrt(second[i]) / f.root_correction2 + f.epsilon;
    w[i] = w[i] * f.decay - f.step_size * (first[i] / denominator);
  }
  quantise_block8(m, m_absmax, first, n, true);
  quantise_block8(v, v_absmax, second, n, false);
}

}  // namespace

void CpuBackend::adamw_8bit(Tensor& parameter, State8& m, State8& v, const Tensor& gradient,
                            const Tensor& grad_scale, const AdamWStep& step) {
  if (std::isnan(grad_scale.item())) return;
  const double correction1 = 1 - std::pow(step.beta1, double(step.step));
  const double correction2 = 1 - std::pow(step.beta2, double(step.step));
  const Factors factors{float(grad_scale.item()),
                        float(1 - step.rate() * step.weight_decay),
                        float(step.beta1),
                        float(1 - step.beta1),
                        float(step.beta2),
                        float(1 - step.beta2),
                        float(std::sqrt(correction2)),
                        float(step.epsilon),
                        float(step.rate() / correction1)};
  const int64_t n = parameter.num_elements(), blocks = num_blocks8(n);
  thread_pool().run((blocks + kBlocks - 1) / kBlocks, [&](int64_t piece, int) {
    for (int64_t b = piece * kBlocks; b < std::min(blocks, (piece + 1) * kBlocks); ++b) {
      const int64_t at = b * kBlock8;
      update_block(parameter.data<float>() + at, m.codes.data<uint8_t>() + at,
                   m.absmax.data<float>() + b, v.codes.data<uint8_t>() + at,
                   v.absmax.data<float>() + b, gradient.data<float>() + at,
                   std::min(kBlock8, n - at), factors);
    }
  });
}

}  // namespace graft
