// Products with a narrow side, which are LoRA's: u = x A^T, du = dy B, dA = du^T x, dB = dy^T u.
// Packing the wide operand would cost more than 16 columns' worth of multiply-adds, so it is read
// as it lies, once, and the narrow one alone is packed: [k][width], width up to two vectors.
#include "tensor/cpu/kernels/gemm_tile.h"

namespace graft::GRAFT_ISA {
namespace {

constexpr int64_t width_of(int64_t cols) { return (cols + kLanes - 1) / kLanes * kLanes; }

// g++ 12 sees ghosts in its own _mm512_undefined_ps (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// The transpose of a square of lanes x lanes, from (0, k) of rows that lie k after k.
template <class T>
void pack_square(float* packed, int64_t width, const T* b, int64_t stride, int64_t rows,
                 int64_t count, Vec factor) {
  const bool whole = rows == kLanes && count == kLanes;
  Vec r[kLanes];
  if (whole) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = Vec::load(b + i * stride);
  } else {
    for (int i = 0; i < kLanes; ++i)
      r[i] = i < rows ? load_first(b + i * stride, count) : Vec::zero();
  }
  transpose(r);
  if (whole) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) (r[i] * factor).store(packed + i * width);
  } else {
    for (int64_t i = 0; i < count; ++i) (r[i] * factor).store(packed + i * width);
  }
}

#pragma GCC diagnostic pop

void pack(float* packed, const GemmMatrix& b, bool transposed, int64_t count, int64_t col,
          int64_t cols, float alpha) {
  const int64_t width = width_of(cols);
  const Vec factor = Vec::broadcast(alpha);
  with_type(b.dtype, [&]<class T>(T) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int64_t lanes = min(kLanes, cols - j);
      if (transposed) {
        for (int64_t k = 0; k < count; k += kLanes)
          pack_square(packed + k * width + j, width, at<T>(b, col + j, k), b.stride, lanes,
                      min(kLanes, count - k), factor);
        continue;
      }
      for (int64_t k = 0; k < count; ++k) {
        const T* const row = at<T>(b, k, col + j);
        const Vec v = lanes == kLanes ? Vec::load(row) : load_first(row, lanes);
        (v * factor).store(packed + k * width + j);
      }
    }
  });
}

// --- tall: rows of x by the packed columns ---

// Rows of another dtype are widened a tile at a time, in the L1 cache.
template <class T>
void widen_rows(float* widened, const T* x, int64_t stride, int64_t rows, int64_t words) {
  for (int64_t i = 0; i < rows; ++i, x += stride, widened += kNarrowWords) {
    int64_t j = 0;
    for (; j + kLanes <= words; j += kLanes) Vec::load(x + j).store(widened + j);
    for (; j < words; ++j) widened[j] = widen(x[j]);
  }
}

void tall(float* sums, const GemmMatrix& x, int64_t row, int64_t rows, const float* packed,
          int64_t count, int64_t cols, float* widened) {
  const int64_t width = width_of(cols);
  const auto multiply = width == kLanes ? multiply_rows<Floats, 1, false, kLanes>
                                        : multiply_rows<Floats, 2, false, 2 * kLanes>;
  for (int64_t i = 0; i < rows; i += kMr)
    for (int64_t k = 0; k < count; k += kNarrowWords) {
      const int64_t words = min(kNarrowWords, count - k), tile = min(kMr, rows - i);
      const float* from = widened;
      int64_t stride = kNarrowWords;
      if (x.dtype == DType::F32)
        from = at<float>(x, row + i, k), stride = x.stride;
      else
        with_type(x.dtype, [&]<class T>(T) {
          widen_rows(widened, at<T>(x, row + i, k), x.stride, tile, words);
        });
      multiply(tile, sums + i * kNr, reinterpret_cast<const char*>(from),
               stride * int64_t(sizeof(float)), packed + k * width, words, k > 0);
    }
}

// --- flat: the packed columns, as rows, by rows of x ---

// sums (R, lanes) += packed (count, R)^T x (count, lanes). Each line of x is read once; `ahead` is
// how far away the line lies that comes next at this row.
template <int R, class T>
void flat_tile(float* sums, const float* packed, int64_t width, const T* x, int64_t stride,
               int64_t count, int64_t cols, int64_t ahead, bool accumulate) {
  Vec c[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) c[i] = accumulate ? Vec::load(sums + i * kNr) : Vec::zero();
  for (int64_t k = 0; k < count; ++k, packed += width, x += stride) {
    __builtin_prefetch(x + ahead);
    const Vec v = cols == kLanes ? Vec::load(x) : load_first(x, cols);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) c[i] = multiply_add(Vec::broadcast(packed[i]), v, c[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) c[i].store(sums + i * kNr);
}

template <class T>
void flat_columns(float* sums, const float* packed, int64_t rows, const T* x, int64_t stride,
                  int64_t count, int64_t cols, int64_t ahead, bool accumulate) {
  constexpr int kRows = kLanes == 16 ? 16 : 8;  // of sums in registers
  const int64_t width = width_of(rows);
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t left = min(kRows, width - i);
    const auto tile = left <= 4   ? flat_tile<4, T>
                      : left <= 8 ? flat_tile<8, T>
                                  : flat_tile<kRows, T>;
    tile(sums + i * kNr, packed + i, width, x, stride, count, cols, ahead, accumulate);
  }
}

void flat(float* sums, int64_t panel_floats, const float* packed, int64_t rows, const GemmMatrix& x,
          int64_t count, int64_t col, int64_t cols) {
  with_type(x.dtype, [&]<class T>(T) {
    for (int64_t k = 0; k < count; k += kFlatRows) {
      const int64_t words = min(kFlatRows, count - k);
      for (int64_t j = 0; j < cols; j += kLanes) {
        const bool last = j + kLanes >= cols;
        flat_columns(sums + j / kNr * panel_floats + j % kNr, packed + k * width_of(rows), rows,
                     at<T>(x, k, col + j), x.stride, words, min(kLanes, cols - j),
                     last ? kFlatRows * x.stride - j : kLanes, k > 0);
      }
    }
  });
}

}  // namespace

extern const GemmNarrow gemm_narrow = {2 * kLanes, pack, tall, flat};

}  // namespace graft::GRAFT_ISA
