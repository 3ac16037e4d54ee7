// Stand-in for <cuda_runtime.h>: language keywords, device intrinsics, and the part of the runtime
// API that the engine uses. Streams and events are accepted and ignored: every call is synchronous.
//
// __shared__ is deliberately missing: use SHARED_ARRAY / DYNAMIC_SHARED (gpu.cuh), so that the
// emulator can put red zones around shared memory and poison it at the start of each block.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/emulator/emulator.h"

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
inline unsigned __reduce_add_sync(unsigned mask, unsigned v, EMU_WHERE) {
  return emu::warp_reduce(
      "__reduce_add_sync", mask, v, [](unsigned a, unsigned b) { return a + b; }, where);
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
template <class T>
T __ldg(const T* p) {
  return *p;
}

// ---- Runtime API
// ----------------------------------------------------------------------------------------
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  int multiProcessorCount, major, minor;
};
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

cudaError_t cudaMalloc(void** p, size_t bytes);
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
cudaError_t cudaFree(void* p);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream = nullptr);
cudaError_t cudaMallocHost(void** p, size_t bytes);
template <class T>
cudaError_t cudaMallocHost(T** p, size_t bytes) {
  return cudaMallocHost(reinterpret_cast<void**>(p), bytes);
}
cudaError_t cudaFreeHost(void* p);
// The total is EMU_MEMORY_MB from the environment, read at each call; 1 TiB without it.
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDeviceCount(int* count);
const char* cudaGetErrorString(cudaError_t e);
cudaError_t emuFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute a, int v) {
  return emuFuncSetAttribute(reinterpret_cast<const void*>(kernel), a, v);
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, n, kind);
}
inline cudaError_t cudaMemset(void* p, int value, size_t n) { return cudaMemsetAsync(p, value, n); }
inline cudaError_t cudaDeviceSynchronize() { return cudaPeekAtLastError(); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaPeekAtLastError(); }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) {
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t = nullptr) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaPeekAtLastError(); }
