// rms_norm.
#include "autograd/op_check.h"
#include "autograd/ops.h"
#include "autograd/tape.h"

namespace graft::ops {

Variable rms_norm(const Variable& x, const Variable& weight, double eps, int64_t spare_cols) {
  check_activation("rms_norm", "x", x, 0);
  CHECK(weight.defined() && x.value().rank() > 0, "rms_norm: x must have a last dimension");
  check_weight("rms_norm", "weight", weight, Shape{x.value().cols()}, x);
  const Tensor& in = x.value();
  CHECK(spare_cols == 0 || in.rank() == 2, "rms_norm: x is ", in.shape(),
        ", wanted a matrix where y gets spare columns");
  Tensor y = spare_cols == 0 ? empty_like(in)
                             : Tensor::with_spare_cols(in.size(0), in.size(1), spare_cols,
                                                       in.dtype(), in.device());
  Tensor rstd = Tensor::empty({in.num_rows()}, wide(in.dtype()), in.device());
  backend_of(in).rms_norm_forward(y, rstd, in, weight.value(), eps);
  return record("rms_norm", std::move(y), {x, weight},
                [in, rstd, w = weight.value()](const Tensor& dy, const Needs& needs) {
                  Tensor dx, dw;
                  if (needs[0]) dx = empty_like(in);
                  if (needs[1]) dw = zeros_like(w, wide(in.dtype()));
                  backend_of(in).rms_norm_backward(dx, dw, dy, in, w, rstd);
                  return std::vector<Tensor>{dx, dw};
                });
}

}  // namespace graft::ops
