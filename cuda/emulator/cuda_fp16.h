// Stand-in for <cuda_fp16.h>: storage and conversions (round to nearest even).
#pragma once

#include "cuda/emulator/cuda_runtime.h"

struct __half {
  _Float16 value;
};

inline __half __float2half(float f) { return {_Float16(f)}; }
inline float __half2float(__half h) { return float(h.value); }
