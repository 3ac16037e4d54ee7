// What cuda/ does not have yet, so that the kernels that it has can be tested: the emulated
// device's memory, copies between tensors of one dtype, and methods that throw. It shrinks with
// every file that lands in cuda/, and goes with the last.
#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "cuda/gpu.cuh"

namespace graft {
namespace {

// Exact: the memory checkers see the end of every tensor.
class EmulatedMemory : public RawMemory {
 public:
  void* system_allocate(size_t bytes) override {
    void* p = nullptr;
    return cudaMalloc(&p, bytes) == cudaSuccess ? p : nullptr;
  }
  void system_free(void* pointer, size_t) override { cudaFree(pointer); }
  bool exact() const override { return true; }
};

[[noreturn]] void missing(const char* op) { fail(op, ": cuda/ has no such kernel yet"); }

char* row_at(const Tensor& t, int64_t row) {
  return static_cast<char*>(t.raw()) + row * t.row_stride() * dtype_size(t.dtype());
}

}  // namespace

RawMemory& cuda_memory() {
  static EmulatedMemory& memory = *new EmulatedMemory;
  return memory;
}
bool cuda_available(std::string*) { return true; }
Backend& cuda_backend() {
  static CudaBackend backend;
  return backend;
}

CudaBackend::CudaBackend() = default;
CudaBackend::~CudaBackend() = default;
std::string CudaBackend::describe() const { return "emulated, unfinished"; }

void CudaBackend::fill(Tensor& dst, double value) {
  CHECK(value == 0 && dst.is_contiguous(), "fill: only dense tensors, with 0, yet");
  CUDA_CHECK(cudaMemset(dst.raw(), 0, size_t(dst.num_bytes())));
}

void CudaBackend::copy(Tensor& dst, const Tensor& src) {
  CHECK(dst.dtype() == src.dtype(), "copy: only between tensors of one dtype yet");
  const auto kind = dst.device() == Device::CPU   ? cudaMemcpyDeviceToHost
                    : src.device() == Device::CPU ? cudaMemcpyHostToDevice
                                                  : cudaMemcpyDeviceToDevice;
  const size_t bytes = size_t(dst.cols() * dtype_size(dst.dtype()));
  for (int64_t row = 0; row < dst.num_rows(); ++row)
    CUDA_CHECK(cudaMemcpy(row_at(dst, row), row_at(src, row), bytes, kind));
}

Tensor CudaBackend::on_device(const Tensor& indices) { return indices.to(Device::CUDA); }

void CudaBackend::add(Tensor&, const Tensor&, const Tensor&) { missing("add"); }
void CudaBackend::axpy(Tensor&, const Tensor&, double) { missing("axpy"); }
void CudaBackend::scale(Tensor&, const Tensor&, double) { missing("scale"); }
void CudaBackend::sum_rows(Tensor&, const Tensor&, bool) { missing("sum_rows"); }
void CudaBackend::gemm(Tensor&, std::span<const GemmTerm>, const Tensor&, const Tensor&) {
  missing("gemm");
}
void CudaBackend::cross_entropy(Tensor&, Tensor&, const Tensor&, double, bool) {
  missing("cross_entropy");
}

}  // namespace graft
