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

}  // namespace graft
