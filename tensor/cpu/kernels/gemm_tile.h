// The micro kernel of the matrix product, once for each format of packed operands. Included by
// gemm_kernels.cpp (F32), gemm_pairs.cpp and gemm_amx.cpp (pairs of BF16) and gemm_nf4.cpp alone.
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

// kKc words by nr, a panel, and the A tile beside it fill the L1 cache with nr = 16 and a part of
// the L2 with nr = 64; kTilesSub tiles of them take less than half of an L2 of 512 KiB.
constexpr int kKc = kLanes == 16 ? 512 : 384;
constexpr int kGroup = 64;
constexpr int kTilesSub = kLanes == 16 ? 2 : 24;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
const T* at(const GemmMatrix& m, int64_t i, int64_t j) {
  return static_cast<const T*>(m.data) + i * m.stride + j;
}

// Calls f(T{}) with T the type of the elements.
template <class F>
void with_type(DType dtype, F&& f) {
  if (dtype == DType::F32)
    f(float{});
  else if (dtype == DType::BF16)
    f(BFloat16{});
  else
    f(Float16{});
}

// 32 bits as they lie: two BF16 of a row need not be aligned.
inline float word_at(const char* p) {
  float word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

// sums (R, V * lanes) = or += rows of a (R, kc) times panel (kc, nr), V vectors of it. Format says
// what a word of 32 bits holds: Row, load, broadcast, multiply_add.
//   Packed: a is an A tile, [word][6]; else R rows as they lie in the operand, row_stride bytes
//   apart.
template <class Format, int R, int V, bool Packed, int kPanel = kNr>
void multiply_tile(float* __restrict sums, const char* __restrict a, int64_t row_stride,
                   const float* __restrict b, int64_t kc, bool accumulate) {
  Vec c[R][V];
  const char* rows[R];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
    rows[i] = a + i * (Packed ? 4 : row_stride);
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) c[i][j] = Vec::zero();
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < kc; ++k) {
    typename Format::Row row[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) row[j] = Format::load(b + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const typename Format::Row x = Format::broadcast(rows[i] + k * (Packed ? 4 * kMr : 4));
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) c[i][j] = Format::multiply_add(x, row[j], c[i][j]);
    }
    b += kPanel;
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      float* const s = sums + i * kNr + j * kLanes;
      (accumulate ? Vec::load(s) + c[i][j] : c[i][j]).store(s);
    }
}

template <class Format, int V, bool Packed, int kPanel = kNr>
void multiply_rows(int64_t rows, float* sums, const char* a, int64_t row_stride, const float* b,
                   int64_t kc, bool accumulate) {
  switch (rows) {
    case 1:
      return multiply_tile<Format, 1, V, Packed, kPanel>(sums, a, row_stride, b, kc, accumulate);
    case 2:
      return multiply_tile<Format, 2, V, Packed, kPanel>(sums, a, row_stride, b, kc, accumulate);
    case 3:
      return multiply_tile<Format, 3, V, Packed, kPanel>(sums, a, row_stride, b, kc, accumulate);
    case 4:
      return multiply_tile<Format, 4, V, Packed, kPanel>(sums, a, row_stride, b, kc, accumulate);
    case 5:
      return multiply_tile<Format, 5, V, Packed, kPanel>(sums, a, row_stride, b, kc, accumulate);
    default:
      return multiply_tile<Format, 6, V, Packed, kPanel>(sums, a, row_stride, b, kc, accumulate);
  }
}

template <class Format, bool Packed>
void multiply_tiles(float* sums, const GemmRows& a, const float* panel, int64_t kc, int64_t rows,
                    int64_t cols, bool accumulate) {
  const int64_t vectors = (cols + kLanes - 1) / kLanes;
  const char* tile = a.data;
  for (; rows > 0; rows -= kMr, sums += kMr * kNr, tile += a.tile_stride) {
    if constexpr (!Packed)  // where the next tile's rows begin; from there on the hardware follows
      if (rows > kMr)
        for (int i = 0; i < kMr; ++i)
          for (int line = 0; line < 2; ++line)
            __builtin_prefetch(tile + a.tile_stride + i * a.row_stride + line * 64);
    if (vectors == kVectors)
      multiply_rows<Format, kVectors, Packed>(rows, sums, tile, a.row_stride, panel, kc,
                                              accumulate);
    else if (vectors == 1)
      multiply_rows<Format, 1, Packed>(rows, sums, tile, a.row_stride, panel, kc, accumulate);
    else if constexpr (kVectors == 4) {
      if (vectors == 2)
        multiply_rows<Format, 2, Packed>(rows, sums, tile, a.row_stride, panel, kc, accumulate);
      else
        multiply_rows<Format, 3, Packed>(rows, sums, tile, a.row_stride, panel, kc, accumulate);
    }
  }
}

// GemmInner::multiply.
template <class Format>
void multiply_panel(float* sums, const GemmRows& a, const float* panel, int64_t kc, int64_t rows,
                    int64_t cols, bool accumulate, GemmAhead*) {
  const auto multiply =
      a.row_stride == 0 ? multiply_tiles<Format, true> : multiply_tiles<Format, false>;
  multiply(sums, a, panel, kc, rows, cols, accumulate);
}

// What multiply_tile takes F32 words for.
struct Floats {
  using Row = Vec;
  static Row load(const float* p) { return Vec::load(p); }
  static Row broadcast(const char* p) { return Vec::broadcast(word_at(p)); }
  static Vec multiply_add(Row x, Row row, Vec sum) {
    return graft::GRAFT_ISA::multiply_add(x, row, sum);
  }
};

extern const GemmNarrow gemm_narrow;  // gemm_narrow.cpp
extern const GemmInner gemm_pairs;    // gemm_pairs.cpp; no functions where there is no such format
extern const GemmInner gemm_amx;      // gemm_amx.cpp; the same
void widen_nf4(void* dst, DType dtype, const Nf4Rows& src);  // gemm_nf4.cpp

}  // namespace graft::GRAFT_ISA
