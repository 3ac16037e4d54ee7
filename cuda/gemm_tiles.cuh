// The parts of a product on tensor cores, c (M, N) = a (M, K) b (N, K)^T in BF16: tiles in shared
// memory, a warp's share of a tile product, the pipeline that loads ahead, the store. For
// gemm_by_hand_mma.cu and lora_linear.cu. Read before: mma.cuh.
//
// A tile is rows of a or of b, kDepth elements each, as chunks of 8 (16 bytes). An ldmatrix reads
// one chunk of 8 rows at once, and the 32 banks hold 8 chunks. Rows are 4 chunks, so that chunk c
// of rows r and r + 2 share banks; swizzled, chunk c of row r lies at c ^ (r / 2 % 4) and 8
// consecutive rows meet 8 different bank groups.
#pragma once

#include "cuda/device_utils.cuh"
#include "cuda/mma.cuh"

namespace graft {

constexpr int kDepth = 32;           // of K, per step
constexpr int kChunks = kDepth / 8;  // 16-byte chunks of a tile's row

// Sizes of a block's tile of c (kM, kN) and of a warp's part of it (kWarpM, kWarpN).
template <int kM_, int kN_, int kWarpM_, int kWarpN_, int kStages_>
struct GemmTile {
  static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kThreads = kM / kWarpM * (kN / kWarpN) * 32;
  static constexpr int kStages = kStages_;                   // of the pipeline
  static constexpr int kStageElements = (kM + kN) * kDepth;  // a tile of a, then one of b
  static constexpr size_t kSharedBytes = sizeof(bf16) * kStages * kStageElements;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
};

// What a warp sums, as mma.sync m16n8k16 leaves it: with lane l, element e of [i][j] is row 16 i +
// l/4 + 8 (e/2), column 8 j + 2 (l%4) + e%2 of the warp's part.
template <class Tile>
using Accumulator = float[Tile::kWarpM / 16][Tile::kWarpN / 8][4];

template <bool kSwizzled>
__device__ inline int chunk_place(int r, int c) {
  return (r * kChunks + (kSwizzled ? c ^ (r / 2 % kChunks) : c)) * 8;
}

// A tile of an operand that lies transposed: kDepth lines of K, kRows elements each. ldmatrix.trans
// reads one chunk of 8 lines, so chunk c of line k lies at c ^ (k % 8).
template <int kRows>
__device__ inline int chunk_place_in_k_lines(int k, int c) {
  static_assert(kRows % 64 == 0);
  return (k * (kRows / 8) + (c ^ (k % 8))) * 8;
}

// 16 rows of a tile (of kRows) from `row` on, 16 of K from 16 kk on, as a or b of mma.sync.
template <int kRows, bool kSwizzled, bool kKLines>
__device__ inline void load_fragment(uint32_t (&to)[4], const bf16* tile, int row, int kk) {
  const int lane = int(threadIdx.x) % 32;
  if constexpr (kKLines)
    ptx::ldmatrix_x4_trans(to,
                           tile + chunk_place_in_k_lines<kRows>(kk * 16 + lane / 16 * 8 + lane % 8,
                                                                row / 8 + lane / 8 % 2));
  else
    ptx::ldmatrix_x4(to, tile + chunk_place<kSwizzled>(row + lane % 16, kk * 2 + lane / 16));
}

// Where the calling warp's part of the block's tile begins.
template <class Tile>
__device__ inline int warp_row() {
  return int(threadIdx.x) / 32 / (Tile::kN / Tile::kWarpN) * Tile::kWarpM;
}
template <class Tile>
__device__ inline int warp_col() {
  return int(threadIdx.x) / 32 % (Tile::kN / Tile::kWarpN) * Tile::kWarpN;
}

// sum += the warp's part of tile_a (kM, kDepth) * tile_b (kN, kDepth)^T; kKLinesA, kKLinesB: that
// tile is (kDepth, kM) or (kDepth, kN).
template <class Tile, bool kSwizzled, bool kKLinesA = false, bool kKLinesB = false>
__device__ inline void multiply_tiles(Accumulator<Tile>& sum, const bf16* tile_a,
                                      const bf16* tile_b) {
  constexpr int kRows = Tile::kWarpM / 16, kPairs = Tile::kWarpN / 16;
#pragma unroll
  for (int kk = 0; kk < kDepth / 16; ++kk) {
    uint32_t a[kRows][4], b[kPairs][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      load_fragment<Tile::kM, kSwizzled, kKLinesA>(a[i], tile_a, warp_row<Tile>() + i * 16, kk);
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      load_fragment<Tile::kN, kSwizzled, kKLinesB>(b[j], tile_b, warp_col<Tile>() + j * 16, kk);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        ptx::mma_m16n8k16(sum[i][j * 2], a[i], b[j][0], b[j][2]);
        ptx::mma_m16n8k16(sum[i][j * 2 + 1], a[i], b[j][1], b[j][3]);
      }
  }
}

// One product to be summed: a (rows, k), b (cols, k), k a multiple of 8, 16-byte aligned rows.
struct GemmOperands {
  const bf16* a;
  int64_t a_stride;
  const bf16* b;
  int64_t b_stride;
  int k;
};

// Starts copying rows [row0, row0 + kRows) and columns [k0, k0 + kDepth) of x (rows, k) to a
// swizzled tile; zeros past the ends.
template <int kRows, int kThreads>
__device__ inline void load_tile_async(bf16* tile, const bf16* x, int64_t stride, int row0,
                                       int rows, int k0, int k) {
#pragma unroll
  for (int first = 0; first < kRows * kChunks; first += kThreads) {
    const int i = first + int(threadIdx.x), r = i / kChunks, c = i % kChunks;
    if (kRows * kChunks % kThreads != 0 && i >= kRows * kChunks) break;
    const bool valid = row0 + r < rows && k0 + c * 8 < k;
    ptx::cp_async16(tile + chunk_place<true>(r, c),
                    valid ? x + (row0 + r) * stride + k0 + c * 8 : x, valid);
  }
}

// sum += base.a base.b^T (+ extra.a extra.b^T where kExtra), rows from row0 and columns from col0.
// Tiles are loaded kStages - 1 steps ahead by cp.async, without a stop between the two products.
// `shared` holds Tile::kSharedBytes.
template <class Tile, bool kExtra>
__device__ inline void multiply_pipelined(Accumulator<Tile>& sum, bf16* shared,
                                          const GemmOperands& base, const GemmOperands& extra,
                                          int row0, int rows, int col0, int cols) {
  const int base_steps = (base.k + kDepth - 1) / kDepth;
  const int steps = base_steps + (kExtra ? (extra.k + kDepth - 1) / kDepth : 0);
  const auto load = [&](int step) {
    if (step < steps) {
      const bool last = kExtra && step >= base_steps;
      const GemmOperands from = last ? extra : base;
      const int k0 = (last ? step - base_steps : step) * kDepth;
      bf16* stage = shared + step % Tile::kStages * Tile::kStageElements;
      load_tile_async<Tile::kM, Tile::kThreads>(stage, from.a, from.a_stride, row0, rows, k0,
                                                from.k);
      load_tile_async<Tile::kN, Tile::kThreads>(stage + Tile::kM * kDepth, from.b, from.b_stride,
                                                col0, cols, k0, from.k);
    }
    ptx::cp_async_commit();  // an empty group keeps the count of groups that of steps
  };
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this step's tiles are complete; nobody reads the stage that is loaded next
    load(step + Tile::kStages - 1);
    const bf16* stage = shared + step % Tile::kStages * Tile::kStageElements;
    multiply_tiles<Tile, true>(sum, stage, stage + Tile::kM * kDepth);
  }
}

// Calls f(row, col, x0, x1) for each pair of neighbours, columns col and col + 1 of c, that the
// lane holds; col is even.
template <class Tile, class F>
__device__ inline void for_each_pair(const Accumulator<Tile>& sum, int row0, int col0, F&& f) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < Tile::kWarpM / 16; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < Tile::kWarpN / 8; ++j)
        f(row0 + warp_row<Tile>() + i * 16 + half * 8 + lane / 4,
          col0 + warp_col<Tile>() + j * 8 + lane % 4 * 2, sum[i][j][half * 2],
          sum[i][j][half * 2 + 1]);
}

// Rounds the block's tile to c (rows, cols). `pairs`: c's rows begin at 4-byte boundaries.
template <class Tile>
__device__ inline void store_tile(bf16* c, int64_t stride, const Accumulator<Tile>& sum, int row0,
                                  int rows, int col0, int cols, bool pairs) {
  for_each_pair<Tile>(sum, row0, col0, [&](int row, int col, float x0, float x1) {
    if (row >= rows || col >= cols) return;
    bf16* to = c + row * stride + col;
    if (pairs && col + 1 < cols) {
      *reinterpret_cast<bf162*>(to) = __floats2bfloat162_rn(x0, x1);
    } else {
      to[0] = __float2bfloat16(x0);
      if (col + 1 < cols) to[1] = __float2bfloat16(x1);
    }
  });
}

// Host: whether store_tile may store two elements at once.
template <class TensorType>
bool stores_pairs(const TensorType& c) {
  return (c.row_stride() % 2 == 0 || c.num_rows() <= 1) &&
         reinterpret_cast<uintptr_t>(c.raw()) % 4 == 0;
}

// The tile of a block of a one-dimensional grid. Neighbouring blocks run at the same time; taken
// row by row they would share one tile of a and no tile of b. In bands of kBand rows of tiles, down
// the columns, 128 blocks read 8 tiles of a and 16 of b.
struct TilePlace {
  int row, col;
};
__device__ inline TilePlace banded_place(unsigned block, int row_tiles, int col_tiles) {
  constexpr int kBand = 8;
  const int band = int(block) / (kBand * col_tiles), in_band = int(block) % (kBand * col_tiles);
  const int height = min(kBand, row_tiles - band * kBand);
  return {band * kBand + in_band % height, in_band / height};
}

// The best tile by hand: 8 warps of 64 x 64.
using LargeTile = GemmTile<128, 256, 64, 64, 4>;

}  // namespace graft
