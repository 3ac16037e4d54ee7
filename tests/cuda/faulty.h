// Kernels with one planted mistake each, to show that the emulator finds it.
#pragma once

#include <cuda_runtime.h>

namespace graft {

enum class Fault {
  kNone,
  kMissingBarrier,
  kMissingSyncwarp,
  kMissingAsyncWait,
  kUnusedAsyncCopy,
  kWritePastEnd,
  kReadPastEnd,
  kSharedPastEnd,
  kDynamicPastEnd,
  kDivergentBarrier,
  kDivergentShuffle,
  kUninitialisedShared,
  kBlockRace,
  kMisaligned
};

// out[i] = sum of in[128 i, 128 (i + 1)), n a multiple of 128. Throws Error where the launch fails.
void faulty_block_sum(Fault fault, const float* in, float* out, int n);

void touch_from_host(float* device_memory);  // which nobody must

}  // namespace graft
