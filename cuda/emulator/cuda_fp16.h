// Stand-in for <cuda_fp16.h>: storage and conversions (round to nearest even).
#pragma once

#include "cuda/emulator/cuda_runtime.h"

struct __half {
  _Float16 value;
};

struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half(float f) { return {_Float16(f)}; }
inline float __half2float(__half h) { return float(h.value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
