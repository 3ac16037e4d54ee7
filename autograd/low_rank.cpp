// What frozen adapters make of a layer: two narrow products, and for DoRA a factor for each column.
// Nothing of the activations is saved.
#include "autograd/op_check.h"
#include "autograd/ops.h"
#include "autograd/tape.h"

namespace graft::ops {

Variable add_low_rank(const Variable& base, const Variable& x, const Tensor& a, const Tensor& b,
                      double scaling) {
  const char* op = "add_low_rank";
  check_activation(op, "x", x, 2);
  check_activation(op, "base", base, 2);
  check_same(op, "base", base, x);
  const int64_t tokens = x.shape()[0], r = a.size(0);
  check_weight(op, "A", Variable(a), Shape{r, x.shape()[1]}, x);
  check_weight(op, "B", Variable(b), Shape{base.shape()[1], r}, x);
  CHECK(base.shape()[0] == tokens, op, ": base is ", base.shape(), " but x is ", x.shape());
  const auto product = [scaling](const Tensor& in, const Tensor& first, const Tensor& second,
                                 bool transpose, Tensor& out, const Tensor& addend) {
    Tensor narrow = Tensor::empty({in.size(0), transpose ? first.size(0) : first.size(1)},
                                  low_rank_dtype(in), in.device(), Scope::Scratch);
    const GemmTerm down{.a = in, .b = first, .transpose_b = transpose};
    backend_of(in).gemm(narrow, {&down, 1});
    const GemmTerm up{.a = narrow, .b = second, .transpose_b = transpose, .alpha = scaling};
    backend_of(in).gemm(out, {&up, 1}, addend);
  };
  Tensor y = empty_like(base.value());
  product(x.value(), a, b, true, y, base.value());
  return record(op, std::move(y), {base, x}, [a, b, product](const Tensor& dy, const Needs& needs) {
    Tensor dx;
    if (needs[1]) {
      dx = Tensor::empty({dy.size(0), a.size(1)}, dy.dtype(), dy.device());
      product(dy, b, a, false, dx, {});
    }
    return std::vector<Tensor>{needs[0] ? dy : Tensor(), dx};
  });
}

Variable scale_columns(const Variable& h, const DoraFactor& rows, const Variable& bias) {
  const char* op = "scale_columns";
  check_activation(op, "h", h, 2);
  const Shape columns{h.shape()[1]};
  check_weight(op, "the factor", rows.magnitude, columns, h);
  check_weight(op, "the norm", Variable(rows.norm), columns, h);
  if (bias.defined()) check_weight(op, "bias", bias, columns, h);
  CHECK(!needs_grad(rows.magnitude) && !needs_grad(bias), op,
        ": the factor and the bias must be frozen");
  const DoraScale scale{rows.magnitude.value(), rows.norm};
  Tensor y = empty_like(h.value());
  backend_of(y).dora_scale(y, h.value(), scale, bias.defined() ? bias.value() : Tensor(), false);
  return record(op, std::move(y), {h}, [scale](const Tensor& dy, const Needs&) {
    Tensor dh = empty_like(dy), none;
    backend_of(dy).dora_scale_backward(dh, none, dy, dy, scale, false);
    return std::vector<Tensor>{dh};
  });
}

}  // namespace graft::ops
