// A step as a CUDA graph: captured once, then started by one call. What it needs of the host while
// it is captured: blocks of the allocator's pool (they stay where they are) and lists of attention
// tiles, which are uploaded beside the capture, for they follow from the shapes alone.
#include <exception>

#include "cuda/device_backend.h"
#include "cuda/gpu.cuh"
#include "cuda/step_scalars.h"

namespace graft {
namespace {

class CudaStep final : public CapturedStep {
 public:
  CudaStep(cudaGraphExec_t exec, Tensor scalars, Staging& staging, cudaStream_t stream)
      : exec_(exec), scalars_(std::move(scalars)), staging_(staging), stream_(stream) {}
  ~CudaStep() override {
    // What it points to may be gone next.
    cudaStreamSynchronize(stream_);
    cudaGraphExecDestroy(exec_);
  }

  void launch(const AdamWStep& adamw) override {
    AdamWStep of_a = adamw, of_b = adamw;
    of_a.for_b = false;
    of_b.for_b = true;
    const StepScalars scalars{{adamw_constants(of_a), adamw_constants(of_b)}, uint32_t(adamw.step)};
    staging_.upload(scalars_.raw(), &scalars, sizeof scalars);
    CUDA_CHECK(cudaGraphLaunch(exec_, stream_));
  }

 private:
  cudaGraphExec_t exec_;
  Tensor scalars_;  // one StepScalars, of the backend
  Staging& staging_;
  cudaStream_t stream_;
};

}  // namespace

const AdamWConstants* CudaBackend::captured_adamw(const AdamWStep& step) const {
  const StepScalars* const scalars = captured_scalars();
  return scalars ? &scalars->adamw[step.for_b] : nullptr;  // an address, nothing is read
}

const StepScalars* CudaBackend::captured_scalars() const {
  return capturing_ ? static_cast<const StepScalars*>(scalars_.raw()) : nullptr;
}

void CudaBackend::upload(void* device, const void* from, size_t bytes) {
  if (!capturing_) return staging_.upload(device, from, bytes);
  // In the graph this would be a copy from memory that has other bytes by then. The stream that is
  // captured runs nothing now, so that nobody reads what is overwritten here.
  CUDA_CHECK(cudaMemcpyAsync(device, from, bytes, cudaMemcpyHostToDevice, side_stream_));
  CUDA_CHECK(cudaStreamSynchronize(side_stream_));
}

std::unique_ptr<CapturedStep> CudaBackend::capture(const std::function<void()>& step) {
  if (!scalars_.defined()) {
    const SetPooled outside(allocator_of(Device::CUDA), false);  // it is there for all steps
    scalars_ =
        Tensor::empty({int64_t(sizeof(StepScalars))}, DType::U8, Device::CUDA, Scope::Scratch);
    CUDA_CHECK(cudaStreamCreateWithFlags(&side_stream_, cudaStreamNonBlocking));
  }
  CUDA_CHECK(cudaStreamSynchronize(stream_));
  // Relaxed: where the pool lacks a block the allocator may ask for one.
  CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed));
  capturing_ = true;
  std::exception_ptr error;
  try {
    step();
  } catch (...) {
    error = std::current_exception();
  }
  capturing_ = false;
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
  if (error) {
    cudaGetLastError();  // or the next launch would report it
    if (graph) cudaGraphDestroy(graph);
    std::rethrow_exception(error);
  }
  CHECK(ended == cudaSuccess, "cuda: ", cudaGetErrorString(ended), " at the end of a capture");
  cudaGraphExec_t exec = nullptr;
  const cudaError_t made = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  CHECK(made == cudaSuccess, "cuda: ", cudaGetErrorString(made), " in cudaGraphInstantiate");
  return std::make_unique<CudaStep>(exec, scalars_, staging_, stream_);
}

}  // namespace graft
