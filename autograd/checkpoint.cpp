// Recomputation of a block in the backward.
#include "autograd/checkpoint.h"

#include "autograd/node.h"
#include "tensor/backend.h"

namespace graft {

namespace {

// The gradient of the block's input, where needed, and those of its parameters, into their leaves.
Tensor recompute(const std::function<Variable(const Variable&)>& block, const Tensor& x,
                 const Tensor& dy, bool needed) {
  // The input is an activation here too, not a leaf: its gradient is summed in its own dtype, as it
  // would be without the checkpoint.
  auto dx = std::make_shared<Tensor>();
  Variable input = needed ? record_node("checkpoint input", x, {},
                                        [dx](const Tensor& grad, const Needs&) {
                                          *dx = grad;
                                          return std::vector<Tensor>{};
                                        })
                          : Variable(x);
  Record on;
  Variable y = block(input);
  input = Variable();
  backward(y, dy);
  if (needed && !dx->defined()) {  // the block does not look at its input
    *dx = Tensor::empty(x.shape(), x.dtype(), x.device());
    backend_of(x).fill(*dx, 0);
  }
  return std::move(*dx);
}

}  // namespace

Variable checkpoint(std::function<Variable(const Variable&)> block, const Variable& input) {
  if (!recording()) return block(input);
  Variable y;
  {
    NoRecord off;
    y = block(input);
  }
  // The flag flows with recording off: it tells of the parameters inside too, and a node is made
  // for their sake even where the input needs no gradient.
  if (!y.requires_grad()) return y;
  return record_node(
      "checkpoint", y.value(), {input},
      [block = std::move(block), x = input.value()](const Tensor& dy, const Needs& needs) {
        return std::vector<Tensor>{recompute(block, x, dy, needs[0])};
      });
}

}  // namespace graft
