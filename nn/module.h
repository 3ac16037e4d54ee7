// Modules: structs of parameters that know their Hugging Face names. Each has one visit(prefix,
// visitor), which names its members; loading, freezing, counting, attaching adapters and saving are
// all visitors.
#pragma once

#include <string>

#include "autograd/variable.h"
#include "tensor/random.h"

namespace graft {

struct Embedding;
struct Linear;

// What walks a model. A module calls parameter() for each tensor it owns, with the full name as in
// the checkpoint
// ("model.layers.0.self_attn.q_proj.weight"); a Linear calls linear() first, with its module name
// (without ".weight"), an Embedding embedding().
class Visitor {
 public:
  virtual ~Visitor() = default;
  virtual void parameter(const std::string& /*name*/, Variable& /*value*/) {}
  virtual void linear(const std::string& /*name*/, Linear& /*module*/) {}
  virtual void embedding(const std::string& /*name*/, Embedding& /*module*/) {}
};

// What a forward pass needs to know beside its input: dropout is drawn while training only, by this
// key (module is filled in by each LoRA layer).
struct ForwardContext {
  bool training = false;
  DropoutKey dropout;
};

}  // namespace graft
