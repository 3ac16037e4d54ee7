// Which backend runs the kernels of a tensor.
#include "tensor/backend.h"

#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

Backend& cuda_backend();  // cuda/cuda_backend.h; tensor/ includes nothing of cuda/

namespace {

Backend*& cpu_in_use() {
  static Backend* backend = &cpu_backend();
  return backend;
}

}  // namespace

std::unique_ptr<CapturedStep> Backend::capture(const std::function<void()>&) {
  fail("capture: this backend is ", describe(), "; only the GPU's has graphs");
}

Backend& reference_backend() {
  static ReferenceBackend backend;
  return backend;
}

Backend& backend_of(Device device) {
  switch (device) {
    case Device::CPU:
      return *cpu_in_use();
    case Device::CUDA:
      return cuda_backend();
    case Device::Meta:
      return meta_backend();
  }
  fail("backend_of: unknown device");
}

Backend& backend_of(const Tensor& tensor) {
  if (tensor.device() == Device::CPU && tensor.dtype() == DType::F64) return reference_backend();
  return backend_of(tensor.device());
}

UseReferenceBackend::UseReferenceBackend() : previous_(cpu_in_use()) {
  cpu_in_use() = &reference_backend();
}

UseReferenceBackend::~UseReferenceBackend() { cpu_in_use() = previous_; }

}  // namespace graft
