// Leaves and their gradients.
#include "autograd/variable.h"

namespace graft {

Variable::Variable(Tensor value, bool requires_grad) : state_(std::make_shared<State>()) {
  CHECK(value.defined(), "variable: the value is an undefined tensor");
  state_->value = std::move(value);
  state_->requires_grad = requires_grad;
}

void Variable::set_requires_grad(bool requires_grad) {
  CHECK(is_leaf(), "set_requires_grad: only a leaf can be frozen or freed, this is made by an op");
  state_->requires_grad = requires_grad;
}

void Variable::set_value(Tensor value) {
  CHECK(is_leaf(), "set_value: only a leaf can be given a value, this is made by an op");
  CHECK(value.defined() && value.shape() == shape(), "set_value: got ",
        value.defined() ? value.shape() : Shape{}, ", wanted ", shape());
  state_->value = std::move(value);
}

void Variable::set_grad(Tensor grad) {
  CHECK(is_leaf(), "set_grad: only a leaf keeps a gradient, this is made by an op");
  if (grad.defined()) {
    const DType wanted = value().dtype() == DType::F64 ? DType::F64 : DType::F32;
    CHECK(grad.shape() == shape(), "set_grad: got ", grad.shape(), ", wanted ", shape());
    CHECK(grad.dtype() == wanted, "set_grad: got ", dtype_name(grad.dtype()), ", wanted ",
          dtype_name(wanted));
    CHECK(grad.is_contiguous(), "set_grad: the rows of the gradient must be dense");
  }
  state_->grad = std::move(grad);
}

}  // namespace graft
