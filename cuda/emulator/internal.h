// Shared between the emulator's own source files.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/emulator/emulator.h"
#include "cuda/emulator/runtime_api.h"

#if EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

// AddressSanitizer: mark memory, and tell it about stack switches. Nothing without it.
#if EMU_ASAN
inline void poison(void* p, size_t n) { __asan_poison_memory_region(p, n); }
inline void unpoison(void* p, size_t n) { __asan_unpoison_memory_region(p, n); }
inline void start_switch(void** fake, const void* bottom, size_t n) {
  __sanitizer_start_switch_fiber(fake, bottom, n);
}
inline void finish_switch(void* fake, const void** bottom, size_t* n) {
  __sanitizer_finish_switch_fiber(fake, bottom, n);
}
#else
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
#endif

// Position of the running block in the happens-before order.
struct Clock {
  uint64_t block = 0, launch_first_block = 1;
  uint32_t block_epoch = 0;               // __syncthreads seen by this block
  std::array<uint32_t, 32> warp_epoch{};  // __syncwarp seen by each warp
};
int running_thread();  // linear index in the block, -1 on the host

cudaError_t set_last_error(cudaError_t e);
// A failure found outside of any kernel; the next text of cudaErrorLaunchFailure, and in the
// report.
void report_failure(const std::string& message);
// What cudaErrorLaunchFailure means just now.
const std::string& failure_text();

void expose_device_memory(bool to_kernels);
struct Allocation {
  char* begin;
  size_t bytes;
  uint64_t serial;  // never used twice
};
// The cudaMalloc allocation that holds p, or null.
const Allocation* find_device_allocation(const void* p);

// Names of the program's code, from its debug information; slow, so only for reports (symbols.cpp).
std::string describe(const Where& where);     // "sum.cu:17"
std::string kernel_name(const void* kernel);  // "sum_kernel<4> (sum.cu:12)"
// From return addresses, innermost first, to where the kernel was: "utils.cuh:5, called at
// sum.cu:17".
std::string place_in_kernel(const std::vector<void*>& return_addresses, const void* kernel);
// "kernel sum_kernel<4> (sum.cu:12), block (0,0,0), thread (3,0,0): ", empty if none runs.
std::string running_kernel();

struct Node;
cudaGraph_t make_graph(std::vector<Node> nodes);

// Called by the runtime for the race checker: new memory, or memory written by the host.
inline void (*on_host_write)(void* p, size_t bytes) = nullptr;
inline void (*on_device_allocation)(void* p, size_t bytes, bool alive) = nullptr;

}  // namespace emu
