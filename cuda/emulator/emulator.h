// CUDA-on-CPU emulator, engine interface.
//
// Every CUDA thread of one block is a fiber; blocks run one after another on the calling OS thread.
// A fiber runs undisturbed until it meets a rendezvous (__syncthreads, __shfl_sync, mma.sync, ...);
// which fiber runs next is chosen by emu::Options::order. Lanes of a warp are *not* in lock-step,
// which is what the CUDA memory model promises since Volta: whatever relies on more than that
// breaks here.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda/emulator/vector_types.h"

// Whether the program runs under AddressSanitizer; defined by hand for files that it does not
// check.
#if !defined(EMU_ASAN) && defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif !defined(EMU_ASAN)
#define EMU_ASAN 0
#endif
// Compiled into kernels' translation units but not part of the kernel: keep the race checker out of
// it.
#define EMU_NO_RACECHECK __attribute__((noinline, no_sanitize("thread")))

enum cudaError_t : int;
struct CUstream_st;

namespace emu {

// Where in a kernel a rendezvous is; EMU_WHERE as last parameter captures the caller's line.
struct Where {
  const char* file = "";
  int line = 0;
};
#define EMU_WHERE emu::Where where = {__builtin_FILE(), __builtin_LINE()}

// ---- Control and inspection (for tests)
// -------------------------------------------------------------
enum class Order { kAscending, kDescending, kRandom };
struct Options {
  Order order = Order::kRandom;  // which runnable thread (and block) goes next
  uint64_t seed = 1;             // environment: EMU_ORDER=ascending|descending|random, EMU_SEED=n
};
Options& options();

// What this build looks for besides: files that are compiled once for all builds ask here.
enum class Checks { kNone, kMemory, kRaces };
Checks checks();

struct Stats {
  uint64_t blocks = 0, threads = 0, switches = 0, rendezvous = 0, mma = 0;
  uint64_t ldmatrix_tiles = 0;  // 8x8 tiles loaded by ldmatrix
  uint64_t ldmatrix_wavefronts =
      0;                  // shared-memory cycles they take; more than tiles = bank conflicts
  uint64_t accesses = 0;  // loads and stores seen by the race checker
  // Of the runtime API. Calls that make the host wait: stream, event and device synchronisation,
  // cudaMemcpy, copies from the device to memory that is not pinned.
  uint64_t synchronisations = 0;
  uint64_t pageable_copies = 0;         // asynchronous copies with host memory that is not pinned
  uint64_t allocations = 0, frees = 0;  // of device and of pinned memory
  uint64_t launches = 0, graph_launches = 0;
};
Stats& stats();

// Text of the errors found by the launches since the last call (empty: none). Also printed to
// stderr.
std::string take_report();
// Number of live cudaMalloc allocations.
size_t device_allocations();

// ---- Used by the intrinsics
// ----------------------------------------------------------------------------
unsigned lane_id();
// Ends the current thread and fails the launch.
[[noreturn]] void fail(const std::string& message);
// Records an error, lets the kernel go on, fails the launch at its end.
void report(const std::string& message);

// Block barrier. `named`: bar.sync id, threads; several call sites may meet.
void sync_block(Where where);
void sync_named(int id, unsigned threads, Where where);

// All live lanes in `mask` meet; the last to come runs `combine` over everyone's payload (indexed
// by lane, only those in `present` are valid). The lanes must agree on mask and operation. The base
// of every warp-level operation: payloads live on the waiting fibers' stacks, so nothing is copied.
using Combine = void (*)(void* const* payload, uint32_t present);
void warp_collective(uint32_t mask, const char* what, void* payload, Combine combine, Where where);
void sync_warp(uint32_t mask, Where where);

// Tensor-core and asynchronous-copy instructions (PTX semantics, see mma.cuh for the wrappers).
void ldmatrix(uint32_t* regs, int tiles, bool transpose, const void* row, Where where);
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, Where where);
void cp_async(void* shared, const void* global, int bytes, int valid_bytes);
void cp_async_commit();
void cp_async_wait(unsigned pending_groups);  // ~0u: everything, committed or not

// Shared memory: one arena per block, filled with 0xFF (NaN) when the block starts, red zones in
// between.
struct SharedSlot {
  uint64_t block = 0;
  void* memory = nullptr;
};
void* shared_static(SharedSlot& slot, size_t bytes);
void* shared_dynamic();
template <class T, size_t N, class Tag>
T (&shared_array(Tag))
[N] {  // Tag: a lambda type, unique to each SHARED_ARRAY line
  static SharedSlot slot;
  return *static_cast<T(*)[N]>(shared_static(slot, sizeof(T) * N));
}

// Hook of the race checker: thread `lane` (default: the running one) touches memory.
enum class Access {
  kRead,
  kWrite,
  kAtomic,
  kPending
};  // kPending: a cp.async may write from now on
inline void (*on_access)(const void* p, size_t bytes, Access kind, int lane,
                         const void* pc) = nullptr;
__attribute__((always_inline)) inline void touch(const void* p, size_t bytes, Access kind,
                                                 int lane = -1) {
  if (on_access) on_access(p, bytes, kind, lane, __builtin_return_address(0));
}

// ---- Launch
// ------------------------------------------------------------------------------------------
struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_shared;
  CUstream_st* stream;
  void (*body)(void* call);  // runs the kernel for one thread
  const void* call;          // the kernel and its parameters, copied bytewise
  size_t call_bytes;
};
cudaError_t submit_launch(const Launch& launch);

// Plain memcpy that the race checker does not see.
void copy_bytes(void* to, const void* from, size_t n);

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared,
                   CUstream_st* stream, A&&... args) {
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters are copied bytewise");
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> params;
    static void run(void* self) {  // each thread gets its own copy of the parameters
      alignas(Call) std::byte copy[sizeof(Call)];
      copy_bytes(copy, self, sizeof(Call));
      auto& call = *reinterpret_cast<Call*>(copy);
      std::apply(call.kernel, call.params);
    }
  };
  static_assert(alignof(Call) <= 16);
  const Call call{kernel, {std::forward<A>(args)...}};
  return submit_launch({reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared, stream,
                        &Call::run, &call, sizeof(Call)});
}

}  // namespace emu
