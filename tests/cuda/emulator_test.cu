// Behaviour of the runtime stand-in that the engine relies on.
#include "cuda/emulator/emulator.h"

#include <gtest/gtest.h>

#include "cuda/gpu.cuh"
#include "tests/cuda/support.h"

namespace graft {
namespace {

__global__ void lanes_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int* mine = out + threadIdx.x * 6;
  mine[0] = __shfl_sync(~0u, lane, 5);
  mine[1] = __shfl_up_sync(~0u, lane, 3);
  mine[2] = __shfl_down_sync(~0u, lane, 3, 8);
  mine[3] = __shfl_xor_sync(~0u, lane, 1);
  mine[4] = static_cast<int>(__ballot_sync(~0u, lane % 2));
  mine[5] = lane < 16 ? __shfl_xor_sync(0xffffu, lane, 8) : __shfl_xor_sync(0xffff0000u, lane, 2);
}
__global__ void empty_kernel(int) {}
__global__ void count_kernel(int* counter) { atomicAdd(counter, 1); }

TEST(Emulator, WarpOperations) {
  DeviceArray<int> out(64 * 6);
  launch(lanes_kernel, 1, 64, 0, nullptr, out.get());
  const auto v = out.host();
  for (size_t t = 0; t < 64; ++t) {
    const int l = static_cast<int>(t % 32);
    EXPECT_EQ(v[t * 6], 5);
    EXPECT_EQ(v[t * 6 + 1], l < 3 ? l : l - 3);
    EXPECT_EQ(v[t * 6 + 2], l % 8 < 5 ? l + 3 : l);
    EXPECT_EQ(v[t * 6 + 3], l ^ 1);
    EXPECT_EQ(v[t * 6 + 4], static_cast<int>(0xaaaaaaaau));
    EXPECT_EQ(v[t * 6 + 5], l < 16 ? l ^ 8 : l ^ 2);
  }
}

TEST(Emulator, AtomicsCountEveryThread) {
  DeviceArray<int> counter(std::vector<int>{0});
  launch(count_kernel, dim3(3, 2), dim3(8, 5), 0, nullptr, counter.get());
  EXPECT_EQ(counter.host()[0], 240);
}

TEST(Emulator, LaunchLimits) {
  EXPECT_EQ(emu::launch(empty_kernel, 1, 1025, 0, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(emu::launch(empty_kernel, dim3(1, 65536), 32, 0, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(emu::launch(empty_kernel, 1, 32, 49153, 0), cudaErrorInvalidValue);  // no opt-in yet
  (void)cudaGetLastError();
  EXPECT_THROW(launch(empty_kernel, 1, 1025, 0, nullptr, 0), Error);
  (void)cudaGetLastError();
  launch(empty_kernel, 1, 32, 100 << 10, nullptr, 0);  // which makes the opt-in
}

TEST(Emulator, CopyDirectionsAreChecked) {
  int host[4] = {};
  DeviceArray<int> d(4);
  EXPECT_EQ(cudaMemcpy(host, d.get(), 16, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(d.get(), host, 17, cudaMemcpyHostToDevice),
            cudaErrorInvalidValue);  // longer than d
  EXPECT_EQ(cudaFree(host), cudaErrorInvalidValue);
  (void)cudaGetLastError();
}

}  // namespace
}  // namespace graft
