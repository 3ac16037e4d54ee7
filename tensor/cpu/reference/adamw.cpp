// AdamW (Loshchilov & Hutter 2019) in the order of torch.optim.AdamW, and the gradient norm.
//   w -= lr wd w      m += (1 - b1) (g - m)      v = b2 v + (1 - b2) g^2
//   w -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
#include <algorithm>
#include <cmath>
#include <vector>

#include "tensor/blockwise8.h"
#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::In;
using reference::Out;

void ReferenceBackend::sum_of_squares(Tensor& total, const Tensor& x) {
  In in(x);
  double sum = 0;
  for (int64_t r = 0; r < x.num_rows(); ++r)
    for (int64_t c = 0; c < x.cols(); ++c) sum += in(r, c) * in(r, c);
  total.data<double>()[0] = sum;
}

void ReferenceBackend::clip_factor(Tensor& outcome, double max_norm) {
  double *loss = outcome.data<double>(), *norm = loss + 1, *factor = loss + 2;
  *norm = std::sqrt(*norm);
  *factor = max_norm > 0 ? std::min(1.0, max_norm / (*norm + 1e-6)) : 1.0;
  if (!std::isfinite(*loss) || !std::isfinite(*norm)) *factor = std::nan("");
}

void ReferenceBackend::adamw(Tensor& parameter, Tensor& m, Tensor& v, const Tensor& gradient,
                             const Tensor& grad_scale, const AdamWStep& step) {
  const double scale = grad_scale.item();
  if (std::isnan(scale)) return;
  const double correction1 = 1 - std::pow(step.beta1, double(step.step));
  const double correction2 = 1 - std::pow(step.beta2, double(step.step));
  Out w(parameter), first(m), second(v);
  In grad(gradient);
  for (int64_t r = 0; r < parameter.num_rows(); ++r)
    for (int64_t c = 0; c < parameter.cols(); ++c) {
      const double g = grad(r, c) * scale;
      const double decayed = w.get(r, c) * (1 - step.rate() * step.weight_decay);
      const double new_m = first.get(r, c) + (1 - step.beta1) * (g - first.get(r, c));
      const double new_v = step.beta2 * second.get(r, c) + (1 - step.beta2) * g * g;
      first.set(r, c, new_m);
      second.set(r, c, new_v);
      const double denominator = std::sqrt(new_v) / std::sqrt(correction2) + step.epsilon;
      w.set(r, c, decayed - step.rate() / correction1 * new_m / denominator);
    }
}

namespace {

// One block: what codes stand for, and what is to be stored. The map's nearest value to the nearest
// of 65536 points, the lower of two, by looking at them all.
void widen8(std::vector<double>& x, const State8& state, int64_t block, bool is_signed) {
  const float absmax = state.absmax.data<float>()[block];
  for (size_t i = 0; i < x.size(); ++i)
    x[i] =
        dynamic_map(is_signed)[state.codes.data<uint8_t>()[block * kBlock8 + int64_t(i)]] * absmax;
}
void narrow8(State8& state, const std::vector<double>& x, int64_t block, bool is_signed) {
  const float* map = dynamic_map(is_signed);
  float absmax = 0;
  for (double value : x) absmax = std::max(absmax, std::abs(float(value)));
  state.absmax.data<float>()[block] = absmax;
  for (size_t i = 0; i < x.size(); ++i) {
    const float normed = absmax == 0 ? 0 : float(x[i]) * (1.0f / absmax);
    const double point = std::floor((normed + 1.0f) * 0.5f * 65535.0f + 0.5f) * 2 / 65535 - 1;
    int code = 0;
    while (code < 255 && (double(map[code]) + map[code + 1]) / 2 < point) ++code;
    state.codes.data<uint8_t>()[block * kBlock8 + int64_t(i)] = uint8_t(absmax == 0 ? 0 : code);
  }
}

}  // namespace

//   m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g^2
//   w = (1 - lr wd) w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
void ReferenceBackend::adamw_8bit(Tensor& parameter, State8& m, State8& v, const Tensor& gradient,
                                  const Tensor& grad_scale, const AdamWStep& step) {
  const double scale = grad_scale.item();
  if (std::isnan(scale)) return;
  const double correction1 = 1 - std::pow(step.beta1, double(step.step));
  const double correction2 = 1 - std::pow(step.beta2, double(step.step));
  float* w = parameter.data<float>();
  for (int64_t begin = 0, n = parameter.num_elements(); begin < n; begin += kBlock8) {
    std::vector<double> first(size_t(std::min(kBlock8, n - begin))), second(first.size());
    widen8(first, m, begin / kBlock8, true);
    widen8(second, v, begin / kBlock8, false);
    for (size_t i = 0; i < first.size(); ++i) {
      const double g = gradient.data<float>()[begin + int64_t(i)] * scale;
      first[i] = step.beta1 * first[i] + (1 - step.beta1) * g;
      second[i] = step.beta2 * second[i] + (1 - step.beta2) * g * g;
      const double denominator = std::sqrt(second[i]) / std::sqrt(correction2) + step.epsilon;
      const double decayed = w[begin + int64_t(i)] * (1 - step.rate() * step.weight_decay);
      w[begin + int64_t(i)] = float(decayed - step.rate() / correction1 * first[i] / denominator);
    }
    narrow8(m, first, begin / kBlock8, true);
    narrow8(v, second, begin / kBlock8, false);
  }
}

}  // namespace graft
