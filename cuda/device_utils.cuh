// What kernels share: conversions, sums over a warp and a block, 16-byte vectors, and the step from
// a run-time dtype to the device's type.
#pragma once

#include <type_traits>

#include "cuda/gpu.cuh"
#include "tensor/dtype.h"

namespace graft {

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float as_float(__half x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
__device__ inline T round_to(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(x);
  else
    return x;
}

// N elements that are read and written at once; sizeof is 16 for full width.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T v[N];
};

constexpr unsigned kAllLanes = 0xffffffffu;

// Every lane gets the result; all 32 lanes must call.
__device__ inline float warp_sum(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

// Every thread of the block gets the result; blockDim.x a multiple of 32, block one-dimensional,
// all threads call. Safe to call again at once.
template <bool kMax>
__device__ inline float block_reduce(float x) {
  SHARED_ARRAY(float, partial, 32);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int warps = int(blockDim.x) / 32;
  x = kMax ? warp_max(x) : warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();  // every warp's partial result is written
  float total = partial[0];
  for (int w = 1; w < warps; ++w) total = kMax ? fmaxf(total, partial[w]) : total + partial[w];
  __syncthreads();  // nobody reads `partial` any more: the next call may write it
  return total;
}
__device__ inline float block_sum(float x) { return block_reduce<false>(x); }
__device__ inline float block_max(float x) { return block_reduce<true>(x); }

// Host: dispatch_device(x.dtype(), [&]<class T>(T) { launch(kernel<T>, ...); }) with T one of
// float, bf16 and __half.
template <class F>
void dispatch_device(DType dtype, F&& f) {
  switch (dtype) {
    case DType::F32:
      return f(float{});
    case DType::BF16:
      return f(bf16{});
    case DType::F16:
      return f(__half{});
    default:
      fail("cuda: no kernel for dtype ", dtype_name(dtype));
  }
}

// The bytes of a tensor as the device's type.
template <class T, class TensorType>
T* device_data(const TensorType& tensor) {
  return static_cast<T*>(tensor.raw());
}

}  // namespace graft
