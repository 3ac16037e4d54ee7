// Activation checkpointing (Chen et al. 2016): run a block without recording, keep its input alone,
// and run it again in the backward. Costs a forward, saves everything between. The gradients are
// bit-identical to those without: the same kernels run on the same bytes, dropout is keyed.
#pragma once

#include <functional>

#include "autograd/tape.h"

namespace graft {

// block(input) must be a function of `input`, of leaves (parameters) and of constants alone.
Variable checkpoint(std::function<Variable(const Variable&)> block, const Variable& input);

}  // namespace graft
