// The CUDA backend as the rest of graft sees it. A build without CUDA has the same functions
// (no_cuda.cpp), so that nothing else asks how graft was built.
#pragma once

#include <functional>
#include <string>

#include "tensor/allocator.h"
#include "tensor/backend.h"

namespace graft {

// Throws Error, with the reason, where cuda_available() is false.
Backend& cuda_backend();
// Whether this build and this machine can run CUDA kernels; if not, why (reason may be null).
bool cuda_available(std::string* reason);
// Whether products are cuBLAS's; if not, they are graft's own (own_gemm.h), and `reason` says why
// (may be null).
bool cuda_has_cublas(std::string* reason);
// Where allocator_of(Device::CUDA) gets its memory. Throws as cuda_backend does.
RawMemory& cuda_memory();
// Fills y (dense, F32 or BF16, on the GPU) with deviation * N(0, 1): what random_model draws on the
// CPU for its parameter `number`, without a copy on the host. random_fill.cu.
void cuda_fill_normal(Tensor& y, uint64_t seed, uint32_t number, double deviation);

// Which algorithms products take from here on: those in the file at `path`, where it is there and
// was made on this GPU with this cublasLt; with `tune`, shapes that it lacks are timed and added to
// it. An empty path: the library's own first choice, which the shape alone decides. `say` gets a
// line where a file was left out.
void cuda_use_gemm_plan(const std::string& path, bool tune,
                        const std::function<void(const std::string&)>& say);

}  // namespace graft
