// BF16 by BF16 with Intel's AMX (Sapphire Rapids and later): TDPBF16PS multiplies a tile of 16 rows
// x 32 of k by one of 32 of k x 16 columns and adds to 16 x 16 sums in F32, sixteen times the work
// of an F32 multiply-add of 16 lanes in 16 cycles instead of 1/2. [Intel Architecture Instruction
// Set Extensions Programming Reference, chapter 3.]
//
// Layout of a B panel here: [cols / 16][word][16], so that a tile is 1 KiB in one piece; a word is
// two neighbours in k, as in gemm_pairs.cpp. Rows of a are read as they lie, a tile being 16 pieces
// of 64 bytes; a transposed a is not for this file (pack_a is nullptr).
//
// 2 x 2 tiles of sums, two of a and two of b are the eight that exist: four loads to four products,
// which the L2 cache can feed.
//
// The instruction takes subnormal BF16 as zero, and sums the even and the odd k apart before it
// adds them to the sum: a result's bytes depend on where its k stands in a run of 32, which is the
// same for every row, column and thread.
//
// wide16 has the instructions in plain C++, so that everything around them is tested everywhere.
#include "tensor/cpu/kernels/gemm_tile.h"

namespace graft::GRAFT_ISA {

#if defined(__AMX_BF16__) || defined(GRAFT_ISA_wide16)

namespace {

constexpr int kTile = 16;              // rows of a tile; words of k; columns
constexpr int kTileBytes = 16 * 64;    // of a tile of b
constexpr int64_t kTileFloats = 256;   // the same
constexpr int64_t kGroups = kNr / 16;  // of 16 columns in a panel

// Eight tile registers. Sums: 0, 1 the first 16 rows, 2, 3 the next; a: 4, 5; b: 6, 7.
#if defined(__AMX_BF16__)

class Tiles {
 public:
  // Rows of the two tiles of a and of the sums; words of k, which are the rows of b. All to zero.
  void configure(int64_t rows0, int64_t rows1, int64_t words) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.bytes_per_row[i] = uint16_t(i == 4 || i == 5 ? 4 * words : 64);
      config.rows[i] = uint8_t(i >= 6 ? words : i == 2 || i == 3 || i == 5 ? rows1 : rows0);
    }
    if (rows1 == 0)  // no register may have no rows
      for (const int i : {2, 3, 5}) config.rows[i] = 1;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { __asm__ volatile("tilerelease"); }
  template <int T>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int Sum, int A, int B>
  void multiply_add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
  }
};

#else

class Tiles {
 public:
  void configure(int64_t rows0, int64_t rows1, int64_t words) {
    words_ = int(words);
    for (int i = 0; i < 8; ++i)
      rows_[i] = int(i >= 6 ? words : i == 2 || i == 3 || i == 5 ? rows1 : rows0);
  }
  static void release() {}
  template <int T>
  void zero() {
    __builtin_memset(tiles_[T], 0, sizeof tiles_[T]);
  }
  template <int T>
  void load(const void* p, int64_t stride) {
    const uint64_t bytes = T == 4 || T == 5 ? 4 * uint64_t(words_) : 64;
    for (int i = 0; i < rows_[T]; ++i)
      __builtin_memcpy(tiles_[T][i], static_cast<const char*>(p) + i * stride, bytes);
  }
  template <int T>
  void store(void* p, int64_t stride) {
    for (int i = 0; i < rows_[T]; ++i)
      __builtin_memcpy(static_cast<char*>(p) + i * stride, tiles_[T][i], 64);
  }
  template <int Sum, int A, int B>
  void multiply_add() {
    for (int i = 0; i < rows_[Sum]; ++i) {
      float even[kTile] = {}, odd[kTile] = {}, sums[kTile];
      for (int w = 0; w < words_; ++w) {
        const float x = half(tiles_[A][i][w], 0), y = half(tiles_[A][i][w], 1);
        for (int j = 0; j < kTile; ++j) {
          even[j] = __builtin_fmaf(x, half(tiles_[B][w][j], 0), even[j]);
          odd[j] = __builtin_fmaf(y, half(tiles_[B][w][j], 1), odd[j]);
        }
      }
      __builtin_memcpy(sums, tiles_[Sum][i], sizeof sums);
      for (int j = 0; j < kTile; ++j) sums[j] += even[j] + odd[j];
      __builtin_memcpy(tiles_[Sum][i], sums, sizeof sums);
    }
  }

 private:
  static float half(uint32_t word, int high) {
    const uint32_t bits = high ? word & 0xffff0000u : word << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  }
  uint32_t tiles_[8][kTile][kTile];
  int rows_[8] = {}, words_ = 0;
};

#endif

// 32 bits as they lie in memory, in the lanes of a Vec.
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

// Sixteen columns of op(b), b row-major (cols, count): squares of 16 words, transposed.
void pack_b_cols(float* packed, const BFloat16* b, int64_t stride, int64_t count, int64_t cols) {
  constexpr int kStep = 2 * kTile;  // elements of k in a square
  for (int64_t k = 0; k < count; k += kStep, packed += kTileFloats) {
    Vec r[kTile];
    const int64_t n = min(kStep, count - k);
    if (cols >= kTile && n == kStep) {
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) r[i] = load_words(b + i * stride + k);
    } else {
      for (int i = 0; i < kTile; ++i)
        r[i] = i < cols ? load_first_words(b + i * stride + k, n) : Vec::zero();
    }
    transpose(r);
    if (n == kStep) {
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) r[i].store(packed + i * kTile);
    } else {
      for (int64_t i = 0; 2 * i < n; ++i) r[i].store(packed + i * kTile);
    }
  }
}

#if defined(__AMX_BF16__)

// 32 columns of two rows: words (x[j], y[j]), the first sixteen of them and the next.
inline void interleave(float* first, float* second, const BFloat16* x, const BFloat16* y) {
  const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(y);
  const __m512i even = _mm512_cvtepu8_epi16(
      _mm256_setr_epi8(0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                       11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(a, even, b));
  _mm512_storeu_si512(second, _mm512_permutex2var_epi16(a, odd, b));
}

#else

inline void interleave(float* first, float* second, const BFloat16* x, const BFloat16* y) {
  for (int j = 0; j < kTile; ++j) {
    store_word(first + j, x[j], y[j]);
    store_word(second + j, x[kTile + j], y[kTile + j]);
  }
}

#endif

// Rows of a row-major (count, cols), two to a word. The rows after next are fetched by hand.
void pack_b_rows(float* packed, int64_t panel_stride, const BFloat16* b, int64_t stride,
                 int64_t count, int64_t cols) {
  constexpr int kRowsAhead = 8, kLine = 32;
  const int64_t group = (count + 1) / 2 * kTile;  // floats of 16 columns
  for (int64_t k = 0; k < count; k += 2, b += 2 * stride, packed += kTile) {
    for (int64_t j = 0; j < cols; j += kLine) {
      __builtin_prefetch(b + kRowsAhead * stride + j);
      __builtin_prefetch(b + (kRowsAhead + 1) * stride + j);
    }
    const bool both = k + 1 < count;
    float* panel = packed;
    for (int64_t col = 0; col < cols; col += kNr, panel += panel_stride)
      for (int64_t g = 0; g < kGroups && col + g * kTile < cols; g += 2) {
        float *const first = panel + g * group, *const second = first + group;
        const int64_t from = col + g * kTile;
        if (both && from + 2 * kTile <= cols) {
          interleave(first, second, b + from, b + stride + from);
          continue;
        }
        for (int j = 0; j < 2 * kTile; ++j)
          store_word((j < kTile ? first : second - kTile) + j,
                     from + j < cols ? b[from + j] : BFloat16{},
                     both && from + j < cols ? b[stride + from + j] : BFloat16{});
      }
  }
}

void pack_b(float* packed, int64_t panel_stride, const GemmMatrix& b, bool transposed, int64_t k,
            int64_t count, int64_t col, int64_t cols) {
  if (!transposed)
    return pack_b_rows(packed, panel_stride, at<BFloat16>(b, k, col), b.stride, count, cols);
  const int64_t group = (count + 1) / 2 * kTile;
  for (int64_t j = 0; j < cols; j += kTile)
    pack_b_cols(packed + j / kNr * panel_stride + j % kNr / kTile * group,
                at<BFloat16>(b, col + j, k), b.stride, count, cols - j);
}

inline void fetch(GemmAhead& ahead) {
  for (int64_t i = 0; i < ahead.per_step && ahead.rows > 0; ++i) {
    __builtin_prefetch(ahead.row + ahead.line * 64, 0, 2);
    if (++ahead.line < ahead.lines) continue;
    ahead.line = 0;
    ahead.row += ahead.stride;
    --ahead.rows;
  }
}

// Up to 32 rows by up to 32 columns: `steps` tiles of k in a row, b's two columns of tiles `group`
// floats apart.
template <bool kTwoRows, bool kTwoCols>
void multiply_block(Tiles& tiles, float* sums, const char* a, int64_t row_stride, const float* b,
                    int64_t group, int64_t steps, bool accumulate, GemmAhead* ahead) {
  constexpr int64_t kStride = kNr * sizeof(float);
  float* const lower = sums + kTile * kNr;
  if (accumulate) {
    tiles.load<0>(sums, kStride);
    if constexpr (kTwoCols) tiles.load<1>(sums + kTile, kStride);
    if constexpr (kTwoRows) tiles.load<2>(lower, kStride);
    if constexpr (kTwoRows && kTwoCols) tiles.load<3>(lower + kTile, kStride);
  } else {
    tiles.zero<0>();
    if constexpr (kTwoCols) tiles.zero<1>();
    if constexpr (kTwoRows) tiles.zero<2>();
    if constexpr (kTwoRows && kTwoCols) tiles.zero<3>();
  }
  for (int64_t k = 0; k < steps; ++k, a += 64, b += kTileFloats) {
    fetch(ahead[0]);
    fetch(ahead[1]);
    tiles.load<6>(b, 64);
    tiles.load<4>(a, row_stride);
    tiles.multiply_add<0, 4, 6>();
    if constexpr (kTwoCols) {
      tiles.load<7>(b + group, 64);
      tiles.multiply_add<1, 4, 7>();
    }
    if constexpr (kTwoRows) {
      tiles.load<5>(a + kTile * row_stride, row_stride);
      tiles.multiply_add<2, 5, 6>();
      if constexpr (kTwoCols) tiles.multiply_add<3, 5, 7>();
    }
  }
  tiles.store<0>(sums, kStride);
  if constexpr (kTwoCols) tiles.store<1>(sums + kTile, kStride);
  if constexpr (kTwoRows) tiles.store<2>(lower, kStride);
  if constexpr (kTwoRows && kTwoCols) tiles.store<3>(lower + kTile, kStride);
}

// The rows of a times `steps` tiles of `words` words each.
void multiply_steps(Tiles& tiles, float* sums, const GemmRows& rows_of_a, const float* panel,
                    int64_t group, int64_t steps, int64_t words, int64_t rows, int64_t cols,
                    bool accumulate, GemmAhead* ahead) {
  const char* a = rows_of_a.data;
  const int64_t stride = rows_of_a.row_stride;
  int64_t configured = 0;
  for (; rows > 0; rows -= 2 * kTile, a += 2 * kTile * stride, sums += 2 * kTile * kNr) {
    const int64_t here = min(rows, 2 * kTile);
    if (here != configured)
      tiles.configure(min(here, kTile), here > kTile ? here - kTile : 0, words);
    configured = here;
    const bool two_rows = here > kTile;
    for (int64_t j = 0; j < cols; j += 2 * kTile) {
      const bool two_cols = cols - j > kTile;
      const auto multiply =
          two_rows   ? two_cols ? multiply_block<true, true> : multiply_block<true, false>
            : two_cols ? multiply_block<false, true>
                     : multiply_block<false, false>;
      multiply(tiles, sums + j, a, stride, panel + j / kTile * group, group, steps, accumulate,
               ahead);
    }
  }
}

void multiply(float* sums, const GemmRows& a, const float* panel, int64_t kc, int64_t rows,
              int64_t cols, bool accumulate, GemmAhead* ahead) {
  Tiles tiles;
  const int64_t group = kc * kTile, whole = kc / kTile, rest = kc % kTile;
  if (whole > 0)
    multiply_steps(tiles, sums, a, panel, group, whole, kTile, rows, cols, accumulate, ahead);
  if (rest > 0) {
    const GemmRows end = {a.data + whole * 64, a.tile_stride, a.row_stride};
    multiply_steps(tiles, sums, end, panel + whole * kTileFloats, group, 1, rest, rows, cols,
                   accumulate || whole > 0, ahead);
  }
  Tiles::release();
}

}  // namespace

extern const GemmInner gemm_amx = {nullptr, pack_b, multiply, 256, kKc, 16};

#else

extern const GemmInner gemm_amx = {nullptr, nullptr, nullptr, 0, 0, 0};

#endif

}  // namespace graft::GRAFT_ISA
