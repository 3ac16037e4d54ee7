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

extern const float kNf4Values[16];  // tensor/nf4.h, which brings too much along

// Where an operand lies: element (i, j) is at data + i * stride + j.
struct GemmMatrix {
  const void* data;
  int64_t stride;
  DType dtype;
};

// Elements of an NF4 weight (tensor/nf4.h), a rectangle of it: (rows, count), the first at `first`
// of the line of elements, rows row_step elements apart. absmax: of each row the scales of the
// blocks that it touches, from that of its first element on.
struct Nf4Rows {
  const uint8_t* codes;
  int64_t first, row_step, rows, count;
  const float* absmax;
  int64_t absmax_stride;
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

// Rows of an operand as multiply reads them, strides in bytes. Packed: A tiles, row_stride 0. Else
// the rows lie in the operand itself, k after k, in words of the product's kind.
struct GemmRows {
  const char* data;
  int64_t tile_stride, row_stride;
};

// Lines of memory that will be wanted soon, for the kernels that fetch them between their multiply-
// adds: a rectangle, per_step lines in a step of AMX's tiles.
struct GemmAhead {
  const char* row;
  int64_t stride, rows, lines;  // bytes from row to row; rows that are left; lines of a row
  int64_t line, per_step;
};

// Packing and multiplying with one kind of word. k and count are in elements, kc in words. The
// layouts above are those of all but AMX (gemm_amx.cpp), which packs b its own way, and whose
// pack_a is nullptr: a must be words of its kind as it lies.
struct GemmInner {
  // (rows, count) of a row-major matrix, or where `transposed` the transpose of (count, rows), from
  // (row, k) on into one A tile. With pairs k is even and alpha 1.
  void (*pack_a)(float* tile, const GemmMatrix& a, bool transposed, int64_t row, int64_t rows,
                 int64_t k, int64_t count, float alpha);
  // (count, cols) from (k, col) on into B panels, panel_stride apart; transposed: b is (cols,
  // count) row-major.
  void (*pack_b)(float* panels, int64_t panel_stride, const GemmMatrix& b, bool transposed,
                 int64_t k, int64_t count, int64_t col, int64_t cols);
  // sums [tile][6][nr] of `rows` rows = or += those rows of a times a panel of kc x cols.
  //   ahead  two rectangles, for AMX alone: the others fetch nothing, their caller does
  void (*multiply)(float* sums, const GemmRows& a, const float* panel, int64_t kc, int64_t rows,
                   int64_t cols, bool accumulate, GemmAhead* ahead);
  int64_t group;      // columns of c that a thread takes at a time where a comes from beyond the L2
  int64_t max_kc;     // the most words between two passes over the sums, a multiple of 16
  int64_t tiles_sub;  // A tiles that are kept in the L2 cache while the panels of a group pass
};

// Products with a narrow side (gemm_narrow.cpp). The narrow operand is packed, [k][width], width
// the columns up to whole vectors; the other is read as it lies.
constexpr int64_t kNarrowWords = 512;  // k between two passes over the sums
constexpr int64_t kFlatRows = 64;      // rows of x whose lines stay in the L1 cache in turn

struct GemmNarrow {
  int64_t cols;  // the most that are packed together
  // (count, cols) from (0, col) on, times alpha; transposed: b is (cols, count) row-major.
  void (*pack)(float* packed, const GemmMatrix& b, bool transposed, int64_t count, int64_t col,
               int64_t cols, float alpha);
  // sums [row][nr] = rows [row, + rows) of x times packed (count, cols).
  //   widened  kMr * kNarrowWords floats to work in
  void (*tall)(float* sums, const GemmMatrix& x, int64_t row, int64_t rows, const float* packed,
               int64_t count, int64_t cols, float* widened);
  // sums [panel][row][nr], panels of nr columns panel_floats apart, = packed (count, rows)^T times
  // columns [col, + cols) of x (count, ...). Whole vectors of rows are written.
  void (*flat)(float* sums, int64_t panel_floats, const float* packed, int64_t rows,
               const GemmMatrix& x, int64_t count, int64_t col, int64_t cols);
};

struct GemmKernels {
  int64_t nr;              // columns of a panel
  GemmInner floats;        // any operands, widened
  const GemmInner* pairs;  // BF16 by BF16; its functions are nullptr where that too is widened
  const GemmNarrow* narrow;
  void (*store)(const GemmStore& out, const float* sums, int64_t rows, int64_t cols);
  // c is (cols, rows): sums transposed on their way out, bias per row of the sums.
  void (*store_transposed)(const GemmStore& out, const float* sums, int64_t rows, int64_t cols);
  // sums[i * sums_stride + j] = or += sum over k of x[i * count + k] * w(row + j, k), i < m <= 4.
  void (*dot)(float* sums, int64_t sums_stride, const float* x, int64_t m, const GemmMatrix& w,
              int64_t row, int64_t rows, int64_t count, bool accumulate);
  // dst (rows, count) F32 or BF16, dense: the elements of NF4, rounded once.
  void (*widen_nf4)(void* dst, DType dtype, const Nf4Rows& src);
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
namespace amx {
extern const GemmKernels gemm_kernels;
}
namespace wide16 {
extern const GemmKernels gemm_kernels, gemm_kernels_amx;
}

}  // namespace graft
