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
__global__ void intrinsics_kernel(const float* in, float* out, int* bits) {
  const int lane = int(threadIdx.x);
  __stcs(out + lane, __ldcs(in + lane) + __ldcg(in) + __ldg(in + 1));
  int* mine = bits + lane * 6;
  mine[0] = __reduce_add_sync(~0u, lane - 40);
  mine[1] = __reduce_max_sync(~0u, lane - 40);
  mine[2] = __reduce_min_sync(~0u, lane - 40);
  mine[3] = int(__reduce_max_sync(~0u, unsigned(lane - 40)));  // unsigned: -9 is the largest
  mine[4] = int(__byte_perm(0x33221100u, 0x77665584u, 0x6c41u));
  mine[5] = __clz(1 << lane);
}
// The last thread leaves before the others ask for its value.
constexpr int kLeavingLine = __LINE__ + 3;
__global__ void leaving_kernel(int* out) {
  if (threadIdx.x == 31) return;
  out[threadIdx.x] = __shfl_sync(~0u, int(threadIdx.x), 31);  // line kLeavingLine
}
// Accesses of several widths to one word of shared memory; which of them race, the test knows.
__global__ void widths_kernel(int which) {
  SHARED_ARRAY(uint32_t, words, 8);
  const int thread = int(threadIdx.x);
  auto* bytes = reinterpret_cast<unsigned char*>(words);
  auto* halves = reinterpret_cast<uint16_t*>(words);
  if (thread < 8) words[thread] = 0;
  __syncthreads();
  if (which == 0) {  // neighbours, each its own
    bytes[thread] = 1;
  } else if (which == 1) {
    if (thread == 0) words[0] = 1;
    if (thread == 1) bytes[2] = 1;
  } else if (which == 2) {
    if (thread == 1) bytes[2] = 1;
    if (thread == 0) words[0] = 1;
  } else if (which == 3) {
    if (thread == 0) halves[0] = 1;
    if (thread == 1) halves[1] = uint16_t(halves[1] + 1);
  } else if (which == 4) {
    if (thread == 0) halves[1] = 1;
    if (thread == 1) words[1] = bytes[3];
  } else {  // a write of the whole after reads of its parts
    if (thread < 4) bytes[4 + thread] = bytes[thread];
    __syncthreads();
    if (thread == 9) words[0] = 2;
  }
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

TEST(Emulator, Intrinsics) {
  std::vector<float> values(32);
  for (size_t i = 0; i < 32; ++i) values[i] = float(i + 1);
  DeviceArray<float> in(values), out(32);
  DeviceArray<int> bits(32 * 6);
  launch(intrinsics_kernel, 1, 32, 0, nullptr, in.get(), out.get(), bits.get());
  const auto v = bits.host();
  for (int l = 0; l < 32; ++l) {
    EXPECT_EQ(out.host()[size_t(l)], float(l + 1) + 1 + 2);
    const int* mine = v.data() + l * 6;
    EXPECT_EQ(mine[0], 31 * 16 - 40 * 32);
    EXPECT_EQ(mine[1], -9);
    EXPECT_EQ(mine[2], -40);
    EXPECT_EQ(mine[3], -9);
    EXPECT_EQ(mine[4], 0x66ff8411);  // bytes 1, 4, the sign of 4, 6
    EXPECT_EQ(mine[5], 31 - l);
  }
}

// A fault that is only seen when a thread ends is reported as any other.
TEST(Emulator, ShufflesFromALaneThatHasLeft) {
  DeviceArray<int> out(32);
  for (auto order : {emu::Order::kAscending, emu::Order::kDescending}) {
    const emu::Options saved = std::exchange(emu::options(), {order, 1});
    EXPECT_THROW(launch(leaving_kernel, 1, 32, 0, nullptr, out.get()), Error);
    emu::options() = saved;
    const std::string report = emu::take_report();
    EXPECT_NE(report.find("shuffle reads lane 31"), std::string::npos) << report;
    EXPECT_NE(report.find(", at emulator_test.cu:" + std::to_string(kLeavingLine)),
              std::string::npos)
        << report;
    (void)cudaGetLastError();
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

TEST(Emulator, RacesAreFoundAcrossWidths) {
  for (int which = 0; which < 6; ++which)
    for (auto order : {emu::Order::kAscending, emu::Order::kDescending}) {
      const emu::Options saved = std::exchange(emu::options(), {order, 1});
      try {
        launch(widths_kernel, 1, 32, 0, nullptr, which);
      } catch (const Error&) {
      }
      emu::options() = saved;
      const std::string report = emu::take_report();
      // Not seen without the checker.
      const bool races =
          emu::checks() == emu::Checks::kRaces && (which == 1 || which == 2 || which == 4);
      EXPECT_EQ(report.find("race between") != std::string::npos, races) << which << report;
      EXPECT_EQ(report.empty(), !races) << which << report;
      (void)cudaGetLastError();
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
