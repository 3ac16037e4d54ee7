// The tape: nodes left by ops, and the walk that turns them into gradients.
#include "autograd/tape.h"

#include <atomic>
#include <map>

#include "autograd/node.h"
#include "tensor/backend.h"

namespace graft {

namespace {

bool& recording_flag() {
  thread_local bool on = true;
  return on;
}

int64_t next_node_id() {
  static std::atomic<int64_t> id{0};
  return ++id;
}

Edge edge_to(const Variable& input) {
  Edge edge;
  if (!needs_grad(input)) return edge;
  edge.shape = input.shape();
  edge.dtype = input.value().dtype();
  if (input.is_leaf())
    edge.leaf = input.state();
  else
    edge.producer = input.state()->node;
  return edge;
}

// leaf.grad += grad. A gradient that nobody else holds becomes the leaf's own.
void accumulate_leaf(Variable::State& leaf, Tensor grad) {
  const DType dtype = leaf.value.dtype() == DType::F64 ? DType::F64 : DType::F32;
  if (!leaf.grad.defined() && grad.dtype() == dtype && grad.use_count() == 1 &&
      grad.is_contiguous()) {
    leaf.grad = std::move(grad);
    return;
  }
  Backend& backend = backend_of(leaf.value);
  if (!leaf.grad.defined()) {
    leaf.grad = Tensor::empty(grad.shape(), dtype, grad.device());
    backend.copy(leaf.grad, grad);
  } else {
    backend.axpy(leaf.grad, grad, 1);
  }
}

// node.dy += grad. In place only where nobody else sees the bytes: an op may hand the same tensor
// to two inputs (add), and a branch that is still to run may hold what looks like ours.
void accumulate_activation(Node& node, Tensor grad) {
  if (!node.dy.defined()) {
    node.dy = std::move(grad);
    return;
  }
  Backend& backend = backend_of(grad);
  if (node.dy.use_count() == 1) {
    backend.add(node.dy, node.dy, grad);
  } else if (grad.use_count() == 1) {
    backend.add(grad, node.dy, grad);
    node.dy = std::move(grad);
  } else {
    Tensor sum = Tensor::empty(grad.shape(), grad.dtype(), grad.device());
    backend.add(sum, node.dy, grad);
    node.dy = std::move(sum);
  }
}

void check_gradient(const char* name, size_t i, const Edge& edge, const Tensor& grad) {
  CHECK(grad.defined(), name, ": the backward returned no gradient for input ", i,
        ", which needs one");
  CHECK(grad.shape() == edge.shape, name, ": the gradient of input ", i, " is ", grad.shape(),
        ", wanted ", edge.shape);
  const DType wide = edge.dtype == DType::F64 ? DType::F64 : DType::F32;
  CHECK(grad.dtype() == edge.dtype || (edge.leaf && grad.dtype() == wide), name,
        ": the gradient of input ", i, " is ", dtype_name(grad.dtype()), ", wanted ",
        dtype_name(edge.dtype));
}

// Nodes that have a gradient and are still to run, by id: the last made runs first, and then all
// the consumers of its output have run.
using Ready = std::map<int64_t, std::shared_ptr<Node>>;

void run_node(std::shared_ptr<Node> node, Ready& ready) {
  CHECK(node->backward, node->name, ": backward ran through here before; the graph is used up");
  std::vector<Edge> inputs = std::move(node->inputs);
  Needs needs;
  for (const Edge& edge : inputs) needs.push_back(edge.needed());
  const char* name = node->name;
  Backward closure = std::move(node->backward);
  node->backward = nullptr;
  Tensor dy = std::move(node->dy);
  node.reset();
  std::vector<Tensor> grads = closure(dy, needs);
  // Saved activations and dy go before the gradients are summed: what came back may now be ours.
  closure = nullptr;
  dy = Tensor();
  CHECK(grads.size() == inputs.size(), name, ": the backward returned ", grads.size(),
        " gradients for ", inputs.size(), " inputs");
  for (size_t i = 0; i < inputs.size(); ++i)
    if (!inputs[i].needed()) grads[i] = Tensor();
  for (size_t i = 0; i < inputs.size(); ++i) {
    Edge& edge = inputs[i];
    if (!edge.needed()) continue;
    check_gradient(name, i, edge, grads[i]);
    if (edge.leaf) {
      accumulate_leaf(*edge.leaf, std::move(grads[i]));
    } else {
      accumulate_activation(*edge.producer, std::move(grads[i]));
      ready.emplace(edge.producer->id, std::move(edge.producer));
    }
    edge = Edge();
  }
}

}  // namespace

Node::~Node() {
  std::vector<std::shared_ptr<Node>> doomed;
  const auto take = [&doomed](Node& node) {
    for (Edge& edge : node.inputs)
      if (edge.producer) doomed.push_back(std::move(edge.producer));
  };
  take(*this);
  while (!doomed.empty()) {
    std::shared_ptr<Node> node = std::move(doomed.back());
    doomed.pop_back();
    if (node.use_count() == 1) take(*node);  // dies at the end of this round, childless
  }
}

Variable record_node(const char* name, Tensor output, const std::vector<Variable>& inputs,
                     Backward backward) {
  auto node = std::make_shared<Node>();
  node->name = name;
  node->id = next_node_id();
  for (const Variable& input : inputs) node->inputs.push_back(edge_to(input));
  node->backward = std::move(backward);
  Variable result(std::move(output), true);
  result.state()->node = std::move(node);
  return result;
}

Variable record(const char* name, Tensor output, std::vector<Variable> inputs, Backward backward) {
  bool wanted = false;
  for (const Variable& input : inputs) wanted = wanted || needs_grad(input);
  if (!wanted || !recording()) return Variable(std::move(output), wanted);
  return record_node(name, std::move(output), inputs, std::move(backward));
}

bool needs_grad(const Variable& input) { return input.requires_grad(); }
bool recording() { return recording_flag(); }

void backward(const Variable& loss) {
  CHECK(loss.defined() && loss.value().num_elements() == 1, "backward: the loss has shape ",
        loss.defined() ? loss.shape() : Shape{}, ", wanted one element");
  Tensor one = Tensor::empty(loss.shape(), loss.value().dtype(), loss.value().device());
  backend_of(one).fill(one, 1);
  backward(loss, one);
}

void backward(const Variable& output, const Tensor& dy) {
  CHECK(output.requires_grad(), "backward: nothing that led here requires a gradient");
  CHECK(dy.shape() == output.shape() && dy.dtype() == output.value().dtype(), "backward: dy is ",
        dtype_name(dy.dtype()), " ", dy.shape(), ", wanted ", dtype_name(output.value().dtype()),
        " ", output.shape());
  CHECK(dy.is_contiguous(), "backward: the rows of dy are ", dy.row_stride(),
        " elements apart, wanted dense rows");
  if (output.is_leaf()) {
    accumulate_leaf(*output.state(), dy);
    return;
  }
  Ready ready;
  accumulate_activation(*output.state()->node, dy);
  ready.emplace(output.state()->node->id, output.state()->node);
  while (!ready.empty()) {
    const auto last = std::prev(ready.end());
    std::shared_ptr<Node> node = std::move(last->second);
    ready.erase(last);
    run_node(std::move(node), ready);
  }
}

NoRecord::NoRecord() : previous_(recording_flag()) { recording_flag() = false; }
NoRecord::~NoRecord() { recording_flag() = previous_; }
Record::Record() : previous_(recording_flag()) { recording_flag() = true; }
Record::~Record() { recording_flag() = previous_; }

}  // namespace graft
