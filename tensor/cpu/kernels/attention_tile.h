// The small matrix product that attention is made of: C (M, N) = or += A (M, K) B (K, N) on tiles
// that lie in cache. B is walked in panels of two vectors; C's block of registers is kTileRows x 2
// vectors.
#pragma once

#include "tensor/cpu/kernels/simd.h"
#include "tensor/cpu/kernels/table.h"

namespace graft::GRAFT_ISA {

constexpr int kTileRows =
    kLanes == 16 ? 12 : 6;  // accumulators, B and one broadcast fill the registers
constexpr int64_t kPanel = 2 * kLanes;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How A is read: element (i, k) at a[i * stride + k], or, transposed, at a[i + k * stride].
struct Left {
  const float* data;
  int64_t stride;
};
// Panel p, row k of B at data + p * panel_stride + k * row_stride.
struct Right {
  const float* data;
  int64_t panel_stride, row_stride;
};

template <int kRows, int kVectors, bool kTransposed>
inline void tile_block(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
                       int64_t b_stride, int64_t depth, bool accumulate) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + k * b_stride + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec left = broadcast(kTransposed ? a[i + k * a_stride] : a[i * a_stride + k]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * c_stride + j * kLanes;
      store(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
    }
}

// As many columns of one block of rows as `cols` (a multiple of kLanes).
template <int kRows, bool kTransposed>
inline void tile_rows(float* c, int64_t c_stride, const float* a, int64_t a_stride, Right b,
                      int64_t cols, int64_t depth, bool accumulate) {
  int64_t n = 0;
  const float* panel = b.data;
  for (; n + kPanel <= cols; n += kPanel, panel += b.panel_stride)
    tile_block<kRows, 2, kTransposed>(c + n, c_stride, a, a_stride, panel, b.row_stride, depth,
                                      accumulate);
  if (n < cols)
    tile_block<kRows, 1, kTransposed>(c + n, c_stride, a, a_stride, panel, b.row_stride, depth,
                                      accumulate);
}

// bounds(first, count) gives, for a block of `count` rows from `first`, {columns, depth begin,
// depth end}: how a causal mask skips what it would throw away.
struct Bounds {
  int64_t cols, depth_begin, depth_end;
};
template <bool kTransposed, class F>
inline void tile_product(float* c, int64_t c_stride, Left a, Right b, int64_t rows, bool accumulate,
                         F bounds) {
  const auto block = [&]<int kRows>(int64_t first) {
    const Bounds limit = bounds(first, int64_t(kRows));
    if (limit.depth_end <= limit.depth_begin && accumulate) return;
    const float* left = kTransposed ? a.data + first + limit.depth_begin * a.stride
                                    : a.data + first * a.stride + limit.depth_begin;
    const Right right{b.data + limit.depth_begin * b.row_stride, b.panel_stride, b.row_stride};
    const int64_t depth = limit.depth_end - limit.depth_begin;
    tile_rows<kRows, kTransposed>(c + first * c_stride, c_stride, left, a.stride, right, limit.cols,
                                  depth > 0 ? depth : 0, accumulate);
  };
  int64_t first = 0;
  for (; first + kTileRows <= rows; first += kTileRows) block.template operator()<kTileRows>(first);
  for (; first + 3 <= rows; first += 3) block.template operator()<3>(first);
  for (; first < rows; ++first) block.template operator()<1>(first);
}

// rows x cols of F32 or BF16 into F32 times scale, padded with zeros to padded_cols.
template <class T>
inline void pack_rows(float* to, int64_t padded_cols, const T* from, int64_t stride, int64_t rows,
                      int64_t cols, float scale) {
  for (int64_t r = 0; r < rows; ++r) {
    for_each_vector(cols, [&](int64_t i, auto lanes) {
      store(to + r * padded_cols + i, load(from + r * stride + i, lanes) * scale);
    });
  }
}

}  // namespace graft::GRAFT_ISA
