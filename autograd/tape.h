// Reverse-mode differentiation by a tape of closures. An op computes its output with the backend,
// then calls record() with a closure whose capture list is the list of saved activations.
//
// A node is dropped as soon as its backward has run (closure, inputs, dy), so activations die in
// the order in which gradients are made, and after backward() no byte of the graph is live.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "autograd/variable.h"

namespace graft {

// needs[i]: whether the gradient of input i is wanted. The closure returns one tensor per input, in
// order; where needs[i] is false the tensor may be left undefined, and must not be paid for.
using Needs = std::vector<bool>;
using Backward = std::function<std::vector<Tensor>(const Tensor& dy, const Needs& needs)>;

// The output of an op. With recording on and an input that requires a gradient, a node holds the
// inputs and the closure; else the closure is dropped here, and with it what it saved.
Variable record(const char* name, Tensor output, std::vector<Variable> inputs, Backward backward);

// What `needs` will be for these inputs: an op asks this before it saves an activation.
bool needs_grad(const Variable& input);  // false when undefined
bool recording();

// d loss / d leaf, accumulated into every reachable leaf that requires it. loss has one element;
// its gradient is 1. Nodes run by creation id, descending; no recursion. Each node's result is
// checked (shape, and dtype: that of the value for activations, F32/F64 for leaves).
void backward(const Variable& loss);
// The same from any output with a given gradient: checkpoint() uses it.
void backward(const Variable& output, const Tensor& dy);

// While it lives, ops compute and record nothing.
class NoRecord {
 public:
  NoRecord();
  ~NoRecord();
  NoRecord(const NoRecord&) = delete;

 private:
  bool previous_;
};
// The opposite, for the recomputation inside a checkpoint.
class Record {
 public:
  Record();
  ~Record();
  Record(const Record&) = delete;

 private:
  bool previous_;
};

}  // namespace graft
