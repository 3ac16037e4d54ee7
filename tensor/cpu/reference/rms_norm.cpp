// RMSNorm and its gradient. With n = x rstd:
//   y = n w      dx = rstd (w dy - n mean(n w dy))      dw = sum over rows of dy n
#include <cmath>

#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::In;
using reference::Out;

void ReferenceBackend::rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x,
                                        const Tensor& weight, double eps) {
  const int64_t H = x.cols();
  Out out(y);
  In in(x), w(weight);
  for (int64_t r = 0; r < x.num_rows(); ++r) {
    double squares = 0;
    for (int64_t c = 0; c < H; ++c) squares += in(r, c) * in(r, c);
    const double inverse = 1 / std::sqrt(squares / H + eps);
    reference::store(rstd.dtype(), rstd.raw(), r, inverse);
    for (int64_t c = 0; c < H; ++c) out.set(r, c, in(r, c) * inverse * w(0, c));
  }
}

void ReferenceBackend::rms_norm_backward(Tensor& dx, Tensor& dweight, const Tensor& dy,
                                         const Tensor& x, const Tensor& weight,
                                         const Tensor& rstd) {
  const int64_t H = x.cols();
  In in(x), w(weight), grad(dy);
  for (int64_t r = 0; r < x.num_rows(); ++r) {
    const double inverse = reference::load(rstd.dtype(), rstd.raw(), r);
    if (dweight.defined())
      for (int64_t c = 0; c < H; ++c) Out(dweight).add(0, c, grad(r, c) * in(r, c) * inverse);
    if (!dx.defined()) continue;
    double mean = 0;  // of n w dy
    for (int64_t c = 0; c < H; ++c) mean += in(r, c) * inverse * w(0, c) * grad(r, c) / H;
    for (int64_t c = 0; c < H; ++c)
      Out(dx).set(r, c, inverse * (w(0, c) * grad(r, c) - in(r, c) * inverse * mean));
  }
}

}  // namespace graft
