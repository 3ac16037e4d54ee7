// The vector type of the matrix product, `Vec`: 16 floats with AVX-512, 8 with AVX2, 4 elsewhere,
// and in wide16 two AVX2 halves that act as AVX-512's. Included by gemm_tile.h alone, once for
// each instruction set; nothing here may be shared between them, hence the namespace.
#pragma once

#include <cstdint>

#include "tensor/cpu/kernels/gemm_simd8.h"

namespace graft::GRAFT_ISA {

#if defined(__AVX512F__)

struct Vec16 {
  static constexpr int kLanes = 16;
  __m512 v;
  static Vec16 zero() { return {_mm512_setzero_ps()}; }
  static Vec16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec16 load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec16 load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
#if defined(__AVX512BF16__)
  void store(BFloat16* p) const {  // the same rounding; what is below 2^-126 becomes zero
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
#else
  void store(BFloat16* p) const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, bias), 16);
    const __m512i nan = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i y = _mm512_mask_blend_epi32(is_nan, rounded, nan);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(y));
  }
#endif
};

inline Vec16 operator+(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec16 operator*(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec16 multiply_add(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

inline void transpose(Vec16 (&r)[16]) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // u[i + j]: column j of each 128-bit lane, rows i..i+3
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);  // lanes 0, 2
    const __m512 odd_low = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);   // lanes 1, 3
    const __m512 even_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    r[4 + j].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    r[12 + j].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

inline float sum(Vec16 a) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
  return sum(Vec8{_mm256_add_ps(_mm512_castps512_ps256(a.v), high)});
}

using Vec = Vec16;

#elif defined(GRAFT_ISA_wide16)

struct Vec16 {
  static constexpr int kLanes = 16;
  Vec8 low, high;
  static Vec16 zero() { return {Vec8::zero(), Vec8::zero()}; }
  static Vec16 broadcast(float x) { return {Vec8::broadcast(x), Vec8::broadcast(x)}; }
  template <class T>
  static Vec16 load(const T* p) {
    return {Vec8::load(p), Vec8::load(p + 8)};
  }
  template <class T>
  void store(T* p) const {
    low.store(p);
    high.store(p + 8);
  }
};

inline Vec16 operator+(Vec16 a, Vec16 b) { return {a.low + b.low, a.high + b.high}; }
inline Vec16 operator*(Vec16 a, Vec16 b) { return {a.low * b.low, a.high * b.high}; }
inline Vec16 multiply_add(Vec16 a, Vec16 b, Vec16 c) {
  return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}

inline void transpose(Vec16 (&r)[16]) {
  Vec8 block[2][2][8];  // of 8 x 8: rows half, columns half
  for (int i = 0; i < 16; ++i) {
    block[i / 8][0][i % 8] = r[i].low;
    block[i / 8][1][i % 8] = r[i].high;
  }
  for (auto& row : block)
    for (auto& b : row) transpose(b);
  for (int i = 0; i < 16; ++i) r[i] = {block[0][i / 8][i % 8], block[1][i / 8][i % 8]};
}

inline float sum(Vec16 a) { return sum(a.low + a.high); }

using Vec = Vec16;

#elif defined(__AVX2__)

using Vec = Vec8;

#else

inline float widen(Float16 x) { return to_float(x); }  // not inline: no instruction set leaks

typedef float Float4 __attribute__((vector_size(16)));

struct Vec4 {
  static constexpr int kLanes = 4;
  Float4 v;
  static Vec4 zero() { return {Float4{}}; }
  static Vec4 broadcast(float x) { return {Float4{x, x, x, x}}; }
  template <class T>
  static Vec4 load(const T* p) {
    return {Float4{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
  }
  static Vec4 load(const float* p) {
    Vec4 y;
    __builtin_memcpy(&y, p, 16);
    return y;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < 4; ++i) narrow(p + i, v[i]);
  }
  void store(float* p) const { __builtin_memcpy(p, &v, 16); }
};

inline Vec4 operator+(Vec4 a, Vec4 b) { return {a.v + b.v}; }
inline Vec4 operator*(Vec4 a, Vec4 b) { return {a.v * b.v}; }
inline Vec4 multiply_add(Vec4 a, Vec4 b, Vec4 c) { return {a.v * b.v + c.v}; }

inline void transpose(Vec4 (&r)[4]) {
  const auto t0 = __builtin_shufflevector(r[0].v, r[1].v, 0, 4, 1, 5);
  const auto t1 = __builtin_shufflevector(r[0].v, r[1].v, 2, 6, 3, 7);
  const auto t2 = __builtin_shufflevector(r[2].v, r[3].v, 0, 4, 1, 5);
  const auto t3 = __builtin_shufflevector(r[2].v, r[3].v, 2, 6, 3, 7);
  r[0].v = __builtin_shufflevector(t0, t2, 0, 1, 4, 5);
  r[1].v = __builtin_shufflevector(t0, t2, 2, 3, 6, 7);
  r[2].v = __builtin_shufflevector(t1, t3, 0, 1, 4, 5);
  r[3].v = __builtin_shufflevector(t1, t3, 2, 3, 6, 7);
}

inline float sum(Vec4 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

using Vec = Vec4;

#endif

constexpr int kLanes = Vec::kLanes;

// The first n lanes from memory, the others zero.
template <class T>
Vec load_first(const T* p, int64_t n) {
  alignas(64) float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = widen(p[i]);
  return Vec::load(lanes);
}

}  // namespace graft::GRAFT_ISA
