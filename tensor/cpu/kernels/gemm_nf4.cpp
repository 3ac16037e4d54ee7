// NF4 weights on their way into the packing: four bits an element become F32 or BF16. A block has
// one scale, so its 16 possible elements are worked out first, and each code then picks one of
// them: by one permutation of registers with AVX-512, by two with AVX2.
#include "tensor/cpu/kernels/gemm_tile.h"

namespace graft::GRAFT_ISA {
namespace {

constexpr int64_t kBlock = 64;  // elements with one scale

inline uint8_t code_at(const uint8_t* codes, int64_t i) {
  return i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
}

// The 16 elements that a block of one scale can have.
template <class T>
struct Table {
  alignas(64) T value[16];
  explicit Table(float absmax) {
#if defined(__AVX2__)
    const Vec8 scale = Vec8::broadcast(absmax);
    (Vec8::load(kNf4Values) * scale).store(value);
    (Vec8::load(kNf4Values + 8) * scale).store(value + 8);
#else
    for (int i = 0; i < 16; ++i) narrow(value + i, kNf4Values[i] * absmax);
#endif
  }
};

#if defined(__AVX2__)

// 16 codes of 8 bytes, the high half of a byte first, as bytes.
inline __m128i codes16(const uint8_t* codes) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m128i half = _mm_set1_epi8(15);
  return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(packed, 4), half),
                           _mm_and_si128(packed, half));
}

#endif

// pick(dst, codes): 16 elements from 8 bytes.
#if defined(__AVX512F__)

struct PickFloats {
  __m512 table;
  explicit PickFloats(const Table<float>& t) : table(_mm512_load_ps(t.value)) {}
  void operator()(float* dst, const uint8_t* codes) const {
    _mm512_storeu_ps(dst, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes16(codes)), table));
  }
};
struct PickHalves {
  __m256i table;
  explicit PickHalves(const Table<BFloat16>& t)
      : table(_mm256_load_si256(reinterpret_cast<const __m256i*>(t.value))) {}
  void operator()(BFloat16* dst, const uint8_t* codes) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst),
                        _mm256_permutexvar_epi16(_mm256_cvtepu8_epi16(codes16(codes)), table));
  }
};

#elif defined(__AVX2__)

struct PickFloats {
  __m256 low, high;
  explicit PickFloats(const Table<float>& t)
      : low(_mm256_load_ps(t.value)), high(_mm256_load_ps(t.value + 8)) {}
  __m256 pick(__m128i codes) const {
    const __m256i index = _mm256_cvtepu8_epi32(codes);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 is the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                            _mm256_permutevar8x32_ps(high, index), upper);
  }
  void operator()(float* dst, const uint8_t* codes) const {
    const __m128i all = codes16(codes);
    _mm256_storeu_ps(dst, pick(all));
    _mm256_storeu_ps(dst + 8, pick(_mm_srli_si128(all, 8)));
  }
};
struct PickHalves {  // the low and the high bytes of the elements, picked one by one
  __m128i low, high;
  explicit PickHalves(const Table<BFloat16>& t) {
    alignas(16) uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
      bytes[0][i] = uint8_t(t.value[i].bits);
      bytes[1][i] = uint8_t(t.value[i].bits >> 8);
    }
    low = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0]));
    high = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1]));
  }
  void operator()(BFloat16* dst, const uint8_t* codes) const {
    const __m128i index = codes16(codes);
    const __m128i l = _mm_shuffle_epi8(low, index), h = _mm_shuffle_epi8(high, index);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm_unpacklo_epi8(l, h));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 8), _mm_unpackhi_epi8(l, h));
  }
};

#else

template <class T>
struct Pick {
  const Table<T>& table;
  explicit Pick(const Table<T>& t) : table(t) {}
  void operator()(T* dst, const uint8_t* codes) const {
    for (int i = 0; i < 8; ++i) {
      dst[2 * i] = table.value[codes[i] >> 4];
      dst[2 * i + 1] = table.value[codes[i] & 15];
    }
  }
};
using PickFloats = Pick<float>;
using PickHalves = Pick<BFloat16>;

#endif

template <class T, class Pick>
void widen_row(T* dst, const uint8_t* codes, int64_t at, int64_t count, const float* absmax) {
  for (const int64_t end = at + count; at < end; ++absmax) {
    const int64_t block_end = (at / kBlock + 1) * kBlock, stop = block_end < end ? block_end : end;
    const Table<T> table(*absmax);
    const Pick pick(table);
    if (at % 2) *dst++ = table.value[code_at(codes, at++)];
    for (; at + 16 <= stop; at += 16, dst += 16) pick(dst, codes + at / 2);
    for (; at < stop; ++at) *dst++ = table.value[code_at(codes, at)];
  }
}

}  // namespace

void widen_nf4(void* dst, DType dtype, const Nf4Rows& src) {
  for (int64_t r = 0; r < src.rows; ++r) {
    const int64_t at = src.first + r * src.row_step;
    const float* const absmax = src.absmax + r * src.absmax_stride;
    if (dtype == DType::F32)
      widen_row<float, PickFloats>(static_cast<float*>(dst) + r * src.count, src.codes, at,
                                   src.count, absmax);
    else
      widen_row<BFloat16, PickHalves>(static_cast<BFloat16*>(dst) + r * src.count, src.codes, at,
                                      src.count, absmax);
  }
}

}  // namespace graft::GRAFT_ISA
