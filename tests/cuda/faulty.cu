// One planted mistake per kernel, to show that the emulator finds it. Every kernel adds up blocks
// of 128 floats: out[block] = sum of in[128 * block ...]. Comments "@name" mark the lines that
// reports must name.
#include "tests/cuda/faulty.h"

#include "cuda/device_utils.cuh"
#include "cuda/mma.cuh"

namespace graft {
namespace {

constexpr int kThreads = 128;

template <Fault kFault>
__global__ void faulty_kernel(const float* in, float* out) {  // @kernel
  SHARED_ARRAY(float, values, kThreads);
  SHARED_ARRAY(float, partial, kThreads / 32);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int i = int(blockIdx.x) * kThreads + thread;
  if (kFault == Fault::kReadPastEnd) i += 1;

  if constexpr (kFault == Fault::kMissingAsyncWait) {
    if (thread % 4 == 0) ptx::cp_async16(values + thread, in + i, true);  // @async
    ptx::cp_async_commit();
  } else if constexpr (kFault == Fault::kMisaligned) {
    if (thread % 4 == 0) {
      const float4* from = reinterpret_cast<const float4*>(in + i);
      *reinterpret_cast<float4*>(values + thread) = *from;  // @misaligned
    }
  } else if constexpr (kFault == Fault::kDynamicPastEnd) {
    DYNAMIC_SHARED(float, dynamic);
    dynamic[thread + 1] = in[i];  // @dynamic
    values[thread] = in[i];
  } else if (kFault != Fault::kUninitialisedShared || thread != 17) {
    values[kFault == Fault::kSharedPastEnd ? thread + 1 : thread] = in[i];  // @load
  }
  __syncthreads();

  // Each warp adds up the values of the next warp, so that the data really crosses a barrier.
  float v = values[(thread + 32) % kThreads];  // @read
  if (kFault == Fault::kMissingSyncwarp) {     // tree over shared memory without __syncwarp
    for (int offset = 16; offset > 0; offset /= 2) {
      if (lane < offset) values[thread] += values[thread + offset];  // @tree
    }
    v = values[warp * 32];
  } else if (kFault == Fault::kDivergentShuffle) {
    v = lane < 16 ? warp_sum(v) : warp_max(v);  // @shuffle
  } else {
    v = warp_sum(v);
  }
  if (lane == 0) partial[warp] = v;  // @partial
  if (kFault == Fault::kDivergentBarrier) {
    if (lane != 31) __syncthreads();  // @barrier
  } else if (kFault != Fault::kMissingBarrier) {
    __syncthreads();
  }
  if (thread == 0) {
    const float sum = partial[0] + partial[1] + partial[2] + partial[3];  // @sum
    const unsigned at = kFault == Fault::kBlockRace      ? 0              // all blocks write here
                        : kFault == Fault::kWritePastEnd ? blockIdx.x + 1
                                                         : blockIdx.x;
    out[at] = sum;  // @store
  }
  if constexpr (kFault == Fault::kUnusedAsyncCopy) {
    SHARED_ARRAY(float, unused, kThreads);
    if (thread % 4 == 0) ptx::cp_async16(unused + thread, in + i, true);  // @unused
    ptx::cp_async_commit();
  }
}

}  // namespace

void faulty_block_sum(Fault fault, const float* in, float* out, int n) {
  using Kernel = void (*)(const float*, float*);
  const Kernel kernels[] = {
      faulty_kernel<Fault::kNone>,
      faulty_kernel<Fault::kMissingBarrier>,
      faulty_kernel<Fault::kMissingSyncwarp>,
      faulty_kernel<Fault::kMissingAsyncWait>,
      faulty_kernel<Fault::kUnusedAsyncCopy>,
      faulty_kernel<Fault::kWritePastEnd>,
      faulty_kernel<Fault::kReadPastEnd>,
      faulty_kernel<Fault::kSharedPastEnd>,
      faulty_kernel<Fault::kDynamicPastEnd>,
      faulty_kernel<Fault::kDivergentBarrier>,
      faulty_kernel<Fault::kDivergentShuffle>,
      faulty_kernel<Fault::kUninitialisedShared>,
      faulty_kernel<Fault::kBlockRace>,
      faulty_kernel<Fault::kMisaligned>,
  };
  launch(kernels[int(fault)], dim3(ceil_div(n, kThreads)), dim3(kThreads), kThreads * sizeof(float),
         nullptr, in, out);
}

void touch_from_host(float* device_memory) { *device_memory = 1; }

}  // namespace graft
