// The matrix product in seven rungs, from the formula to tensor cores behind a pipeline. The engine
// multiplies by cuBLAS (gemm.cu); this ladder shows what a fast product is made of, and the last
// rung is what lora_linear.cu builds upon.
//   rung 1  naive         one thread per output                          gemm_by_hand.cu
//   rung 2  shared tiles  each element is read once per block
//   rung 3  registers     64 outputs a thread, 16-byte loads
//   rung 4  tensor cores  mma.sync and ldmatrix, with bank conflicts     gemm_by_hand_mma.cu
//   rung 5  swizzle       the same without the conflicts
//   rung 6  pipeline      cp.async loads four tiles ahead
//   rung 7  large tiles   64 x 64 a warp, blocks in an order that L2 likes
#pragma once

#include <cuda_runtime.h>

#include "tensor/tensor.h"

namespace graft {

constexpr int kGemmRungs = 7;

// c (M, N) = a (M, K) * b (N, K)^T on the device, summed in F32 and rounded once; rows may be
// strided. Rungs 1 to 3: all F32 or all BF16; 4 to 7: BF16. From rung 3 on a and b are read 16
// bytes at a time: Error unless K, their row strides and their addresses allow that.
void gemm_by_hand(int rung, Tensor& c, const Tensor& a, const Tensor& b, cudaStream_t stream);

// Rungs 4 to 7, for gemm_by_hand, which checks the arguments.
void gemm_by_hand_mma(int rung, Tensor& c, const Tensor& a, const Tensor& b, cudaStream_t stream);

}  // namespace graft
