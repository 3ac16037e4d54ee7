// The variants of RMSNorm by themselves, for tests and bench; everybody else calls the Backend.
// Tensors as in tensor/backend.h, all on the device.
#pragma once

#include <cuda_runtime.h>

#include "tensor/tensor.h"

namespace graft {

void launch_rms_norm_forward(int variant, Tensor& y, Tensor& rstd, const Tensor& x,
                             const Tensor& weight, double eps, cudaStream_t stream);
void launch_rms_norm_dx(int variant, Tensor& dx, const Tensor& dy, const Tensor& x,
                        const Tensor& weight, const Tensor& rstd, cudaStream_t stream);

}  // namespace graft
