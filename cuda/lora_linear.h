// A linear layer with a low-rank adapter in three rungs, built upon the product by hand
// (gemm_by_hand.h). The engine composes it of cuBLAS products; this ladder shows what the two
// skinny products cost and how they disappear.
//   rung 1  naive     three products, one after the other; y is written, read and written again
//   rung 2  split-K   u = x A^T, a few columns wide, by as many blocks as the GPU needs
//   rung 3  fused     s u B^T as one more step of the accumulator of x W^T
#pragma once

#include <cuda_runtime.h>

#include "tensor/tensor.h"

namespace graft {

constexpr int kLoraRungs = 3;

// y (M, N) = x (M, K) weight (N, K)^T + scaling (x lora_a^T) lora_b^T on the device, all BF16, rows
// may be strided; lora_a (r, K), lora_b (N, r). Error unless K, the row strides and the addresses
// of x, weight and lora_a are multiples of 16 bytes; so must those of lora_b be in rung 3.
void lora_linear(int rung, Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                 const Tensor& lora_b, double scaling, cudaStream_t stream);

}  // namespace graft
