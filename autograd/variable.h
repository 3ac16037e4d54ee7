// Variable: a Tensor that gradients flow to. A handle; copies share the value and the gradient.
// Read tape.h next: record() makes the output of an op, backward() walks what record() left.
#pragma once

#include <memory>
#include <string>

#include "tensor/tensor.h"

namespace graft {

struct Node;

class Variable {
 public:
  Variable() = default;  // undefined: an absent bias, say
  explicit Variable(Tensor value, bool requires_grad = false);

  bool defined() const { return state_ != nullptr; }
  const Tensor& value() const { return state_->value; }
  const Shape& shape() const { return state_->value.shape(); }
  // Whether a gradient with respect to this is wanted: set on leaves, OR-ed over the inputs of an
  // op. It is set even while recording is off (NoRecord): checkpointing depends on it.
  bool requires_grad() const { return state_ && state_->requires_grad; }

  // Leaves only. The gradient of a leaf is F32 (F64 for an F64 leaf) whatever the value's dtype; it
  // is accumulated into `grad` when one was given (a view of the flat ParameterBuffer), else into a
  // tensor made at the first contribution. Undefined before that.
  void set_requires_grad(bool requires_grad);
  void set_value(Tensor value);  // same shape; for a working copy or a moved buffer
  void set_grad(Tensor grad);
  const Tensor& grad() const { return state_->grad; }
  bool is_leaf() const { return state_->node == nullptr; }

  struct State {
    Tensor value;
    Tensor grad;
    bool requires_grad = false;
    std::shared_ptr<Node> node;  // what made this; null for leaves and where nothing was recorded
  };
  const std::shared_ptr<State>& state() const { return state_; }

 private:
  std::shared_ptr<State> state_;
};

}  // namespace graft
