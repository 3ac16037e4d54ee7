// AdamW (Loshchilov & Hutter 2019) in the order of torch.optim.AdamW, and the gradient norm.
//   w -= lr wd w      m += (1 - b1) (g - m)      v = b2 v + (1 - b2) g^2
//   w -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
#include <algorithm>
#include <cmath>

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
      const double decayed = w.get(r, c) * (1 - step.learning_rate * step.weight_decay);
      const double new_m = first.get(r, c) + (1 - step.beta1) * (g - first.get(r, c));
      const double new_v = step.beta2 * second.get(r, c) + (1 - step.beta2) * g * g;
      first.set(r, c, new_m);
      second.set(r, c, new_v);
      const double denominator = std::sqrt(new_v) / std::sqrt(correction2) + step.epsilon;
      w.set(r, c, decayed - step.learning_rate / correction1 * new_m / denominator);
    }
}

}  // namespace graft
