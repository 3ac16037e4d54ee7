// The micro kernel of the matrix product, once for each format of packed operands. Included by
// gemm_kernels.cpp (F32) and gemm_pairs.cpp (pairs of BF16) alone.
//
// A tile of 6 x nr sums stays in registers while k runs: 24 + 4 + 1 registers of 32 with AVX-512
// (nr = 64), 12 + 2 + 1 of 16 with AVX2 (nr = 16). Every sum is one chain of multiply-adds over k
// in the same order in full tiles and at the edges, so a result's bytes don't depend on where it
// lies.
#pragma once

#include "tensor/cpu/kernels/gemm_kernels.h"
#include "tensor/cpu/kernels/gemm_simd.h"

namespace graft::GRAFT_ISA {

constexpr int kVectors = kLanes == 16 ? 4 : 2;  // of a panel
constexpr int kNr = kVectors * kLanes;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
const T* at(const GemmMatrix& m, int64_t i, int64_t j) {
  return static_cast<const T*>(m.data) + i * m.stride + j;
}

// sums (R, V * lanes) = or += A tile (kc, 6)^T times panel (kc, nr), the first R rows and V
// vectors. Format says what a word of 32 bits holds: Row, load, broadcast, multiply_add.
template <class Format, int R, int V>
void multiply_tile(float* __restrict sums, const float* __restrict a, const float* __restrict b,
                   int64_t kc, bool accumulate) {
  Vec c[R][V];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) c[i][j] = Vec::zero();
#pragma GCC unroll 2
  for (int64_t k = 0; k < kc; ++k) {
    typename Format::Row row[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) row[j] = Format::load(b + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const typename Format::Row x = Format::broadcast(a + i);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) c[i][j] = Format::multiply_add(x, row[j], c[i][j]);
    }
    a += kMr;
    b += kNr;
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      float* const s = sums + i * kNr + j * kLanes;
      (accumulate ? Vec::load(s) + c[i][j] : c[i][j]).store(s);
    }
}

template <class Format, int V>
void multiply_rows(int64_t rows, float* sums, const float* a, const float* b, int64_t kc,
                   bool accumulate) {
  switch (rows) {
    case 1:
      return multiply_tile<Format, 1, V>(sums, a, b, kc, accumulate);
    case 2:
      return multiply_tile<Format, 2, V>(sums, a, b, kc, accumulate);
    case 3:
      return multiply_tile<Format, 3, V>(sums, a, b, kc, accumulate);
    case 4:
      return multiply_tile<Format, 4, V>(sums, a, b, kc, accumulate);
    case 5:
      return multiply_tile<Format, 5, V>(sums, a, b, kc, accumulate);
    default:
      return multiply_tile<Format, 6, V>(sums, a, b, kc, accumulate);
  }
}

// GemmInner::multiply.
template <class Format>
void multiply_panel(float* sums, const float* a, int64_t tile_stride, const float* panel,
                    int64_t kc, int64_t rows, int64_t cols, bool accumulate) {
  const int64_t vectors = (cols + kLanes - 1) / kLanes;
  for (; rows > 0; rows -= kMr, sums += kMr * kNr, a += tile_stride) {
    if (vectors == kVectors)
      multiply_rows<Format, kVectors>(rows, sums, a, panel, kc, accumulate);
    else if (vectors == 1)
      multiply_rows<Format, 1>(rows, sums, a, panel, kc, accumulate);
    else if constexpr (kVectors == 4) {
      if (vectors == 2)
        multiply_rows<Format, 2>(rows, sums, a, panel, kc, accumulate);
      else
        multiply_rows<Format, 3>(rows, sums, a, panel, kc, accumulate);
    }
  }
}

extern const GemmInner gemm_pairs;  // gemm_pairs.cpp; no functions where there is no such format

}  // namespace graft::GRAFT_ISA
