// NaN and infinity: what no weight and no adapter may hold.
#pragma once

#include "tensor/tensor.h"

namespace graft {

// Whether no element is NaN or infinite. Dense F32, BF16 or F16, on the CPU; at the speed of
// memory.
bool all_finite(const Tensor& tensor);

}  // namespace graft
