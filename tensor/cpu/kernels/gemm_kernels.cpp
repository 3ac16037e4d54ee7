// The matrix product of one instruction set: F32 packing (BF16 and F16 are widened), the store, dot
// products for few rows, and the table. Read gemm_tile.h first.
#include "tensor/cpu/kernels/gemm_kernels.h"

#include "tensor/cpu/kernels/gemm_tile.h"

namespace graft::GRAFT_ISA {
namespace {

// --- packing ---

// Six rows (zero past `rows`) of a row-major matrix, transposed: tile[k][6].
template <class T>
void pack_a_rows(float* tile, const T* a, int64_t stride, int64_t rows, int64_t count,
                 float alpha) {
  int64_t k = 0;
#if defined(__AVX2__)
  const Vec8 factor = Vec8::broadcast(alpha);
  if (rows == kMr) {
    for (; k + 8 <= count; k += 8) {
      if (k * sizeof(T) % 64 == 0) {  // the same place of the next tile's rows
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) __builtin_prefetch(a + (i + kMr) * stride + k);
      }
      Vec8 r[8];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) r[i] = Vec8::load(a + i * stride + k) * factor;
      r[6] = r[7] = Vec8::zero();
      transpose(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i].store_first6(tile + (k + i) * kMr);
    }
  }
#endif
  for (; k < count; ++k)
    for (int64_t i = 0; i < kMr; ++i)
      tile[k * kMr + i] = i < rows ? widen(a[i * stride + k]) * alpha : 0.0f;
}

// Six columns of a row-major matrix: tile[k][6] as they lie.
template <class T>
void pack_a_cols(float* tile, const T* a, int64_t stride, int64_t rows, int64_t count,
                 float alpha) {
  if (rows == kMr) {
    for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 6
      for (int i = 0; i < kMr; ++i) tile[k * kMr + i] = widen(a[k * stride + i]) * alpha;
    return;
  }
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < kMr; ++i)
      tile[k * kMr + i] = i < rows ? widen(a[k * stride + i]) * alpha : 0.0f;
}

void pack_a(float* tile, const GemmMatrix& a, bool transposed, int64_t row, int64_t rows, int64_t k,
            int64_t count, float alpha) {
  with_type(a.dtype, [&]<class T>(T) {
    if (transposed)
      pack_a_cols(tile, at<T>(a, k, row), a.stride, rows, count, alpha);
    else
      pack_a_rows(tile, at<T>(a, row, k), a.stride, rows, count, alpha);
  });
}

// Rows of a row-major (count, cols), cut to the panels. A row is a short run of bytes on a page of
// its own, so the hardware sees no stream: the row after next is fetched by hand.
template <class T>
void pack_b_rows(float* packed, int64_t panel_stride, const T* b, int64_t stride, int64_t count,
                 int64_t cols) {
  constexpr int kRowsAhead = 8, kLine = 64 / sizeof(T);
  for (int64_t k = 0; k < count; ++k, b += stride, packed += kNr) {
    for (int64_t j = 0; j < cols; j += kLine) __builtin_prefetch(b + kRowsAhead * stride + j);
    float* panel = packed;
    int64_t col = 0;
    for (; col + kNr <= cols; col += kNr, panel += panel_stride)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) Vec::load(b + col + j * kLanes).store(panel + j * kLanes);
    if (col == cols) continue;
    for (int64_t j = 0; j < kNr; ++j) panel[j] = col + j < cols ? widen(b[col + j]) : 0.0f;
  }
}

// The transpose of a row-major (cols, count), a square of lanes x lanes at a time.
template <class T>
void pack_b_cols(float* panel, const T* b, int64_t stride, int64_t count, int64_t cols) {
  for (int j = 0; j < kNr; j += kLanes, b += kLanes * stride) {
    const int64_t valid = cols - j < kLanes ? cols - j : kLanes;  // may be negative
    for (int64_t k = 0; k < count; k += kLanes) {
      Vec r[kLanes];
      if (valid == kLanes && k + kLanes <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) r[i] = Vec::load(b + i * stride + k);
      } else {
        for (int i = 0; i < kLanes; ++i)
          r[i] = i < valid ? load_first(b + i * stride + k, min(kLanes, count - k)) : Vec::zero();
      }
      transpose(r);
      if (k + kLanes <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) r[i].store(panel + (k + i) * kNr + j);
      } else {
        for (int64_t i = 0; i < count - k; ++i) r[i].store(panel + (k + i) * kNr + j);
      }
    }
  }
}

void pack_b(float* packed, int64_t panel_stride, const GemmMatrix& b, bool transposed, int64_t k,
            int64_t count, int64_t col, int64_t cols) {
  with_type(b.dtype, [&]<class T>(T) {
    if (!transposed)
      return pack_b_rows(packed, panel_stride, at<T>(b, k, col), b.stride, count, cols);
    for (int64_t j = 0; j < cols; j += kNr, packed += panel_stride)
      pack_b_cols(packed, at<T>(b, col + j, k), b.stride, count, min(kNr, cols - j));
  });
}

// --- the store ---

template <class T>
void store_typed(const GemmStore& out, const float* sums, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; ++i, sums += kNr) {
    T* const c = static_cast<T*>(out.c) + i * out.c_stride;
    const T* const addend =
        out.addend ? static_cast<const T*>(out.addend) + i * out.addend_stride : nullptr;
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
      Vec y = Vec::load(sums + j);
      if (out.bias) y = y + Vec::load(out.bias + j);
      if (addend) y = y + Vec::load(addend + j);
      y.store(c + j);
    }
    for (; j < cols; ++j) {
      float y = sums[j];
      if (out.bias) y += out.bias[j];
      if (addend) y += widen(addend[j]);
      narrow(c + j, y);
    }
  }
}

void store(const GemmStore& out, const float* sums, int64_t rows, int64_t cols) {
  if (out.dtype == DType::F32)
    store_typed<float>(out, sums, rows, cols);
  else
    store_typed<BFloat16>(out, sums, rows, cols);
}

template <class T>
void store_transposed_typed(const GemmStore& out, const float* sums, int64_t rows, int64_t cols) {
  for (int64_t j = 0; j < cols; ++j) {
    T* const c = static_cast<T*>(out.c) + j * out.c_stride;
    const T* const addend =
        out.addend ? static_cast<const T*>(out.addend) + j * out.addend_stride : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      float y = sums[i * kNr + j];
      if (out.bias) y += out.bias[i];
      if (addend) y += widen(addend[i]);
      narrow(c + i, y);
    }
  }
}

void store_transposed(const GemmStore& out, const float* sums, int64_t rows, int64_t cols) {
  if (out.dtype == DType::F32)
    store_transposed_typed<float>(out, sums, rows, cols);
  else
    store_transposed_typed<BFloat16>(out, sums, rows, cols);
}

// --- few rows: dot products with the rows of w as they lie ---

// y[m] = or += w . x[m], M rows of x with one of w. Partial sums in U vectors for each, added in a
// fixed order. One row of w after the other, so that memory is read as one long stream.
template <int M, class T>
void dot_row(float* y, int64_t y_stride, const float* x, const T* w, int64_t count,
             bool accumulate) {
  constexpr int U = M == 1 ? 4 : 2;
  Vec s[M][U];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) s[m][u] = Vec::zero();
  int64_t k = 0;
  for (; k + U * kLanes <= count; k += U * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const Vec v = Vec::load(w + k + u * kLanes);
      // Rows of 16 bits need more lines in flight than the hardware fetches ahead: 1 KiB, measured.
      if constexpr (sizeof(T) == 2) __builtin_prefetch(w + k + u * kLanes + 512);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        s[m][u] = multiply_add(v, Vec::load(x + m * count + k + u * kLanes), s[m][u]);
    }
  }
  for (; k < count; k += kLanes) {
    const int64_t n = min(kLanes, count - k);
    const Vec v = load_first(w + k, n);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
      s[m][0] = multiply_add(v, load_first(x + m * count + k, n), s[m][0]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    Vec total = s[m][0] + s[m][1];
    if constexpr (U == 4) total = total + (s[m][2] + s[m][3]);
    y[m * y_stride] = sum(total) + (accumulate ? y[m * y_stride] : 0.0f);
  }
}

template <int M>
void dot_rows(float* sums, int64_t sums_stride, const float* x, const GemmMatrix& w, int64_t row,
              int64_t rows, int64_t count, bool accumulate) {
  with_type(w.dtype, [&]<class T>(T) {
    for (int64_t j = 0; j < rows; ++j)
      dot_row<M>(sums + j, sums_stride, x, at<T>(w, row + j, 0), count, accumulate);
  });
}

void dot(float* sums, int64_t sums_stride, const float* x, int64_t m, const GemmMatrix& w,
         int64_t row, int64_t rows, int64_t count, bool accumulate) {
  const auto rows_of = m == 1   ? dot_rows<1>
                       : m == 2 ? dot_rows<2>
                       : m == 3 ? dot_rows<3>
                                : dot_rows<4>;
  rows_of(sums, sums_stride, x, w, row, rows, count, accumulate);
}

// All but the words of pairs: the same under every instruction set.
constexpr GemmKernels table(const GemmInner* pairs) {
  return {kNr,   {pack_a, pack_b, multiply_panel<Floats>, kGroup, kKc, kTilesSub},
          pairs, &gemm_narrow,
          store, store_transposed,
          dot,   widen_nf4};
}

}  // namespace

#if defined(__AMX_BF16__)
extern constinit const GemmKernels gemm_kernels = table(&gemm_amx);
#else
extern constinit const GemmKernels gemm_kernels = table(&gemm_pairs);
#endif
#if defined(GRAFT_ISA_wide16)
extern constinit const GemmKernels gemm_kernels_amx = table(&gemm_amx);
#endif

}  // namespace graft::GRAFT_ISA
