// Order between streams, and between a stream and the host: what the runtime stand-in does with
// emu::lazy(), and that a wait that is missing shows.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cuda/emulator/emulator.h"
#include "cuda/emulator/lazy.h"
#include "cuda/gpu.cuh"
#include "cuda/staging.h"
#include "tests/cuda/support.h"

namespace graft {
namespace {

constexpr size_t kN = 16;
const std::vector<float> kOnes(kN, 1.f), kTwos(kN, 2.f), kThrees(kN, 3.f);

__global__ void add_one_kernel(float* y, const float* x) { y[threadIdx.x] = x[threadIdx.x] + 1; }
#if !EMU_ASAN
__global__ void overrun_kernel(float* x, int n) { x[n + int(threadIdx.x)] = 0; }
#endif

class LazyStreams : public testing::Test {
 protected:
  void SetUp() override {
    before_ = emu::lazy();
    emu::lazy() = true;
    for (cudaStream_t* stream : {&first_, &second_})
      ASSERT_EQ(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), cudaSuccess);
    ASSERT_EQ(cudaEventCreate(&event_), cudaSuccess);
    ASSERT_EQ(cudaMallocHost(&pinned_, kN * sizeof(float)), cudaSuccess);
  }
  void TearDown() override {
    EXPECT_EQ(cudaFreeHost(pinned_), cudaSuccess);
    EXPECT_EQ(cudaEventDestroy(event_), cudaSuccess);
    for (cudaStream_t stream : {first_, second_}) EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    emu::lazy() = before_;
    (void)cudaGetLastError();
    (void)emu::take_report();
  }
  void put(const std::vector<float>& values) { std::copy(values.begin(), values.end(), pinned_); }
  std::vector<float> in_pinned() const { return {pinned_, pinned_ + kN}; }
  cudaError_t upload(float* x, cudaStream_t stream) {
    return cudaMemcpyAsync(x, pinned_, kN * sizeof(float), cudaMemcpyHostToDevice, stream);
  }
  cudaError_t download(const float* x, cudaStream_t stream) {
    return cudaMemcpyAsync(pinned_, x, kN * sizeof(float), cudaMemcpyDeviceToHost, stream);
  }
  void add_one(float* y, const float* x, cudaStream_t stream) {
    launch(add_one_kernel, 1, kN, 0, stream, y, x);
  }

  bool before_ = false;
  cudaStream_t first_ = nullptr, second_ = nullptr;
  cudaEvent_t event_ = nullptr;
  float* pinned_ = nullptr;
};

TEST_F(LazyStreams, AWaitForAnotherStreamIsNeeded) {
  for (bool waits : {true, false}) {
    DeviceArray<float> x(kOnes), y(kOnes), z(kOnes);
    add_one(y.get(), x.get(), first_);
    ASSERT_EQ(cudaEventRecord(event_, first_), cudaSuccess);
    add_one(x.get(), x.get(), first_);  // after the event, so that nobody waits for it
    if (waits) CUDA_CHECK(cudaStreamWaitEvent(second_, event_, 0));
    add_one(z.get(), y.get(), second_);
    ASSERT_EQ(cudaStreamSynchronize(second_), cudaSuccess);
    EXPECT_EQ(z.host(), waits ? kThrees : kTwos);
    EXPECT_EQ(x.host(), kOnes);
    ASSERT_EQ(cudaStreamSynchronize(first_), cudaSuccess);
    EXPECT_EQ(x.host(), kTwos);
  }
}

TEST_F(LazyStreams, PinnedMemoryIsReadWhenTheStreamGetsThere) {
  DeviceArray<float> x(kN);
  for (bool waits : {true, false}) {
    put(kOnes);
    ASSERT_EQ(upload(x.get(), first_), cudaSuccess);
    ASSERT_EQ(cudaEventRecord(event_, first_), cudaSuccess);
    if (waits) CUDA_CHECK(cudaEventSynchronize(event_));
    put(kTwos);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(x.host(), waits ? kOnes : kTwos);
  }
}

TEST_F(LazyStreams, PinnedMemoryIsWrittenWhenItIsWaitedFor) {
  DeviceArray<float> x(kOnes);
  put(kThrees);
  add_one(x.get(), x.get(), first_);
  ASSERT_EQ(download(x.get(), first_), cudaSuccess);
  EXPECT_EQ(in_pinned(), kThrees);
  ASSERT_EQ(cudaStreamSynchronize(second_), cudaSuccess);
  EXPECT_EQ(in_pinned(), kThrees) << "that was another stream";
  ASSERT_EQ(cudaStreamSynchronize(first_), cudaSuccess);
  EXPECT_EQ(in_pinned(), kTwos);
}

// More than the ring holds, while the stream has done nothing: a piece that is used again must have
// been read.
TEST_F(LazyStreams, TheRingOfStagingWaitsBeforeItComesRound) {
  constexpr size_t kPieces = 25, kPiece = (size_t(1) << 16) - 16;  // of 4 bytes; no whole segment
  static_assert(kPieces * kPiece * sizeof(int) > Staging::kLargest);
  DeviceArray<int> x(kPieces * kPiece);
  Staging staging(first_);
  for (size_t i = 0; i < kPieces; ++i) {
    const std::vector<int> piece(kPiece, int(i));
    staging.upload(x.get() + i * kPiece, piece.data(), kPiece * sizeof(int));
  }
  ASSERT_EQ(cudaStreamSynchronize(first_), cudaSuccess);
  const std::vector<int> got = x.host();
  for (size_t i = 0; i < kPieces; ++i)
    EXPECT_EQ(
        std::count(got.begin() + long(i * kPiece), got.begin() + long((i + 1) * kPiece), int(i)),
        long(kPiece))
        << "piece " << i;
}

TEST_F(LazyStreams, OtherMemoryIsReadAndWrittenAtOnce) {
  DeviceArray<float> x(kN);
  std::vector<float> values = kOnes, got(kN, 0.f);
  const size_t bytes = kN * sizeof(float);
  ASSERT_EQ(cudaMemcpyAsync(x.get(), values.data(), bytes, cudaMemcpyHostToDevice, first_),
            cudaSuccess);
  values = kThrees;
  add_one(x.get(), x.get(), first_);
  ASSERT_EQ(cudaMemcpyAsync(got.data(), x.get(), bytes, cudaMemcpyDeviceToHost, first_),
            cudaSuccess);
  EXPECT_EQ(got, kTwos);
}

TEST_F(LazyStreams, AQueryIsNotReadyBeforeItIs) {
  DeviceArray<float> x(kOnes);
  ASSERT_EQ(cudaEventRecord(event_, first_), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event_), cudaSuccess) << "after nothing";
  add_one(x.get(), x.get(), first_);
  ASSERT_EQ(cudaEventRecord(event_, first_), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event_), cudaErrorNotReady);
  EXPECT_EQ(cudaEventQuery(event_), cudaSuccess);
  EXPECT_EQ(x.host(), kTwos);
}

TEST_F(LazyStreams, FreeingMemoryAndTheLegacyStreamWait) {
  cudaStream_t blocking = nullptr;
  ASSERT_EQ(cudaStreamCreate(&blocking), cudaSuccess);
  DeviceArray<float> x(kOnes);
  add_one(x.get(), x.get(), blocking);
  EXPECT_EQ(x.host(), kTwos) << "cudaMemcpy waits for streams that are not non-blocking";
  float* gone = nullptr;
  ASSERT_EQ(cudaMalloc(&gone, 4), cudaSuccess);
  add_one(x.get(), x.get(), first_);
  EXPECT_EQ(x.host(), kTwos);
  ASSERT_EQ(cudaFree(gone), cudaSuccess);
  EXPECT_EQ(x.host(), kThrees);
  EXPECT_EQ(cudaStreamDestroy(blocking), cudaSuccess);
}

TEST_F(LazyStreams, WorkThatIsNoLongerLazyComesAfterWorkThatWas) {
  DeviceArray<float> x(kOnes);
  add_one(x.get(), x.get(), first_);
  emu::lazy() = false;
  add_one(x.get(), x.get(), first_);
  EXPECT_EQ(x.host(), kThrees);
}

#if !EMU_ASAN  // which ends the program
TEST_F(LazyStreams, AFailureIsTheErrorOfTheWait) {
  DeviceArray<float> x(kN);
  launch(overrun_kernel, 1, 1, 0, first_, x.get(), int(kN));
  EXPECT_EQ(cudaStreamSynchronize(second_), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(first_), cudaErrorLaunchFailure);
  EXPECT_NE(emu::take_report().find("overrun_kernel"), std::string::npos);
}
#endif

}  // namespace
}  // namespace graft
