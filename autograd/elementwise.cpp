// add, reshape, scale, swiglu.
#include "autograd/op_check.h"
#include "autograd/ops.h"
#include "autograd/tape.h"

namespace graft::ops {

Variable add(const Variable& a, const Variable& b) {
  check_activation("add", "a", a, 0);
  check_activation("add", "b", b, 0);
  check_same("add", "b", b, a);
  check_dense("add", "a", a);
  check_dense("add", "b", b);
  CHECK(a.shape() == b.shape(), "add: a is ", a.shape(), " but b is ", b.shape());
  Tensor y = empty_like(a.value());
  backend_of(y).add(y, a.value(), b.value());
  // dy itself goes to both: the tape adds in place only into what it alone holds.
  return record("add", std::move(y), {a, b}, [](const Tensor& dy, const Needs&) {
    return std::vector<Tensor>{dy, dy};
  });
}

Variable reshape(const Variable& x, Shape shape) {
  CHECK(x.defined(), "reshape: x is undefined");
  CHECK(shape.num_elements() == x.shape().num_elements(), "reshape: ", x.shape(), " to ", shape);
  return record("reshape", x.value().reshape(shape), {x},
                [from = x.shape()](const Tensor& dy, const Needs&) {
                  return std::vector<Tensor>{dy.reshape(from)};
                });
}

Variable scale(const Variable& x, double alpha) {
  check_activation("scale", "x", x, 0);
  check_dense("scale", "x", x);
  Tensor y = empty_like(x.value());
  backend_of(y).scale(y, x.value(), alpha);
  return record("scale", std::move(y), {x}, [alpha](const Tensor& dy, const Needs&) {
    Tensor dx = reuse_or_empty(dy);
    backend_of(dx).scale(dx, dy, alpha);
    return std::vector<Tensor>{dx};
  });
}

Variable swiglu(const Variable& gate, const Variable& up) {
  check_activation("swiglu", "gate", gate, 0);
  check_activation("swiglu", "up", up, 0);
  check_same("swiglu", "up", up, gate);
  check_dense("swiglu", "gate", gate);
  check_dense("swiglu", "up", up);
  CHECK(gate.shape() == up.shape(), "swiglu: gate is ", gate.shape(), " but up is ", up.shape());
  Tensor y = empty_like(gate.value());
  backend_of(y).swiglu_forward(y, gate.value(), up.value());
  return record("swiglu", std::move(y), {gate, up},
                [gate = gate.value(), up = up.value()](const Tensor& dy, const Needs& needs) {
                  // The gradients overwrite the saved gate and up: the widest activations of a
                  // block need no second copy.
                  Tensor dgate, dup;
                  if (needs[0]) dgate = reuse_or_empty(gate);
                  if (needs[1]) dup = reuse_or_empty(up);
                  backend_of(dy).swiglu_backward(dgate, dup, dy, gate, up);
                  return std::vector<Tensor>{dgate, dup};
                });
}

}  // namespace graft::ops
