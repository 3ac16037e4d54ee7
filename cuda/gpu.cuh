// What every kernel file includes: the CUDA runtime, launching and shared memory, written so that
// the same source compiles with nvcc and, against emulator/, with a plain C++ compiler
// (-DCUDA_EMU). The only place with <<<>>>. Rules for kernels: cuda/README.md.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "tensor/check.h"

namespace graft {

using bf16 = __nv_bfloat16;
using bf162 = __nv_bfloat162;

// Throws Error with the call, the place and CUDA's text unless the call succeeded.
#define CUDA_CHECK(call)                                                                           \
  do {                                                                                             \
    const cudaError_t cuda_check_error = (call);                                                   \
    CHECK(cuda_check_error == cudaSuccess, "cuda: ", cudaGetErrorString(cuda_check_error), " in ", \
          #call, " (", __FILE__, ":", __LINE__, ")");                                              \
  } while (0)

// SHARED_ARRAY(T, name, N): T name[N] in shared memory. DYNAMIC_SHARED(T, name): T* name, the
// launch's dynamic shared memory, 128-byte aligned. __shared__ does not exist in the emulated
// build.
#if defined(CUDA_EMU)

#define SHARED_ARRAY(T, name, N) T(&name)[N] = emu::shared_array<T, N>([] {})
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emu::shared_dynamic())

// Starts kernel(args...); throws Error where the launch fails. Above 48 KiB of dynamic shared
// memory the opt-in is made here.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024)
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shared_bytes)));
  CUDA_CHECK(emu::launch(kernel, grid, block, shared_bytes, stream, static_cast<A&&>(args)...));
}

#else

#define SHARED_ARRAY(T, name, N) __shared__ __align__(128) T name[N]
#define DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared)

#if defined(__CUDACC__)  // host files may include this one for CUDA_CHECK
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            A&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024)
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shared_bytes)));
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<A&&>(args)...);
  // clang-format on
  CUDA_CHECK(cudaGetLastError());
}
#endif

#endif

// Blocks needed for n items, as a grid dimension.
inline unsigned ceil_div(int64_t n, int64_t per_block) {
  return unsigned((n + per_block - 1) / per_block);
}

}  // namespace graft
