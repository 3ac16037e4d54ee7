// The inner loops of the matrix product as a table of functions, one table per instruction set
// (gemm_kernels.cpp is compiled once for each). tensor/cpu/gemm.cpp cuts the work into pieces.
//
// Packed layouts, words of 32 bits, kMr = 6 rows to a tile, nr columns to a panel:
//   A tile    [word][6]          op(a) times alpha, rows past the end zero
//   B panel   [word][nr]         op(b), columns past the end zero
//   sums      [tile][6][nr]      of one panel, F32
// A word is an F32, one k; or two BF16, two k that follow each other.
#pragma once

#include <cstdint>

#include "tensor/dtype.h"

namespace graft {

constexpr int64_t kMr = 6;

// Where an operand lies: element (i, j) is at data + i * stride + j.
struct GemmMatrix {
  const void* data;
  int64_t stride;
  DType dtype;
};

// One panel of results on its way out: c = sums + bias + addend, rounded once.
struct GemmStore {
  void* c;  // of the panel's first row and column
  int64_t c_stride;
  DType dtype;         // of c and addend
  const void* addend;  // or nullptr
  int64_t addend_stride;
  const float* bias;  // per column, from the panel's first; or nullptr
};

// Packing and multiplying with one kind of word. k and count are in elements, kc in words.
struct GemmInner {
  // (rows, count) of a row-major matrix, or where `transposed` the transpose of (count, rows), from
  // (row, k) on into one A tile. With pairs k is even and alpha 1.
  void (*pack_a)(float* tile, const GemmMatrix& a, bool transposed, int64_t row, int64_t rows,
                 int64_t k, int64_t count, float alpha);
  // (count, cols) from (k, col) on into B panels, panel_stride apart; transposed: b is (cols,
  // count) row-major.
  void (*pack_b)(float* panels, int64_t panel_stride, const GemmMatrix& b, bool transposed,
                 int64_t k, int64_t count, int64_t col, int64_t cols);
  // sums [tile][6][nr] of `rows` rows = or += A tiles, tile_stride apart, times a panel of kc x
  // cols.
  void (*multiply)(float* sums, const float* a, int64_t tile_stride, const float* panel, int64_t kc,
                   int64_t rows, int64_t cols, bool accumulate);
};

struct GemmKernels {
  int64_t nr;              // columns of a panel
  int64_t kc;              // the most words between two passes over the sums
  int64_t tiles_sub;       // A tiles that are kept in the L2 cache while the panels of a group pass
  GemmInner floats;        // any operands, widened
  const GemmInner* pairs;  // BF16 by BF16; its functions are nullptr where that too is widened
  void (*store)(const GemmStore& out, const float* sums, int64_t rows, int64_t cols);
  // c is (cols, rows): sums transposed on their way out, bias per row of the sums.
  void (*store_transposed)(const GemmStore& out, const float* sums, int64_t rows, int64_t cols);
  // sums[i * sums_stride + j] = or += sum over k of x[i * count + k] * w(row + j, k), i < m <= 4.
  void (*dot)(float* sums, int64_t sums_stride, const float* x, int64_t m, const GemmMatrix& w,
              int64_t row, int64_t rows, int64_t count, bool accumulate);
};

namespace portable {
extern const GemmKernels gemm_kernels;
}
namespace avx2 {
extern const GemmKernels gemm_kernels;
}
namespace avx512 {
extern const GemmKernels gemm_kernels;
}
namespace avx512_bf16 {
extern const GemmKernels gemm_kernels;
}
namespace wide16 {
extern const GemmKernels gemm_kernels;
}

}  // namespace graft
