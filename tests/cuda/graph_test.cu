// Streams, events, capture and graphs of the runtime stand-in: a captured step replays to the same
// bytes, what CUDA forbids in a capture spoils it, stale memory is found, waits are counted.
#include <cublas_v2.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cuda/emulator/emulator.h"
#include "cuda/gpu.cuh"
#include "tests/cuda/support.h"

namespace graft {
namespace {

__global__ void add_kernel(float* x, float value) { x[threadIdx.x] += value; }

constexpr size_t kN = 16;

class Graph : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    (void)cudaGetLastError();
    (void)emu::take_report();
  }
  cudaGraph_t capture(const std::function<void()>& body) {
    EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    body();
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
    return graph;
  }
  cudaGraphExec_t instantiate(cudaGraph_t graph) {
    cudaGraphExec_t exec = nullptr;
    EXPECT_EQ(cudaGraphInstantiate(&exec, graph), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    return exec;
  }
  cudaStream_t stream_ = nullptr;
};

// A kernel, a product, a fill and copies: once at once, and twice from the graph.
TEST_F(Graph, ReplaysToTheSameBytes) {
  const auto values = random_values<float>(kN, 1);
  DeviceArray<float> x(values), y(kN), z(kN);
  float* pinned = nullptr;
  ASSERT_EQ(cudaMallocHost(&pinned, kN * 4), cudaSuccess);
  cublasHandle_t blas = nullptr;
  ASSERT_EQ(cublasCreate(&blas), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cublasSetStream(blas, stream_), CUBLAS_STATUS_SUCCESS);
  const auto step = [&] {
    const float one = 1;
    CUDA_CHECK(cudaMemsetAsync(y.get(), 0, kN * 4, stream_));
    launch(add_kernel, 1, kN, 0, stream_, x.get(), 1.5f);
    EXPECT_EQ(cublasGemmEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, 4, 4, 4, &one, x.get(), CUDA_R_32F, 4,
                           x.get(), CUDA_R_32F, 4, &one, y.get(), CUDA_R_32F, 4, CUBLAS_COMPUTE_32F,
                           CUBLAS_GEMM_DEFAULT),
              CUBLAS_STATUS_SUCCESS);
    CUDA_CHECK(cudaMemcpyAsync(z.get(), y.get(), kN * 4, cudaMemcpyDeviceToDevice, stream_));
    CUDA_CHECK(cudaMemcpyAsync(pinned, z.get(), kN * 4, cudaMemcpyDeviceToHost, stream_));
  };
  std::vector<std::vector<float>> eager;
  for (int i = 0; i < 2; ++i) {
    step();
    eager.emplace_back(pinned, pinned + kN);
  }
  EXPECT_NE(eager[0], eager[1]);  // the step changes x

  ASSERT_EQ(cudaMemcpy(x.get(), values.data(), kN * 4, cudaMemcpyHostToDevice), cudaSuccess);
  const uint64_t launches = emu::stats().launches;
  cudaGraph_t graph = capture(step);
  EXPECT_EQ(emu::stats().launches, launches);
  EXPECT_EQ(x.host(), values);  // nothing has run
  size_t nodes = 0;
  ASSERT_EQ(cudaGraphGetNodes(graph, nullptr, &nodes), cudaSuccess);
  EXPECT_EQ(nodes, 5u);
  cudaGraphExec_t exec = instantiate(graph);
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(cudaGraphLaunch(exec, stream_), cudaSuccess);
    EXPECT_EQ(std::vector<float>(pinned, pinned + kN), eager[size_t(i)]);
  }
  cudaGraphExecDestroy(exec);
  cublasDestroy(blas);
  cudaFreeHost(pinned);
}

TEST_F(Graph, KeepsTheParametersOfItsCapture) {
  DeviceArray<float> x(std::vector<float>(kN, 0));
  float value = 1;
  cudaGraphExec_t exec =
      instantiate(capture([&] { launch(add_kernel, 1, kN, 0, stream_, x.get(), value); }));
  value = 10;  // too late
  ASSERT_EQ(cudaGraphLaunch(exec, stream_), cudaSuccess);
  EXPECT_EQ(x.host()[3], 1);

  cudaGraph_t update = capture([&] { launch(add_kernel, 1, kN, 0, stream_, x.get(), value); });
  cudaGraphExecUpdateResultInfo info;
  ASSERT_EQ(cudaGraphExecUpdate(exec, update, &info), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(exec, stream_), cudaSuccess);
  EXPECT_EQ(x.host()[3], 11);

  cudaGraph_t other = capture([&] {
    launch(add_kernel, 1, kN, 0, stream_, x.get(), value);
    launch(add_kernel, 1, kN, 0, stream_, x.get(), value);
  });
  EXPECT_EQ(cudaGraphExecUpdate(exec, other, &info), cudaErrorGraphExecUpdateFailure);
  EXPECT_EQ(info.result, cudaGraphExecUpdateErrorTopologyChanged);
  for (cudaGraph_t g : {update, other}) cudaGraphDestroy(g);
  cudaGraphExecDestroy(exec);
}

TEST_F(Graph, FindsMemoryThatWasFreedSinceTheCapture) {
  cudaGraphExec_t exec = nullptr;
  DeviceArray<float> kept(std::vector<float>(kN, 0));
  {
    DeviceArray<float> gone(std::vector<float>(kN, 0));
    exec = instantiate(capture([&] {
      launch(add_kernel, 1, kN, 0, stream_, kept.get(), 1.0f);
      launch(add_kernel, 1, kN, 0, stream_, gone.get(), 1.0f);
    }));
    ASSERT_EQ(cudaGraphLaunch(exec, stream_), cudaSuccess);
  }
  const cudaError_t error = cudaGraphLaunch(exec, stream_);
  EXPECT_EQ(error, cudaErrorLaunchFailure);
  const std::string text = cudaGetErrorString(error);
  EXPECT_NE(text.find("node 1, kernel add_kernel (graph_test.cu:"), std::string::npos) << text;
  EXPECT_NE(text.find("freed since"), std::string::npos) << text;
  // New memory at the old address is not the old memory.
  DeviceArray<float> again(std::vector<float>(kN, 0));
  EXPECT_EQ(cudaGraphLaunch(exec, stream_), cudaErrorLaunchFailure);
  cudaGraphExecDestroy(exec);
}

TEST_F(Graph, WaitingAndAllocatingSpoilACapture) {
  DeviceArray<float> x(std::vector<float>(kN, 0)), victim(kN);
  std::vector<float> pageable(kN);
  void* p = nullptr;
  cudaEvent_t event = nullptr;
  ASSERT_EQ(cudaEventCreate(&event), cudaSuccess);
  const std::pair<const char*, std::function<cudaError_t()>> calls[] = {
      {"malloc", [&] { return cudaMalloc(&p, 16); }},
      {"free", [&] { return cudaFree(victim.get()); }},
      {"pinned malloc", [&] { return cudaMallocHost(&p, 16); }},
      {"memcpy", [&] { return cudaMemcpy(pageable.data(), x.get(), 16, cudaMemcpyDeviceToHost); }},
      {"memset", [&] { return cudaMemset(x.get(), 0, 16); }},
      {"stream", [&] { return cudaStreamSynchronize(stream_); }},
      {"device", [&] { return cudaDeviceSynchronize(); }},
      {"pageable copy",
       [&] {
         return cudaMemcpyAsync(x.get(), pageable.data(), 16, cudaMemcpyHostToDevice, stream_);
       }},
  };
  for (const auto& [name, call] : calls) {
    ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    EXPECT_EQ(call(), cudaErrorStreamCaptureUnsupported) << name;
    cudaStreamCaptureStatus status;
    ASSERT_EQ(cudaStreamIsCapturing(stream_, &status), cudaSuccess);
    EXPECT_EQ(status, cudaStreamCaptureStatusInvalidated) << name;
    EXPECT_THROW(launch(add_kernel, 1, kN, 0, stream_, x.get(), 1.0f), Error);
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorStreamCaptureInvalidated) << name;
    EXPECT_EQ(graph, nullptr);
    ASSERT_EQ(cudaStreamIsCapturing(stream_, &status), cudaSuccess);
    EXPECT_EQ(status, cudaStreamCaptureStatusNone);
  }
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(event, stream_), cudaSuccess);
  EXPECT_EQ(cudaEventSynchronize(event), cudaErrorCapturedEvent);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorStreamCaptureInvalidated);
  cudaEventDestroy(event);

  // The relaxed mode lets calls that only might be unsafe through.
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&p, 16), cudaSuccess);
  EXPECT_EQ(cudaFree(p), cudaSuccess);
  ASSERT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  (void)cudaGetLastError();
}

TEST_F(Graph, LegacyStreamMustNotMeetABlockingCapture) {
  DeviceArray<float> x(std::vector<float>(kN, 0));
  EXPECT_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal),
            cudaErrorStreamCaptureUnsupported);
  cudaStream_t blocking = nullptr;
  ASSERT_EQ(cudaStreamCreate(&blocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(blocking, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_EQ(cudaMemsetAsync(x.get(), 0, 4, nullptr), cudaErrorStreamCaptureImplicit);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(blocking, &graph), cudaErrorStreamCaptureInvalidated);
  cudaStreamDestroy(blocking);
  graph = capture([&] { EXPECT_EQ(cudaMemsetAsync(x.get(), 0, 4, nullptr), cudaSuccess); });
  cudaGraphDestroy(graph);
}

TEST_F(Graph, StreamsJoinByEventsAndMustComeBack) {
  DeviceArray<float> x(std::vector<float>(kN, 0));
  cudaStream_t side = nullptr;
  cudaEvent_t fork = nullptr, join = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaEventCreateWithFlags(&fork, cudaEventDisableTiming), cudaSuccess);
  ASSERT_EQ(cudaEventCreateWithFlags(&join, cudaEventDisableTiming), cudaSuccess);
  const auto branch = [&](bool work_after_join) {
    CUDA_CHECK(cudaEventRecord(fork, stream_));
    CUDA_CHECK(cudaStreamWaitEvent(side, fork));
    launch(add_kernel, 1, kN, 0, side, x.get(), 1.0f);
    CUDA_CHECK(cudaEventRecord(join, side));
    if (work_after_join) launch(add_kernel, 1, kN, 0, side, x.get(), 1.0f);
    CUDA_CHECK(cudaStreamWaitEvent(stream_, join));
  };
  cudaGraphExec_t exec = instantiate(capture([&] { branch(false); }));
  EXPECT_EQ(x.host()[0], 0);
  ASSERT_EQ(cudaGraphLaunch(exec, stream_), cudaSuccess);
  EXPECT_EQ(x.host()[0], 1);
  cudaGraphExecDestroy(exec);

  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  branch(true);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorStreamCaptureUnjoined);
  launch(add_kernel, 1, kN, 0, side, x.get(), 1.0f);  // no longer captured
  EXPECT_EQ(x.host()[0], 2);

  // An event from outside the capture.
  ASSERT_EQ(cudaEventRecord(fork, side), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_EQ(cudaStreamWaitEvent(stream_, fork), cudaErrorStreamCaptureIsolation);
  EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorStreamCaptureInvalidated);
  cudaEventDestroy(fork);
  cudaEventDestroy(join);
  cudaStreamDestroy(side);
}

TEST_F(Graph, WaitsAndAllocationsAreCounted) {
  DeviceArray<float> x(std::vector<float>(kN, 0));
  std::vector<float> pageable(kN);
  float* pinned = nullptr;
  const emu::Stats& now = emu::stats();
  emu::Stats before = now;
  ASSERT_EQ(cudaMallocHost(&pinned, kN * 4), cudaSuccess);
  EXPECT_EQ(now.allocations, before.allocations + 1);

  before = now;  // what a step may do
  launch(add_kernel, 1, kN, 0, stream_, x.get(), 1.0f);
  CUDA_CHECK(cudaMemcpyAsync(pinned, x.get(), kN * 4, cudaMemcpyDeviceToHost, stream_));
  CUDA_CHECK(cudaMemsetAsync(x.get(), 0, kN * 4, stream_));
  EXPECT_EQ(now.launches, before.launches + 1);
  EXPECT_EQ(now.synchronisations, before.synchronisations);
  EXPECT_EQ(now.pageable_copies, before.pageable_copies);
  EXPECT_EQ(now.allocations + now.frees, before.allocations + before.frees);

  const auto adds = [&](uint64_t waits, uint64_t copies, const std::function<cudaError_t()>& call) {
    before = now;
    EXPECT_EQ(call(), cudaSuccess);
    EXPECT_EQ(now.synchronisations, before.synchronisations + waits);
    EXPECT_EQ(now.pageable_copies, before.pageable_copies + copies);
  };
  adds(1, 0, [&] { return cudaStreamSynchronize(stream_); });
  adds(1, 0, [&] { return cudaDeviceSynchronize(); });
  adds(1, 0, [&] { return cudaMemcpy(pageable.data(), x.get(), 4, cudaMemcpyDeviceToHost); });
  adds(1, 1, [&] {
    return cudaMemcpyAsync(pageable.data(), x.get(), 4, cudaMemcpyDeviceToHost, stream_);
  });
  adds(0, 1, [&] {
    return cudaMemcpyAsync(x.get(), pageable.data(), 4, cudaMemcpyHostToDevice, stream_);
  });
  before = now;
  EXPECT_EQ(cudaFreeHost(pinned), cudaSuccess);
  EXPECT_EQ(now.frees, before.frees + 1);
}

TEST_F(Graph, EventsMeasureTime) {
  cudaEvent_t start = nullptr, end = nullptr, untimed = nullptr;
  ASSERT_EQ(cudaEventCreate(&start), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&end), cudaSuccess);
  ASSERT_EQ(cudaEventCreateWithFlags(&untimed, cudaEventDisableTiming), cudaSuccess);
  float ms = 0;
  EXPECT_EQ(cudaEventElapsedTime(&ms, start, end), cudaErrorInvalidResourceHandle);
  ASSERT_EQ(cudaEventRecord(start, stream_), cudaSuccess);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  ASSERT_EQ(cudaEventRecord(end, stream_), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(untimed, stream_), cudaSuccess);
  EXPECT_EQ(cudaEventSynchronize(end), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&ms, start, end), cudaSuccess);
  EXPECT_GE(ms, 4.9f);
  EXPECT_EQ(cudaEventElapsedTime(&ms, start, untimed), cudaErrorInvalidResourceHandle);
  for (cudaEvent_t e : {start, end, untimed}) EXPECT_EQ(cudaEventDestroy(e), cudaSuccess);
  EXPECT_EQ(cudaEventDestroy(start), cudaErrorInvalidResourceHandle);
}

TEST_F(Graph, UnknownStreamsAreRefused) {
  cudaStream_t gone = nullptr;
  ASSERT_EQ(cudaStreamCreate(&gone), cudaSuccess);
  ASSERT_EQ(cudaStreamDestroy(gone), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(gone), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaMemsetAsync(nullptr, 0, 0, gone), cudaSuccess);  // nothing to do
  DeviceArray<float> x(kN);
  EXPECT_EQ(cudaMemsetAsync(x.get(), 0, 4, gone), cudaErrorInvalidResourceHandle);
}

}  // namespace
}  // namespace graft
