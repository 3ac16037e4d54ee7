// Vectors of floats for the CPU kernels, by GCC's vector extensions, so that one source serves
// every instruction set: 16 lanes with AVX-512 and for wide16, 8 for avx2, 4 for portable.
// Everything here lies in namespace GRAFT_ISA and uses no library templates
// (tensor/cpu/cpu_kernels.h says why).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "tensor/dtype.h"

#ifndef GRAFT_ISA
#define GRAFT_ISA portable
#endif

namespace graft::GRAFT_ISA {

#if defined(__AVX512F__) || defined(GRAFT_ISA_wide16)
constexpr int kLanes = 16;
#elif defined(GRAFT_ISA_avx2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI32 __attribute__((vector_size(4 * kLanes)));  // also what comparisons give
typedef uint16_t VecU16 __attribute__((vector_size(2 * kLanes)));

// How much of a vector a loop step covers: all of it, or its first n lanes (the end of a row).
struct Full {};
struct Part {
  int n;
};

// body(i, Full{}) for whole vectors of [0, n), then body(i, Part{rest}).
template <class Body>
inline __attribute__((always_inline)) void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Full{});
  if (i < n) body(i, Part{int(n - i)});
}

inline Vec broadcast(float x) { return x - Vec{}; }
inline VecU32 bits(Vec x) { return (VecU32)x; }
inline Vec from_bits(VecU32 x) { return (Vec)x; }
inline Vec select(VecI32 mask, Vec yes, Vec no) { return mask ? yes : no; }

inline VecI32 lane_index() {
  VecI32 index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

// max and min give b where either is NaN, as the instructions do. (The maskz forms are those that
// g++ 12 compiles without a false warning; a mask of ones costs nothing.)
#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
inline Vec sqrt(Vec a) { return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)a); }
#elif defined(GRAFT_ISA_wide16)
struct Halves {
  __m256 low, high;
};
inline Halves halves(Vec a) {
  Halves h;
  std::memcpy(&h, &a, sizeof a);
  return h;
}
inline Vec whole(Halves h) {
  Vec a;
  std::memcpy(&a, &h, sizeof a);
  return a;
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec sqrt(Vec a) {
  const Halves h = halves(a);
  return whole({_mm256_sqrt_ps(h.low), _mm256_sqrt_ps(h.high)});
}
#elif defined(GRAFT_ISA_avx2)
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
inline Vec sqrt(Vec a) { return (Vec)_mm256_sqrt_ps((__m256)a); }
#else
inline Vec max(Vec a, Vec b) { return (Vec)_mm_max_ps((__m128)a, (__m128)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm_min_ps((__m128)a, (__m128)b); }
inline Vec sqrt(Vec a) { return (Vec)_mm_sqrt_ps((__m128)a); }
#endif

// --- conversions between F32 lanes and 16-bit storage, rounding to nearest even ---

inline Vec widen_bf16(VecU16 x) { return from_bits(__builtin_convertvector(x, VecU32) << 16); }

inline VecU16 narrow_bf16(Vec x) {
  const VecU32 u = bits(x);
  const VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  const VecU32 quiet = (u >> 16) | 0x40;  // NaN stays NaN
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, VecU16);
}

inline Vec widen_f16(VecU16 x) {
  const VecU32 u = __builtin_convertvector(x, VecU32);
  // The exponent is 112 too small after the shift; the product repairs it, subnormals included.
  const Vec finite = from_bits((u & 0x7fffu) << 13) * 0x1p112f;
  const VecU32 special = ((u & 0x7fffu) << 13) | 0x7f800000u;  // infinity and NaN
  const VecU32 magnitude = (u & 0x7c00u) == 0x7c00u ? special : bits(finite);
  return from_bits(magnitude | ((u & 0x8000u) << 16));
}

inline uint16_t narrow_f16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00u | uint16_t((u >> 13) & 0x3ffu);
  if (u >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (u >= 0x38800000u) {                       // normal in F16
    u -= 112u << 23;
    return sign | uint16_t((u + 0xfffu + ((u >> 13) & 1)) >> 13);
  }
  // Subnormal: adding 0.5 aligns the last bit of F16 with the last bit of F32, and rounds.
  float magnitude;
  std::memcpy(&magnitude, &u, 4);
  magnitude += 0.5f;
  std::memcpy(&u, &magnitude, 4);
  return sign | uint16_t(u - 0x3f000000u);
}

inline VecU16 narrow_f16(Vec x) {
  VecU16 y;
  for (int i = 0; i < kLanes; ++i) y[i] = narrow_f16(x[i]);
  return y;
}

inline Vec widen(VecU16 x, BFloat16) { return widen_bf16(x); }
inline Vec widen(VecU16 x, Float16) { return widen_f16(x); }
inline VecU16 narrow(Vec x, BFloat16) { return narrow_bf16(x); }
inline VecU16 narrow(Vec x, Float16) { return narrow_f16(x); }

inline float to_f32(float x) { return x; }
inline float to_f32(BFloat16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// --- loads and stores; lanes that a Part leaves out are read as zero and not written ---

inline Vec load(const float* p, Full = {}) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x, Full = {}) { std::memcpy(p, &x, sizeof x); }
inline Vec load(const float* p, Part part) {
  Vec x{};
  for (int i = 0; i < part.n; ++i) x[i] = p[i];
  return x;
}
inline void store(float* p, Vec x, Part part) {
  for (int i = 0; i < part.n; ++i) p[i] = x[i];
}
template <class T>
inline Vec load(const T* p, Full = {}) {
  VecU16 x;
  std::memcpy(&x, p, sizeof x);
  return widen(x, T{});
}
template <class T>
inline void store(T* p, Vec x, Full = {}) {
  const VecU16 y = narrow(x, T{});
  std::memcpy(p, &y, sizeof y);
}
template <class T>
inline Vec load(const T* p, Part part) {
  VecU16 x{};
  for (int i = 0; i < part.n; ++i) x[i] = p[i].bits;
  return widen(x, T{});
}
template <class T>
inline void store(T* p, Vec x, Part part) {
  const VecU16 y = narrow(x, T{});
  for (int i = 0; i < part.n; ++i) p[i].bits = y[i];
}

// f(float{}) or f(BFloat16{}), the types of activations; with F16, the types of weights.
template <class F>
inline void with_activation(DType dtype, F f) {
  if (dtype == DType::F32) {
    f(float{});
  } else {
    f(BFloat16{});
  }
}
template <class F>
inline void with_weight(DType dtype, F f) {
  if (dtype == DType::F16) {
    f(Float16{});
  } else {
    with_activation(dtype, f);
  }
}

// --- arithmetic ---

// Lanes are added by halving: always the same order.
inline float horizontal_sum(Vec x) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline float horizontal_max(Vec x) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

// e^x with a relative error below 1e-7 for x in [-87.33, 88.37]; 0 below, e^88.37 above; NaN stays.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r^2 p(r), p of degree 4 (as in Cephes, Moshier).
inline Vec exp(Vec x) {
  const float kLow = -87.33654f, kHigh = 88.376f, kMagic = 12582912.0f;  // 1.5 * 2^23 rounds
  const Vec clamped = min(broadcast(kHigh), max(broadcast(kLow), x));
  const Vec shifted = clamped * 1.44269504088896341f + kMagic;
  const Vec n = shifted - kMagic;
  Vec r = clamped - n * 0.693359375f;  // ln 2 in two parts, the first exact in products with n
  r = r - n * -2.12194440e-4f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec mantissa = p * (r * r) + r + 1.0f;
  const VecU32 power = (bits(shifted) + (127u - 0x4b400000u)) << 23;  // 2^n
  return select(x < kLow, Vec{}, mantissa * from_bits(power));
}
inline float exp(float x) { return exp(broadcast(x))[0]; }

}  // namespace graft::GRAFT_ISA
