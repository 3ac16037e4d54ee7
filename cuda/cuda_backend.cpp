// The CUDA backend from the outside: whether it can run here, the device's memory, and what it says
// of itself. The kernels are in the .cu files.
#include "cuda/cuda_backend.h"

#include <cstdlib>
#include <cstring>

#include "cuda/blas.h"
#include "cuda/device_backend.h"
#include "cuda/gpu.cuh"

namespace graft {
namespace {

class DeviceMemory : public RawMemory {
 public:
  void* system_allocate(size_t bytes) override {
    void* pointer = nullptr;
    const cudaError_t error = cudaMalloc(&pointer, bytes);
    if (error == cudaSuccess) return pointer;
    cudaGetLastError();  // or the next launch would report it
    CHECK(error == cudaErrorMemoryAllocation, "cuda: ", cudaGetErrorString(error),
          " in cudaMalloc");
    return nullptr;
  }
  void system_free(void* pointer, size_t) override { cudaFree(pointer); }
  bool is_gpu() const override { return true; }
  std::string describe() const override {
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) != cudaSuccess) return "the GPU";
    return concat("the GPU, of ", total >> 20, " MiB with ", free >> 20, " MiB free,");
  }

#if defined(CUDA_EMU)
  // The memory checkers see the end of every tensor; EMU_CACHED=1 for tests of the cache itself.
  bool exact() const override {
    const char* cached = std::getenv("EMU_CACHED");
    return !cached || std::strcmp(cached, "1") != 0;
  }
#endif
};

// Empty where the device can be used.
std::string why_not() {
  int count = 0;  // stays unwritten where there is no driver
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
#if !defined(CUDA_EMU)
    int driver = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
      return "there is no NVIDIA driver on this machine";
#endif
    return error == cudaSuccess ? "no GPU on this machine"
                                : concat("no usable GPU: ", cudaGetErrorString(error));
  }
  cudaDeviceProp device{};
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return "the GPU does not answer";
  if (device.major < 8)
    return concat(device.name, " has compute capability ", device.major, ".", device.minor,
                  ", graft's kernels need 8.0");
  if (!has_code_for_device())
    return concat("this binary has no code for the ", device.name, " (compute capability ",
                  device.major, ".", device.minor,
                  "); build it there, or with CUDA_ARCH=", device.major, device.minor);
  return "";
}

}  // namespace

bool cuda_available(std::string* reason) {
  static const std::string why = why_not();
  if (reason) *reason = why;
  return why.empty();
}

bool cuda_has_cublas(std::string* reason) { return cublas_functions(reason) != nullptr; }

Backend& cuda_backend() {
  std::string reason;
  CHECK(cuda_available(&reason), "cuda: ", reason, "; run on the CPU (device: cpu)");
  // Never destroyed: tensors of static storage duration may still be freed, and the driver may be
  // gone by then.
  static CudaBackend& backend = *new CudaBackend;
  return backend;
}

RawMemory& cuda_memory() {
  std::string reason;
  CHECK(cuda_available(&reason), "cuda: ", reason, "; run on the CPU (device: cpu)");
  static DeviceMemory& memory = *new DeviceMemory;
  return memory;
}

CudaBackend::CudaBackend() {
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  staging_ = Staging(stream_);
  if (cublas_functions(nullptr)) open_cublas(*cublas_functions(nullptr));
  plans_ = std::make_unique<GemmPlans>(cublas_lt_functions(), stream_, workspace_);
}

void CudaBackend::open_cublas(const CublasFunctions& cublas) {
  cublasStatus_t status = cublas.create(&cublas_);
  CHECK(status == CUBLAS_STATUS_SUCCESS, cublas_error("cublasCreate", status));
  status = cublas.set_stream(cublas_, stream_);
  CHECK(status == CUBLAS_STATUS_SUCCESS, cublas_error("cublasSetStream", status));
  // A workspace of our own: none is allocated behind our back, and with one stream the same product
  // gives the same bytes each time. As large as cuBLAS's documentation recommends for
  // cublasSetWorkspace: 32 MiB for 9.x and 10.x, 12 MiB for 12.x, 4 MiB before.
  cudaDeviceProp device{};
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  const int64_t workspace_bytes = int64_t(device.major >= 12  ? 12
                                          : device.major >= 9 ? 32
                                                              : 4)
                                  << 20;
  workspace_ = Tensor::empty({workspace_bytes}, DType::U8, Device::CUDA, Scope::Scratch);
  status = cublas.set_workspace(cublas_, workspace_.raw(), size_t(workspace_bytes));
  CHECK(status == CUBLAS_STATUS_SUCCESS, cublas_error("cublasSetWorkspace", status));
  uses_cublas_ = true;
}

void CudaBackend::use_cublas(bool use) {
  CHECK(!use || cublas_, "cuda: no cuBLAS was found, so that products are graft's own");
  uses_cublas_ = use;
}

CudaBackend::~CudaBackend() = default;  // the process ends with it

void cuda_use_gemm_plan(const std::string& path, bool tune,
                        const std::function<void(const std::string&)>& say) {
  cudaDeviceProp device{};
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  static_cast<CudaBackend&>(cuda_backend()).plans().use_file(path, device.name, tune, say);
}

std::string CudaBackend::describe() const {
  cudaDeviceProp device{};
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  return concat(device.name, ", ", device.totalGlobalMem >> 20, " MiB, ",
                device.multiProcessorCount, " multiprocessors, compute capability ", device.major,
                ".", device.minor, "; ",
                !uses_cublas_ ? "graft's own GEMM"
                              : concat("cuBLAS from ", cublas_functions(nullptr)->path,
                                       cublas_lt_functions() ? "" : ", without cublasLt"));
}

}  // namespace graft
