// The product that needs no library: what the backend multiplies by where cuBLAS cannot be opened
// (gemm.cu). It is the last rung of gemm_by_hand.h, and its rung 3 in F32, for operands that lie
// in any way.
#pragma once

#include <cuda_runtime.h>

#include "tensor/backend.h"

namespace graft {

// 64 x 64 outputs a block, or 128 x 256; by the shape: large where they are enough for a GPU.
enum class OwnTiles { ByShape, Small, Large };

// c = beta c + alpha op(a) op(b), summed in F32 and rounded once; beta is 0 (c is not read) or 1.
//   a, b  both F32, or both BF16; K > 0
//   c     F32, or BF16 where a and b are
// Rows of all three may be strided and begin anywhere; BF16 operands whose rows are made of 16-byte
// chunks are read faster. `tiles` is for BF16. The order of the sums depends on K alone.
void own_gemm(Tensor& c, const GemmTerm& term, float beta, cudaStream_t stream,
              OwnTiles tiles = OwnTiles::ByShape);

}  // namespace graft
