// Softmax and cross-entropy in three rungs. The sums over a vocabulary of 150,000 are all about
// memory: how often a row is read, and whether neighbours read neighbours.
//   rung 1  thread  one thread per row, three passes: largest, sum, gradient     cross_entropy.cu
//   rung 2  block   one block per row, the same three passes              cross_entropy_ladder.cu
//   rung 3  online  largest and sum in one pass, 16-byte loads: the backend's    cross_entropy.cu
#pragma once

#include <cuda_runtime.h>

#include "tensor/tensor.h"

namespace graft {

constexpr int kCrossEntropyRungs = 3;

// Backend::cross_entropy with the gradient, all on the device: losses (N) F32, logits (N, V) F32 or
// BF16, rows may be strided, labels (N) I32 in [0, V).
void cross_entropy_rung(int rung, Tensor& losses, Tensor& logits, const Tensor& labels,
                        double scale, cudaStream_t stream);

}  // namespace graft
