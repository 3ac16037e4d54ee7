// The runtime API on host memory. Device memory is poisoned (0xFF = NaN) when allocated, sits
// between red zones, and under AddressSanitizer is out of bounds for host code except inside
// cudaMemcpy/cudaMemset.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>

#include "cuda/emulator/cuda_runtime.h"
#include "cuda/emulator/internal.h"

namespace emu {
namespace {

constexpr size_t kAlign = 256, kRedZone = 256;
constexpr int kRedZoneByte = 0xff;  // NaN, so that a stray read shows as well

std::map<char*, size_t>& allocations() {
  static auto& m = *new std::map<char*, size_t>;
  return m;
}
cudaError_t last_error = cudaSuccess;

#if EMU_ASAN
// AddressSanitizer brings its own red zones, and names the allocation in its report.
char* allocate(size_t bytes) {
  void* p = nullptr;
  return posix_memalign(&p, kAlign, bytes) == 0 ? static_cast<char*>(p) : nullptr;
}
void release(char* p, size_t) { std::free(p); }
#else
char* allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, kAlign, bytes + 2 * kRedZone)) return nullptr;
  std::memset(p, kRedZoneByte, bytes + 2 * kRedZone);
  return static_cast<char*>(p) + kRedZone;
}
void release(char* p, size_t) { std::free(p - kRedZone); }
#endif

void check_red_zones() {
#if !EMU_ASAN
  for (auto [p, bytes] : allocations())
    for (size_t i = 0; i < kRedZone; ++i)
      if (p[-1 - static_cast<long>(i)] != static_cast<char>(kRedZoneByte) ||
          p[bytes + i] != static_cast<char>(kRedZoneByte)) {
        report("write outside a device allocation of " + std::to_string(bytes) + " bytes, within " +
               std::to_string(i) + " bytes of it");
        std::memset(p - kRedZone, kRedZoneByte, kRedZone);
        std::memset(p + bytes, kRedZoneByte, kRedZone);
        break;
      }
#endif
}

// Host copy functions may touch device memory for the length of one call.
struct Expose {
  Expose() { expose_device_memory(true); }
  ~Expose() { expose_device_memory(false); }
};

bool valid(const void* p, size_t bytes, bool device) {
  char* begin;
  size_t size;
  if (!find_device_allocation(p, begin, size)) return !device;
  return device && static_cast<const char*>(p) + bytes <= begin + size;
}

}  // namespace

cudaError_t set_last_error(cudaError_t e) { return last_error = e; }
size_t device_allocations() { return allocations().size(); }

void expose_device_memory(bool to_kernels) {
  if (EMU_ASAN)
    for (auto [p, bytes] : allocations()) to_kernels ? unpoison(p, bytes) : poison(p, bytes);
  if (!to_kernels) check_red_zones();
}

bool find_device_allocation(const void* p, char*& begin, size_t& bytes) {
  auto it = allocations().upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (it == allocations().begin()) return false;
  --it;
  begin = it->first;
  bytes = it->second;
  return p < begin + bytes;
}

}  // namespace emu

using namespace emu;

cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  if (bytes > free) return set_last_error(cudaErrorMemoryAllocation);
  char* memory = allocate(bytes);
  if (!memory) return set_last_error(cudaErrorMemoryAllocation);
  std::memset(memory, 0xff, bytes);
  poison(memory, bytes);
  allocations()[memory] = bytes;
  if (on_device_allocation) on_device_allocation(memory, bytes, true);
  *p = memory;
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  auto it = allocations().find(static_cast<char*>(p));
  if (it == allocations().end()) return set_last_error(cudaErrorInvalidValue);
  if (on_device_allocation) on_device_allocation(p, it->second, false);
  unpoison(p, it->second);
  release(it->first, it->second);
  allocations().erase(it);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (bytes == 0) return cudaSuccess;
  if (kind != cudaMemcpyDefault &&
      !(valid(to, bytes, to_device) && valid(from, bytes, from_device)))
    return set_last_error(cudaErrorInvalidValue);
  Expose e;
  std::memmove(to, from, bytes);
  if (on_host_write) on_host_write(to, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (bytes == 0) return cudaSuccess;
  if (!valid(p, bytes, true)) return set_last_error(cudaErrorInvalidValue);
  Expose e;
  std::memset(p, value, bytes);
  if (on_host_write) on_host_write(p, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch) return set_last_error(cudaErrorInvalidValue);
  for (size_t row = 0; row < height; ++row)
    if (auto e =
            cudaMemcpyAsync(static_cast<char*>(to) + row * to_pitch,
                            static_cast<const char*>(from) + row * from_pitch, width, kind, stream))
      return e;
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** p, size_t bytes) {
  *p = std::malloc(bytes);
  return *p || bytes == 0 ? cudaSuccess : set_last_error(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* p) {
  std::free(p);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const char* limit = std::getenv("EMU_MEMORY_MB");
  *total = (limit ? std::strtoull(limit, nullptr, 10) : 1ull << 20) << 20;
  size_t used = 0;
  for (auto [p, bytes] : allocations()) used += bytes;
  *free = *total - std::min(*total, used);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device != 0) return set_last_error(cudaErrorInvalidValue);
  *properties = {};
  std::strcpy(properties->name, "emulated");
  size_t free = 0;
  cudaMemGetInfo(&free, &properties->totalGlobalMem);
  properties->multiProcessorCount = 1;
  properties->major = 8;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : set_last_error(cudaErrorInvalidValue);
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "error";
  }
}
