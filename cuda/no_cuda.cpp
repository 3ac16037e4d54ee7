// What a build without CUDA says when it is asked for a GPU.
#include "cuda/cuda_backend.h"

namespace graft {

bool cuda_available(std::string* reason) {
  if (reason) *reason = "this build has no CUDA";
  return false;
}

bool cuda_has_cublas(std::string* reason) { return cuda_available(reason); }
Backend& cuda_backend() { fail("cuda: this build has no CUDA; run on the CPU (device: cpu)"); }
RawMemory& cuda_memory() { fail("cuda: this build has no CUDA; run on the CPU (device: cpu)"); }
void cuda_fill_normal(Tensor&, uint64_t, uint32_t, double) { cuda_backend(); }
void cuda_use_gemm_plan(const std::string&, bool, const std::function<void(const std::string&)>&) {
  cuda_backend();
}

}  // namespace graft
