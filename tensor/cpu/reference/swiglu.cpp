// SwiGLU. With s = sigmoid(gate): y = gate s up
//   dgate = dy up s (1 + gate (1 - s))      dup = dy gate s
#include <cmath>

#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::In;
using reference::Out;

void ReferenceBackend::swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up) {
  Out out(y);
  In in_gate(gate), in_up(up);
  for (int64_t r = 0; r < y.num_rows(); ++r)
    for (int64_t c = 0; c < y.cols(); ++c) {
      const double g = in_gate(r, c);
      out.set(r, c, g / (1 + std::exp(-g)) * in_up(r, c));
    }
}

void ReferenceBackend::swiglu_backward(Tensor& dgate, Tensor& dup, const Tensor& dy,
                                       const Tensor& gate, const Tensor& up) {
  In grad(dy), in_gate(gate), in_up(up);
  for (int64_t r = 0; r < dy.num_rows(); ++r)
    for (int64_t c = 0; c < dy.cols(); ++c) {
      // All three are read before anything is written: the outputs may be the inputs.
      const double d = grad(r, c), g = in_gate(r, c), u = in_up(r, c);
      const double s = 1 / (1 + std::exp(-g));
      if (dgate.defined()) Out(dgate).set(r, c, d * u * s * (1 + g * (1 - s)));
      if (dup.defined()) Out(dup).set(r, c, d * g * s);
    }
}

}  // namespace graft
