// Memory, copies and errors of the runtime API, on host memory. Device memory is poisoned (0xFF =
// NaN) when allocated, sits between red zones, and under AddressSanitizer is out of bounds for host
// code except inside cudaMemcpy/cudaMemset.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "cuda/emulator/cuda_runtime.h"
#include "cuda/emulator/internal.h"
#include "cuda/emulator/lazy.h"
#include "cuda/emulator/streams.h"

namespace emu {
namespace {

constexpr size_t kAlign = 256, kRedZone = 256;
constexpr int kRedZoneByte = 0xff;  // NaN, so that a stray read shows as well

std::map<char*, Allocation>& allocations() {
  static auto& m = *new std::map<char*, Allocation>;
  return m;
}
std::map<const char*, size_t>& pinned() {
  static auto& m = *new std::map<const char*, size_t>;
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
// The sanitizers know the line, not the kernel: AddressSanitizer hears of it when it has reported,
// UBSan just before.
void name_the_kernel() {
  if (const std::string kernel = running_kernel(); !kernel.empty())
    std::fprintf(stderr, "emulator: %ssee the sanitizer's report\n", kernel.c_str());
}
[[maybe_unused]] const bool hears_of_death = [] {
  __sanitizer_set_death_callback(name_the_kernel);
  return true;
}();
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
  static const std::string intact(kRedZone, static_cast<char>(kRedZoneByte));
  for (auto& [p, allocation] : allocations()) {
    char* after = p + allocation.bytes;
    if (!std::memcmp(p - kRedZone, intact.data(), kRedZone) &&
        !std::memcmp(after, intact.data(), kRedZone))
      continue;
    size_t i = 0;
    while (p[-1 - static_cast<long>(i)] == intact[0] && after[i] == intact[0]) ++i;
    report("write outside a device allocation of " + std::to_string(allocation.bytes) +
           " bytes, within " + std::to_string(i + 1) + " bytes of it");
    std::memset(p - kRedZone, kRedZoneByte, kRedZone);
    std::memset(after, kRedZoneByte, kRedZone);
  }
#endif
}

// Host copy functions may touch device memory for the length of one call.
struct Expose {
  Expose() { expose_device_memory(true); }
  ~Expose() { expose_device_memory(false); }
};

bool valid(const void* p, size_t bytes, bool device) {
  const Allocation* a = find_device_allocation(p);
  if (!a) return !device;
  return device && static_cast<const char*>(p) + bytes <= a->begin + a->bytes;
}

bool is_pinned(const void* p) {
  auto it = pinned().upper_bound(static_cast<const char*>(p));
  return it != pinned().begin() && p < (--it)->first + it->second;
}

// Rows of a matrix, or one row.
struct Copy {
  char* to;
  const char* from;
  size_t to_pitch, from_pitch, width, height;

  size_t extent(size_t pitch) const { return (height - 1) * pitch + width; }
  // What the operands are, whatever the caller calls it.
  Work::Kind kind() const {
    const bool to_device = find_device_allocation(to), from_device = find_device_allocation(from);
    return to_device ? (from_device ? Work::kDeviceToDevice : Work::kHostToDevice)
                     : (from_device ? Work::kDeviceToHost : Work::kHostToHost);
  }
  bool pageable() const {
    return (!find_device_allocation(to) && !is_pinned(to)) ||
           (!find_device_allocation(from) && !is_pinned(from));
  }
  cudaError_t check(cudaMemcpyKind named) const {
    const bool to_device = named == cudaMemcpyHostToDevice || named == cudaMemcpyDeviceToDevice;
    const bool from_device = named == cudaMemcpyDeviceToHost || named == cudaMemcpyDeviceToDevice;
    const bool any = named == cudaMemcpyDefault;
    if (valid(to, extent(to_pitch), any ? find_device_allocation(to) != nullptr : to_device) &&
        valid(from, extent(from_pitch),
              any ? find_device_allocation(from) != nullptr : from_device))
      return cudaSuccess;
    return set_last_error(cudaErrorInvalidValue);
  }
  cudaError_t run() const {
    Expose e;
    for (size_t row = 0; row < height; ++row) {
      std::memmove(to + row * to_pitch, from + row * from_pitch, width);
      if (on_host_write) on_host_write(to + row * to_pitch, width);
    }
    return cudaSuccess;
  }
};

cudaError_t submit_copy(const Copy& copy, cudaMemcpyKind named, cudaStream_t stream) {
  if (copy.width == 0 || copy.height == 0) return cudaSuccess;
  if (cudaError_t e = copy.check(named)) return e;
  const Work::Kind kind = copy.kind();
  if (copy.pageable()) {
    if (cudaError_t e = forbid_if_capturing(stream)) return e;
    ++stats().pageable_copies;
    stats().synchronisations += kind == Work::kDeviceToHost;
  }
  // Memory that is not pinned is read, or written, before the call returns.
  std::function<cudaError_t()> run = [copy] { return copy.run(); };
  if (copy.pageable() && kind == Work::kHostToDevice && lazy())
    run = [later = copy, bytes = std::vector<char>(
                             copy.from, copy.from + copy.extent(copy.from_pitch))]() mutable {
      later.from = bytes.data();
      return later.run();
    };
  const cudaError_t e = submit(
      stream, {kind,
               nullptr,
               std::move(run),
               {reinterpret_cast<uintptr_t>(copy.to), reinterpret_cast<uintptr_t>(copy.from)}});
  return !e && copy.pageable() && kind == Work::kDeviceToHost ? finish(stream) : e;
}

}  // namespace

#if EMU_ASAN
extern "C" void __ubsan_on_report() { name_the_kernel(); }
#endif

cudaError_t set_last_error(cudaError_t e) { return last_error = e; }
size_t device_allocations() { return allocations().size(); }

void expose_device_memory(bool to_kernels) {
  if (EMU_ASAN)
    for (auto& [p, a] : allocations()) to_kernels ? unpoison(p, a.bytes) : poison(p, a.bytes);
  if (!to_kernels) check_red_zones();
}

const Allocation* find_device_allocation(const void* p) {
  auto it = allocations().upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (it == allocations().begin()) return nullptr;
  --it;
  return p < it->first + it->second.bytes ? &it->second : nullptr;
}

}  // namespace emu

using namespace emu;

cudaError_t cudaMalloc(void** p, size_t bytes) {
  static uint64_t serial = 0;
  if (cudaError_t e = forbid_during_capture()) return e;
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  if (bytes > free) return set_last_error(cudaErrorMemoryAllocation);
  char* memory = allocate(bytes);
  if (!memory) return set_last_error(cudaErrorMemoryAllocation);
  ++stats().allocations;
  std::memset(memory, 0xff, bytes);
  poison(memory, bytes);
  allocations()[memory] = {memory, bytes, ++serial};
  if (on_device_allocation) on_device_allocation(memory, bytes, true);
  *p = memory;
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  if (cudaError_t e = forbid_during_capture()) return e;
  if (cudaError_t e = finish_all_streams()) return e;
  auto it = allocations().find(static_cast<char*>(p));
  if (it == allocations().end()) return set_last_error(cudaErrorInvalidValue);
  const size_t bytes = it->second.bytes;
  ++stats().frees;
  if (on_device_allocation) on_device_allocation(p, bytes, false);
  unpoison(p, bytes);
  release(it->first, bytes);
  allocations().erase(it);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags) {
  if (!p || flags > 7) return set_last_error(cudaErrorInvalidValue);
  if (cudaError_t e = forbid_during_capture()) return e;
  *p = nullptr;
  if (bytes == 0) return cudaSuccess;
  *p = std::malloc(bytes);
  if (!*p) return set_last_error(cudaErrorMemoryAllocation);
  ++stats().allocations;
  pinned()[static_cast<const char*>(*p)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  return cudaHostAlloc(p, bytes, cudaHostAllocDefault);
}
cudaError_t cudaFreeHost(void* p) {
  if (!p) return cudaSuccess;
  if (cudaError_t e = forbid_during_capture()) return e;
  if (cudaError_t e = finish_all_streams()) return e;
  if (!pinned().erase(static_cast<const char*>(p))) return set_last_error(cudaErrorInvalidValue);
  ++stats().frees;
  std::free(p);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return submit_copy(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, bytes, bytes, 1}, kind,
      stream);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch) return set_last_error(cudaErrorInvalidValue);
  return submit_copy(
      {static_cast<char*>(to), static_cast<const char*>(from), to_pitch, from_pitch, width, height},
      kind, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (cudaError_t e = forbid_during_capture()) return e;
  const Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, bytes, bytes, 1};
  if (bytes == 0) return cudaSuccess;
  if (cudaError_t e = copy.check(kind)) return e;
  ++stats().synchronisations;
  if (cudaError_t e = finish_blocking_streams()) return e;
  return copy.run();
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  if (!valid(p, bytes, true)) return set_last_error(cudaErrorInvalidValue);
  return submit(stream, {Work::kFill,
                         nullptr,
                         [=] {
                           Expose e;
                           std::memset(p, value, bytes);
                           if (on_host_write) on_host_write(p, bytes);
                           return cudaSuccess;
                         },
                         {reinterpret_cast<uintptr_t>(p)}});
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  if (cudaError_t e = forbid_during_capture()) return e;
  return cudaMemsetAsync(p, value, bytes, nullptr);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const char* limit = std::getenv("EMU_MEMORY_MB");
  *total = (limit ? std::strtoull(limit, nullptr, 10) : 1ull << 20) << 20;
  size_t used = 0;
  for (auto& [p, a] : allocations()) used += a.bytes;
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
cudaError_t emuFuncGetAttributes(cudaFuncAttributes* attributes) {
  const char* no_code = std::getenv("EMU_NO_CODE");
  if (no_code && std::strcmp(no_code, "1") == 0)
    return set_last_error(cudaErrorNoKernelImageForDevice);
  attributes->maxThreadsPerBlock = 1024;
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

namespace {
struct ErrorText {
  cudaError_t code;
  const char *name, *text;
};
#define ERROR_TEXT(name, text) \
  { name, #name, text }
constexpr ErrorText kErrors[] = {
    ERROR_TEXT(cudaSuccess, "no error"),
    ERROR_TEXT(cudaErrorInvalidValue, "invalid argument"),
    ERROR_TEXT(cudaErrorMemoryAllocation, "out of memory"),
    ERROR_TEXT(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ERROR_TEXT(cudaErrorNoKernelImageForDevice,
               "no kernel image is available for execution on the device"),
    ERROR_TEXT(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ERROR_TEXT(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    ERROR_TEXT(cudaErrorLaunchFailure, "unspecified launch failure"),
    ERROR_TEXT(cudaErrorNotSupported, "operation not supported"),
    ERROR_TEXT(cudaErrorStreamCaptureUnsupported,
               "operation not permitted when stream is capturing"),
    ERROR_TEXT(cudaErrorStreamCaptureInvalidated,
               "operation failed due to a previous error during capture"),
    ERROR_TEXT(cudaErrorStreamCaptureMerge,
               "operation would result in a merge of separate capture sequences"),
    ERROR_TEXT(cudaErrorStreamCaptureUnmatched,
               "capture was not ended in the same stream as it began"),
    ERROR_TEXT(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    ERROR_TEXT(cudaErrorStreamCaptureIsolation,
               "dependency created on uncaptured work in another stream"),
    ERROR_TEXT(cudaErrorStreamCaptureImplicit,
               "operation would make the legacy stream depend on a capturing blocking stream"),
    ERROR_TEXT(cudaErrorCapturedEvent,
               "operation not permitted on an event last recorded in a capturing stream"),
    ERROR_TEXT(cudaErrorGraphExecUpdateFailure,
               "the graph update was not performed because it included changes which violated "
               "constraints specific to instantiated graph update"),
};
#undef ERROR_TEXT
const ErrorText& error_text(cudaError_t e) {
  static constexpr ErrorText unknown{cudaSuccess, "unrecognized error code",
                                     "unrecognized error code"};
  for (const ErrorText& t : kErrors)
    if (t.code == e) return t;
  return unknown;
}
}  // namespace

const char* cudaGetErrorName(cudaError_t e) { return error_text(e).name; }
const char* cudaGetErrorString(cudaError_t e) {
  static std::string text;
  text = error_text(e).text;
  if (e == cudaErrorLaunchFailure && !failure_text().empty()) text += ": " + failure_text();
  return text.c_str();
}
