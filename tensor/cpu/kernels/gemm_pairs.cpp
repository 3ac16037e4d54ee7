// BF16 by BF16 without widening: a word of the packed operands is two neighbours in k, the first in
// its low half, and vdpbf16ps adds both products to an F32 sum. Odd k: the last word's high half is
// zero in both operands. The instruction takes subnormal BF16 as zero and rounds each of its two
// additions to nearest, so sums differ from the F32 path's by rounding alone.
//
// wide16 does the same by AVX2 multiply-adds, so that packing and cutting are tested everywhere;
// the other instruction sets have no pairs and widen (gemm_kernels.cpp).
#include "tensor/cpu/kernels/gemm_tile.h"

namespace graft::GRAFT_ISA {

#if defined(__AVX512BF16__) || defined(GRAFT_ISA_wide16)

namespace {

// 32 bits as they lie in memory, in the lanes of a Vec: packing moves pairs and never looks inside.
inline Vec load_words(const BFloat16* p) { return Vec::load(reinterpret_cast<const float*>(p)); }

// The first n < 2 * lanes elements, the others zero.
inline Vec load_first_words(const BFloat16* p, int64_t n) {
  alignas(64) float words[kLanes] = {};
  __builtin_memcpy(words, p, uint64_t(n) * sizeof(BFloat16));
  return Vec::load(words);
}

inline void store_word(float* word, BFloat16 low, BFloat16 high) {
  const uint32_t bits = uint32_t(high.bits) << 16 | low.bits;
  __builtin_memcpy(word, &bits, sizeof bits);
}

#if defined(__AVX512BF16__)

struct Pairs {
  struct Row {
    __m512bh v;
  };
  static Row load(const float* p) { return {(__m512bh)_mm512_loadu_ps(p)}; }
  static Row broadcast(const char* p) { return {(__m512bh)_mm512_set1_ps(word_at(p))}; }
  static Vec multiply_add(Row x, Row row, Vec sum) { return {_mm512_dpbf16_ps(sum.v, x.v, row.v)}; }
};

// 32 columns of two rows: words (x[j], y[j]).
inline void interleave(float* words, const BFloat16* x, const BFloat16* y) {
  const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(y);
  // Element 2 j of the result is a[j], element 2 j + 1 is b[j], which the instruction counts
  // from 32.
  const __m512i even = _mm512_cvtepu8_epi16(
      _mm256_setr_epi8(0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                       11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
  _mm512_storeu_si512(words, _mm512_permutex2var_epi16(a, even, b));
  _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi16(a, odd, b));
}

#else

struct Pairs {
  using Row = Vec;
  static Row load(const float* p) { return Vec::load(p); }
  static Row broadcast(const char* p) { return Vec::broadcast(word_at(p)); }
  static Vec8 low(Vec8 x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 16))};
  }
  static Vec8 high(Vec8 x) {
    const __m256i mask = _mm256_set1_epi32(int(0xffff0000u));
    return {_mm256_and_ps(x.v, _mm256_castsi256_ps(mask))};
  }
  static Vec8 multiply_add(Vec8 x, Vec8 row, Vec8 sum) {
    return graft::GRAFT_ISA::multiply_add(low(x), low(row),
                                          graft::GRAFT_ISA::multiply_add(high(x), high(row), sum));
  }
  static Vec multiply_add(Row x, Row row, Vec sum) {
    return {multiply_add(x.low, row.low, sum.low), multiply_add(x.high, row.high, sum.high)};
  }
};

inline void interleave(float* words, const BFloat16* x, const BFloat16* y) {
  for (int j = 0; j < 2 * kLanes; ++j) store_word(words + j, x[j], y[j]);
}

#endif

// Six rows (zero past `rows`) of a row-major matrix, transposed: tile[word][6].
void pack_a_rows(float* tile, const BFloat16* a, int64_t stride, int64_t rows, int64_t count) {
  int64_t k = 0;
  if (rows == kMr) {
    for (; k + 16 <= count; k += 16) {
      if (k % 32 == 0) {  // the same place of the next tile's rows
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) __builtin_prefetch(a + (i + kMr) * stride + k);
      }
      Vec8 r[8];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i)
        r[i] = Vec8::load(reinterpret_cast<const float*>(a + i * stride + k));
      r[6] = r[7] = Vec8::zero();
      transpose(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i].store_first6(tile + (k / 2 + i) * kMr);
    }
  }
  for (; k < count; k += 2)
    for (int64_t i = 0; i < kMr; ++i) {
      const BFloat16* const x = a + i * stride + k;
      store_word(tile + k / 2 * kMr + i, i < rows ? x[0] : BFloat16{},
                 i < rows && k + 1 < count ? x[1] : BFloat16{});
    }
}

// Six columns of a row-major matrix, two rows to a word.
void pack_a_cols(float* tile, const BFloat16* a, int64_t stride, int64_t rows, int64_t count) {
  for (int64_t k = 0; k < count; k += 2, tile += kMr, a += 2 * stride) {
    if (rows == kMr && k + 1 < count) {
#pragma GCC unroll 6
      for (int i = 0; i < kMr; ++i) store_word(tile + i, a[i], a[stride + i]);
      continue;
    }
    for (int64_t i = 0; i < kMr; ++i)
      store_word(tile + i, i < rows ? a[i] : BFloat16{},
                 i < rows && k + 1 < count ? a[stride + i] : BFloat16{});
  }
}

void pack_a(float* tile, const GemmMatrix& a, bool transposed, int64_t row, int64_t rows, int64_t k,
            int64_t count, float) {
  if (transposed)
    pack_a_cols(tile, at<BFloat16>(a, k, row), a.stride, rows, count);
  else
    pack_a_rows(tile, at<BFloat16>(a, row, k), a.stride, rows, count);
}

// Rows of a row-major (count, cols), cut to the panels, two rows to a word. The rows after next are
// fetched by hand, as in gemm_kernels.cpp.
void pack_b_rows(float* packed, int64_t panel_stride, const BFloat16* b, int64_t stride,
                 int64_t count, int64_t cols) {
  constexpr int kRowsAhead = 8, kLine = 32;
  for (int64_t k = 0; k < count; k += 2, b += 2 * stride, packed += kNr) {
    for (int64_t j = 0; j < cols; j += kLine) {
      __builtin_prefetch(b + kRowsAhead * stride + j);
      __builtin_prefetch(b + (kRowsAhead + 1) * stride + j);
    }
    const bool both = k + 1 < count;
    float* panel = packed;
    int64_t col = 0;
    for (; both && col + kNr <= cols; col += kNr, panel += panel_stride)
#pragma GCC unroll 2
      for (int j = 0; j < kNr; j += 2 * kLanes)
        interleave(panel + j, b + col + j, b + stride + col + j);
    for (; col < cols; col += kNr, panel += panel_stride)
      for (int64_t j = 0; j < kNr; ++j)
        store_word(panel + j, col + j < cols ? b[col + j] : BFloat16{},
                   both && col + j < cols ? b[stride + col + j] : BFloat16{});
  }
}

// The transpose of a row-major (cols, count), a square of lanes x lanes words at a time.
void pack_b_cols(float* panel, const BFloat16* b, int64_t stride, int64_t count, int64_t cols) {
  constexpr int kStep = 2 * kLanes;  // elements of k in a square
  for (int j = 0; j < kNr; j += kLanes, b += kLanes * stride) {
    const int64_t valid = cols - j < kLanes ? cols - j : kLanes;  // may be negative
    for (int64_t k = 0; k < count; k += kStep) {
      Vec r[kLanes];
      if (valid == kLanes && k + kStep <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) r[i] = load_words(b + i * stride + k);
      } else {
        for (int i = 0; i < kLanes; ++i)
          r[i] =
              i < valid ? load_first_words(b + i * stride + k, min(kStep, count - k)) : Vec::zero();
      }
      transpose(r);
      float* const to = panel + k / 2 * kNr + j;
      if (k + kStep <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) r[i].store(to + i * kNr);
      } else {
        for (int64_t i = 0; 2 * i < count - k; ++i) r[i].store(to + i * kNr);
      }
    }
  }
}

void pack_b(float* packed, int64_t panel_stride, const GemmMatrix& b, bool transposed, int64_t k,
            int64_t count, int64_t col, int64_t cols) {
  if (!transposed)
    return pack_b_rows(packed, panel_stride, at<BFloat16>(b, k, col), b.stride, count, cols);
  for (int64_t j = 0; j < cols; j += kNr, packed += panel_stride)
    pack_b_cols(packed, at<BFloat16>(b, col + j, k), b.stride, count, min(kNr, cols - j));
}

}  // namespace

extern const GemmInner gemm_pairs = {pack_a, pack_b, multiply_panel<Pairs>, kGroup, kKc, kTilesSub};

#else

extern const GemmInner gemm_pairs = {nullptr, nullptr, nullptr, 0, 0, 0};

#endif

}  // namespace graft::GRAFT_ISA
