// The variants of cross-entropy by themselves, for tests and bench; everybody else calls the
// Backend. Tensors as in tensor/backend.h, all on the device.
//   1  one thread per row, three passes      2  one block per row, online softmax, two passes
#pragma once

#include <cuda_runtime.h>

#include "tensor/tensor.h"

namespace graft {

void launch_cross_entropy(int variant, Tensor& losses, Tensor& logits, const Tensor& labels,
                          double scale, bool with_gradient, cudaStream_t stream);

}  // namespace graft
