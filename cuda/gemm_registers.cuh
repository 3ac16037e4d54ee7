// The parts of a product without tensor cores, 8 x 8 outputs a thread: for rung 3 of
// gemm_by_hand.cu and for own_gemm.cu. Shapes of the tiles: (K, rows), so that a vector is 4 rows
// of one k.
#pragma once

#include "cuda/device_utils.cuh"

namespace graft {

// A block of 256 threads owns kTile3 x kTile3 outputs and sums kDepth3 of K per step.
constexpr int kTile3 = 128, kDepth3 = 16, kPitch3 = kTile3 + 4;

// Thread (ty, tx) of 16 x 16 owns rows 4 ty + i and 64 + 4 ty + i of the tile, columns likewise.
__device__ inline int place_in_tile3(int i, int thread) { return i / 4 * 64 + thread * 4 + i % 4; }

// sum[i][j] += over the step's K of tile_a[k, row i] tile_b[k, column j].
__device__ inline void multiply_tiles3(float (&sum)[8][8], const float* tile_a,
                                       const float* tile_b) {
  const int ty = int(threadIdx.x) / 16, tx = int(threadIdx.x) % 16;
#pragma unroll
  for (int i = 0; i < kDepth3; ++i) {
    float left[2][4], right[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_floats<4>(left[half], tile_a + i * kPitch3 + half * 64 + ty * 4);
      load_floats<4>(right[half], tile_b + i * kPitch3 + half * 64 + tx * 4);
    }
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
      for (int s = 0; s < 8; ++s) sum[r][s] += left[r / 4][r % 4] * right[s / 4][s % 4];
  }
}

// Calls f(row, col, value) for each of the thread's outputs that lies in c (m, n).
template <class F>
__device__ inline void for_each_output3(const float (&sum)[8][8], int row0, int m, int col0, int n,
                                        F&& f) {
#pragma unroll
  for (int r = 0; r < 8; ++r)
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const int row = row0 + place_in_tile3(r, int(threadIdx.x) / 16);
      const int col = col0 + place_in_tile3(s, int(threadIdx.x) % 16);
      if (row < m && col < n) f(row, col, sum[r][s]);
    }
}

}  // namespace graft
