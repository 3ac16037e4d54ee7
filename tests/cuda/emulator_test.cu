// Behaviour of the runtime stand-in that the engine relies on.
#include "cuda/emulator/emulator.h"

#include <gtest/gtest.h>

#include "cuda/mma.cuh"
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

// d (16, 8) = a (16, 16) b (8, 16)^T, one warp, by cp.async, ldmatrix and mma.sync.
__global__ void mma_kernel(const bf16* a, const bf16* b, float* d) {
  SHARED_ARRAY(bf16, tile, 16 * 16);
  const int lane = int(threadIdx.x);
  ptx::cp_async16(tile + lane * 8, a + lane * 8, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();  // every lane's part of the tile has arrived
  uint32_t fragment[4];
  ptx::ldmatrix_x4(fragment, tile + lane % 16 * 16 + lane / 16 * 8);
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(b) + lane / 4 * 8 + lane % 4;
  float sums[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k16(sums, fragment, pairs[0], pairs[4]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

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

// The layout of fragments is that of the PTX ISA; small integers, so that the sums are exact.
TEST(Emulator, TensorCoreProductIsTheProduct) {
  std::vector<bf16> a, b;
  for (int i = 0; i < 16 * 16; ++i) a.push_back(bf16(float(i * 7 % 11 - 5)));
  for (int i = 0; i < 8 * 16; ++i) b.push_back(bf16(float(i * 5 % 13 - 6)));
  DeviceArray<bf16> da(a), db(b);
  DeviceArray<float> d(16 * 8);
  launch(mma_kernel, 1, 32, 0, nullptr, da.get(), db.get(), d.get());
  const std::vector<float> got = d.host();
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j) {
      float sum = 0;
      for (size_t k = 0; k < 16; ++k) sum += float(a[i * 16 + k]) * float(b[j * 16 + k]);
      EXPECT_EQ(got[i * 8 + j], sum) << i << ", " << j;
    }
}

TEST(Emulator, AtomicsCountEveryThread) {
  DeviceArray<int> counter(std::vector<int>{0});
  launch(count_kernel, dim3(3, 2), dim3(8, 5), 0, nullptr, counter.get());
  EXPECT_EQ(counter.host()[0], 240);
}

TEST(Emulator, LaunchLimits) {
  EXPECT_EQ(emu::launch(empty_kernel, 1, 1025, 0, nullptr, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(emu::launch(empty_kernel, dim3(1, 65536), 32, 0, nullptr, 0),
            cudaErrorInvalidConfiguration);
  EXPECT_EQ(emu::launch(empty_kernel, 1, 32, 49153, nullptr, 0),
            cudaErrorInvalidValue);  // no opt-in yet
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

TEST(Emulator, MemoryEndsWhereTheEnvironmentSays) {
  ASSERT_EQ(setenv("EMU_MEMORY_MB", "1", 1), 0);
  size_t free = 0, total = 0;
  EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  EXPECT_EQ(total, size_t{1} << 20);
  void* p = nullptr;
  EXPECT_EQ(cudaMalloc(&p, free + 1), cudaErrorMemoryAllocation);
  EXPECT_EQ(p, nullptr);
  unsetenv("EMU_MEMORY_MB");
  (void)cudaGetLastError();
}

TEST(Emulator, CopiesRowsOfAPitchedMatrix) {
  const std::vector<int> from = {1, 2, 3, 4, 5, 6};
  DeviceArray<int> to(std::vector<int>(6, 0));
  EXPECT_EQ(cudaMemcpy2DAsync(to.get(), 12, from.data(), 12, 8, 2, cudaMemcpyHostToDevice),
            cudaSuccess);
  EXPECT_EQ(to.host(), (std::vector<int>{1, 2, 0, 4, 5, 0}));
}

}  // namespace
}  // namespace graft
