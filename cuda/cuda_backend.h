// The CUDA backend as the rest of graft sees it. A build without CUDA has the same functions
// (no_cuda.cpp), so that nothing else asks how graft was built.
#pragma once

#include <string>

#include "tensor/allocator.h"
#include "tensor/backend.h"

namespace graft {

// Throws Error, with the reason, where cuda_available() is false.
Backend& cuda_backend();
// Whether this build and this machine can run CUDA kernels; if not, why (reason may be null).
bool cuda_available(std::string* reason);
// Where allocator_of(Device::CUDA) gets its memory. Throws as cuda_backend does.
RawMemory& cuda_memory();
// Fills y (dense, F32 or BF16, on the GPU) with deviation * N(0, 1): what random_model draws on the
// CPU for its parameter `number`, without a copy on the host. random_fill.cu.
void cuda_fill_normal(Tensor& y, uint64_t seed, uint32_t number, double deviation);

}  // namespace graft
