// What an adapter makes of a weight, as numbers: for merging, and for a DoRA adapter that is to
// become a LoRA one.
#pragma once

#include "models/adapter_file.h"

namespace graft {

// merged += weight (W' - W) in F32, W' being what the module makes of w: W + s B A for LoRA, and
// (m / n) (W + s B A) by row for DoRA, n_i the norm of row i of W + s B A.
//   merged (out, in) F32; w (out, in), any float dtype; both on the CPU
void add_delta(Tensor& merged, const Tensor& w, const AdapterModule& module, double weight);

}  // namespace graft
