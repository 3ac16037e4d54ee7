// Stand-in for <cuda_runtime.h>: language keywords, device intrinsics, and (runtime_api.h) the part
// of the runtime API that the engine uses.
//
// __shared__ is deliberately missing: use SHARED_ARRAY / DYNAMIC_SHARED (gpu.cuh), so that the
// emulator can put red zones around shared memory and poison it at the start of each block.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/emulator/emulator.h"
#include "cuda/emulator/runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ---- Built-in variables: plain globals, threadIdx is set by the scheduler at every fiber switch
// ---------
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---- Synchronisation
// ----------------------------------------------------------------------------------
inline void __syncthreads(EMU_WHERE) { emu::sync_block(where); }
inline void __syncwarp(unsigned mask = ~0u, EMU_WHERE) { emu::sync_warp(mask, where); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- Warp shuffles, votes and reductions
// ----------------------------------------------------------------
namespace emu {
template <class T>
T shuffle(const char* what, uint32_t mask, T value, int source, Where where) {
  struct Payload {
    T in, out;
    int source;
  } mine{value, value, source};
  warp_collective(
      mask, what, &mine,
      [](void* const* all, uint32_t present) EMU_NO_RACECHECK {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(present >> lane & 1)) continue;
          auto* p = static_cast<Payload*>(all[lane]);
          if (!(present >> p->source & 1))
            fail("shuffle reads lane " + std::to_string(p->source) + ", which is not taking part");
          p->out = static_cast<Payload*>(all[p->source])->in;
        }
      },
      where);
  return mine.out;
}
// Applies `op` over the lanes' values; every lane gets the result.
template <class T, class Op>
T warp_reduce(const char* what, uint32_t mask, T value, Op, Where where) {
  warp_collective(
      mask, what, &value,
      [](void* const* all, uint32_t present) EMU_NO_RACECHECK {
        bool first = true;
        T sum{};
        for (int i = 0; i < 32; ++i)
          if (present >> i & 1)
            sum = std::exchange(first, false) ? *static_cast<T*>(all[i])
                                              : Op{}(sum, *static_cast<T*>(all[i]));
        for (int i = 0; i < 32; ++i)
          if (present >> i & 1) *static_cast<T*>(all[i]) = sum;
      },
      where);
  return value;
}
template <class T, class F>
EMU_NO_RACECHECK T atomic_update(T* p, F f) {
  touch(p, sizeof(T), Access::kAtomic);
  T old = *p;
  *p = f(old);
  return old;
}
}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMU_WHERE) {
  int lane = static_cast<int>(emu::lane_id());
  return emu::shuffle("__shfl_sync", mask, v, (lane & ~(width - 1)) | (source & (width - 1)),
                      where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, EMU_WHERE) {
  int lane = static_cast<int>(emu::lane_id()), source = lane ^ bits;
  return emu::shuffle("__shfl_xor_sync", mask, v, source > (lane | (width - 1)) ? lane : source,
                      where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_WHERE) {
  int lane = static_cast<int>(emu::lane_id()), source = lane + static_cast<int>(delta);
  return emu::shuffle("__shfl_down_sync", mask, v, source > (lane | (width - 1)) ? lane : source,
                      where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_WHERE) {
  int lane = static_cast<int>(emu::lane_id()), source = lane - static_cast<int>(delta);
  return emu::shuffle("__shfl_up_sync", mask, v, source < (lane & ~(width - 1)) ? lane : source,
                      where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_WHERE) {
  return emu::warp_reduce(
      "__ballot_sync", mask, predicate ? 1u << emu::lane_id() : 0u,
      [](unsigned a, unsigned b) { return a | b; }, where);
}
inline int __any_sync(unsigned mask, int p, EMU_WHERE) {
  return __ballot_sync(mask, p, where) != 0;
}
inline int __all_sync(unsigned mask, int p, EMU_WHERE) {
  return __ballot_sync(mask, !p, where) == 0;
}
// T is int or unsigned, as on the hardware.
template <class T>
T __reduce_add_sync(unsigned mask, T v, EMU_WHERE) {
  return emu::warp_reduce(
      "__reduce_add_sync", mask, v, [](T a, T b) { return a + b; }, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T v, EMU_WHERE) {
  return emu::warp_reduce(
      "__reduce_max_sync", mask, v, [](T a, T b) { return a > b ? a : b; }, where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T v, EMU_WHERE) {
  return emu::warp_reduce(
      "__reduce_min_sync", mask, v, [](T a, T b) { return a < b ? a : b; }, where);
}

// ---- Atomics (only one fiber runs at a time, so a plain update is atomic)
// ---------------------------------
template <class T>
T atomicAdd(T* p, T v) {
  return emu::atomic_update(p, [v](T old) { return old + v; });
}
template <class T>
T atomicMax(T* p, T v) {
  return emu::atomic_update(p, [v](T old) { return std::max(old, v); });
}
template <class T>
T atomicMin(T* p, T v) {
  return emu::atomic_update(p, [v](T old) { return std::min(old, v); });
}
template <class T>
T atomicExch(T* p, T v) {
  return emu::atomic_update(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  return emu::atomic_update(p, [=](T old) { return old == expected ? v : old; });
}

// ---- Math
// ---------------------------------------------------------------------------------------------
using std::max, std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __uint_as_float(unsigned u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned u;
  std::memcpy(&u, &f, 4);
  return u;
}
// Byte i of the result is byte selector[4i, 4i + 3) of the eight bytes of (y, x).
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (choice & 7)) & 0xff;
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, eight times
    result |= byte << 8 * i;
  }
  return result;
}
// Operations that are rounded by themselves; the emulated build has no other ones.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
// Loads and stores with a hint for the caches.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
