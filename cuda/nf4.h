// NF4 weights (tensor/nf4.h) on the device: widened into a scratch that cuBLAS then reads.
//   rung 1  element  a thread per element
//   rung 2  words    a thread takes the four bytes of eight elements and writes 16 bytes
#pragma once

#include <cuda_runtime.h>

#include "tensor/tensor.h"

namespace graft {

constexpr int kNf4Rungs = 2;

// dst (dense, F32 or BF16) = src (NF4), of equally many elements, both on the device; each element
// rounded once.
void launch_widen_nf4(int rung, Tensor& dst, const Tensor& src, cudaStream_t stream);

}  // namespace graft
