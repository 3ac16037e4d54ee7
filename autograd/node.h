// What record() leaves on the tape. Private to autograd/: tape.cpp walks it, checkpoint.cpp splices
// it.
#pragma once

#include <memory>

#include "autograd/tape.h"

namespace graft {

// Where the gradient of an input goes. It holds no value of an activation, only what is needed to
// check a gradient: an activation lives as long as a closure saved it, and no longer.
struct Edge {
  std::shared_ptr<Node> producer;         // of an activation
  std::shared_ptr<Variable::State> leaf;  // of a leaf
  Shape shape;
  DType dtype = DType::F32;
  bool needed() const { return producer || leaf; }
};

struct Node {
  const char* name = "";
  int64_t id = 0;  // creation order: every consumer of the output has a higher one
  std::vector<Edge> inputs;
  Backward backward;  // empty once it has run
  Tensor dy;          // gradient of the output, summed over the consumers that have run

  Node() = default;
  ~Node();  // without recursion: a graph may be a chain of any length
  Node(const Node&) = delete;
};

// A variable made by a new node on which a gradient arrives whether or not recording is on.
Variable record_node(const char* name, Tensor output, const std::vector<Variable>& inputs,
                     Backward backward);

}  // namespace graft
