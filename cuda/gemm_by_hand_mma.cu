// The matrix product by hand, rungs 4 to 7: BF16 tensor cores by mma.sync m16n8k16, which every GPU
// since sm_80 has. Read before: gemm_by_hand.cu, gemm_tiles.cuh. Hopper's own instruction (wgmma)
// is faster still: mma.sync is said to reach some 65 % of its peak.
#include "cuda/gemm_by_hand.h"
#include "cuda/gemm_tiles.cuh"

namespace graft {
namespace {

using SmallTile = GemmTile<128, 128, 64, 32, 4>;  // 8 warps

// Copies rows [row0, row0 + kRows) and columns [k0, k0 + kDepth) of x (rows, k), through registers;
// zeros past the ends.
template <int kRows, bool kSwizzled>
__device__ inline void load_tile_now(bf16* tile, const bf16* x, int64_t stride, int row0, int rows,
                                     int k0, int k) {
#pragma unroll
  for (int i = int(threadIdx.x); i < kRows * kChunks; i += SmallTile::kThreads) {
    const int r = i / kChunks, c = i % kChunks;
    uint4 chunk = {0, 0, 0, 0};
    if (row0 + r < rows && k0 + c * 8 < k)
      chunk = *reinterpret_cast<const uint4*>(x + (row0 + r) * stride + k0 + c * 8);
    *reinterpret_cast<uint4*>(tile + chunk_place<kSwizzled>(r, c)) = chunk;
  }
}

// gemm_by_hand, variants 4 and 5: tensor cores; 5 with swizzled tiles.  (3: registers, 6: pipeline)
//   c = a b^T
// Shapes    c (M, N), a (M, K), b (N, K) BF16, rows strided; a and b in 16-byte chunks.
// Mapping   block = 8 warps = 128 x 128 outputs, a warp 64 x 32; 32 of K per step. A warp's 16
//           mma.sync per 16 of K take 6 ldmatrix; in 4 each of them meets 4 rows in the same banks.
// Bytes     2MNK / 128 elements from L2, M, N, K as large as the tile or more.
// Roofline  M=N=K=4096: 139 us at 989 TFLOP/s (H200 peak). Measured: -
// Numerics  F32 sums inside the tensor core, 16 of K at a time; one rounding, at the store.
template <bool kSwizzled>
__global__ void __launch_bounds__(SmallTile::kThreads)
    gemm_4_mma(bf16* c, int64_t c_stride, bool pairs, GemmOperands from, int m, int n) {
  using Tile = SmallTile;
  SHARED_ARRAY(bf16, tile_a, Tile::kM * kDepth);
  SHARED_ARRAY(bf16, tile_b, Tile::kN * kDepth);
  const int row0 = int(blockIdx.y) * Tile::kM, col0 = int(blockIdx.x) * Tile::kN;
  Accumulator<Tile> sum = {};
  for (int k0 = 0; k0 < from.k; k0 += kDepth) {
    load_tile_now<Tile::kM, kSwizzled>(tile_a, from.a, from.a_stride, row0, m, k0, from.k);
    load_tile_now<Tile::kN, kSwizzled>(tile_b, from.b, from.b_stride, col0, n, k0, from.k);
    __syncthreads();  // the tiles are complete
    multiply_tiles<Tile, kSwizzled>(sum, tile_a, tile_b);
    __syncthreads();  // everybody has read them, before they are overwritten
  }
  store_tile<Tile>(c, c_stride, sum, row0, m, col0, n, pairs);
}

// gemm_by_hand, variant 6: cp.async pipeline of four stages.          (5: swizzle, 7: large tiles)
//   as variants 4 and 5
// Shapes    as variants 4 and 5.
// Mapping   as 5. Tiles go to shared memory without passing registers, three steps ahead of the
//           product: the tensor cores wait for memory no longer, and one barrier per step is left.
// Bytes     as 5. 64 KB of shared memory per block.
// Roofline  as 5. Measured: -
// Numerics  as 5: the same sums in the same order, so the same bytes.
__global__ void __launch_bounds__(SmallTile::kThreads)
    gemm_6_pipeline(bf16* c, int64_t c_stride, bool pairs, GemmOperands from, int m, int n) {
  using Tile = SmallTile;
  DYNAMIC_SHARED(bf16, shared);
  const int row0 = int(blockIdx.y) * Tile::kM, col0 = int(blockIdx.x) * Tile::kN;
  Accumulator<Tile> sum = {};
  multiply_pipelined<Tile, false>(sum, shared, from, from, row0, m, col0, n);
  store_tile<Tile>(c, c_stride, sum, row0, m, col0, n, pairs);
}

// gemm_by_hand, variant 7: 64 x 64 a warp, blocks in bands.                           (6: pipeline)
//   as variants 4 and 5
// Shapes    as variants 4 and 5.
// Mapping   block = 8 warps = 128 x 256 outputs, a warp 64 x 64: 32 mma.sync per 16 of K take 8
//           ldmatrix, a quarter each instead of three eighths. Blocks go down bands of 8 rows of
//           tiles (banded_place), so that those that run together share what they read from L2.
// Bytes     2MNK / 171 elements from L2. 96 KB of shared memory per block.
// Roofline  as 5. Small products have too few of these tiles to fill a GPU. Measured: -
// Numerics  as 5: the same sums in the same order, so the same bytes.
__global__ void __launch_bounds__(LargeTile::kThreads)
    gemm_7_large(bf16* c, int64_t c_stride, bool pairs, GemmOperands from, int m, int n) {
  using Tile = LargeTile;
  DYNAMIC_SHARED(bf16, shared);
  const TilePlace place =
      banded_place(blockIdx.x, (m + Tile::kM - 1) / Tile::kM, (n + Tile::kN - 1) / Tile::kN);
  const int row0 = place.row * Tile::kM, col0 = place.col * Tile::kN;
  Accumulator<Tile> sum = {};
  multiply_pipelined<Tile, false>(sum, shared, from, from, row0, m, col0, n);
  store_tile<Tile>(c, c_stride, sum, row0, m, col0, n, pairs);
}

}  // namespace

void gemm_by_hand_mma(int rung, Tensor& c, const Tensor& a, const Tensor& b, cudaStream_t stream) {
  const int m = int(a.num_rows()), n = int(b.num_rows());
  const GemmOperands from = {device_data<const bf16>(a), a.row_stride(), device_data<const bf16>(b),
                             b.row_stride(), int(a.cols())};
  const auto start = [&](auto kernel, dim3 grid, int threads, size_t shared) {
    launch(kernel, grid, dim3(unsigned(threads)), shared, stream, device_data<bf16>(c),
           c.row_stride(), stores_pairs(c), from, m, n);
  };
  if (rung == 7) {
    const int64_t blocks = int64_t(ceil_div(m, LargeTile::kM)) * ceil_div(n, LargeTile::kN);
    CHECK(blocks <= INT32_MAX, "gemm_by_hand: ", m, " x ", n, " needs more than 2^31 blocks");
    return start(gemm_7_large, dim3(unsigned(blocks)), LargeTile::kThreads,
                 LargeTile::kSharedBytes);
  }
  const dim3 grid(ceil_div(n, SmallTile::kN), ceil_div(m, SmallTile::kM));
  if (rung == 4) return start(gemm_4_mma<false>, grid, SmallTile::kThreads, 0);
  if (rung == 5) return start(gemm_4_mma<true>, grid, SmallTile::kThreads, 0);
  start(gemm_6_pipeline, grid, SmallTile::kThreads, SmallTile::kSharedBytes);
}

}  // namespace graft
