// The scheduler: runs the threads of one block on fibers, the blocks of a grid one after another.
// emulator.cpp switches and schedules, rendezvous.cpp makes threads meet.
#pragma once
#include <boost/context/fiber.hpp>

#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/emulator/cuda_runtime.h"
#include "cuda/emulator/internal.h"

namespace emu {

namespace bc = boost::context;

constexpr int kMaxThreads = 1024, kWarps = kMaxThreads / 32, kNamedBarriers = 16;
constexpr size_t kStackBytes = 256 << 10, kPage = 4096;
constexpr size_t kArenaBytes = 512 << 10, kRedZone = 128, kSharedLimit = 227 << 10,
                 kStaticLimit = 48 << 10;

struct LaneAborted {};  // thrown through a kernel to end one CUDA thread; destructors run

struct AsyncCopy {
  char* to;
  const char* from;
  int bytes, valid;
  unsigned group;
  void* issued;  // return address
};

// A stack on which CUDA threads run, one after another: a thread that ends hands its stack to the
// next fresh one, so a kernel without barriers needs no switch at all.
struct Fiber {
  bc::fiber context;  // suspended here
  char* stack_bottom = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Lane {
  Fiber* fiber = nullptr;  // from the thread's first instruction to its last
  uint3 index{};
  bool done = true;
  const char* waits_for = nullptr;
  Where where;
  std::vector<AsyncCopy> copies;
  unsigned copy_group = 0;
};

inline bool same_place(const Where& a, const Where& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// A warp-level rendezvous in progress.
struct Meeting {
  // Without payloads: those of lanes that have not come are never read, and there are many
  // meetings.
  Meeting(uint32_t lanes, Combine operation, Where place)
      : mask(lanes), combine(operation), where(place) {}
  uint32_t mask, arrived = 0;
  Combine combine;
  Where where;
  void* payload[32];
};
struct Warp {
  uint32_t live = 0;
  std::vector<Meeting> meetings;
};

struct Barrier {
  std::vector<Lane*> waiting;
  Where where;
};

// Set of runnable lanes with the three ways to pick the next.
class ReadySet {
 public:
  void insert(unsigned i) {
    words_[i / 64] |= 1ull << i % 64;
    ++size_;
  }
  bool empty() const { return size_ == 0; }
  void clear() {
    words_ = {};
    size_ = 0;
  }
  unsigned pop(Order order, uint64_t random, unsigned threads) {
    unsigned i = order == Order::kAscending ? next(0)
                 : order == Order::kDescending
                     ? last()
                     : next(static_cast<unsigned>((random >> 32) * threads >> 32));
    words_[i / 64] &= ~(1ull << i % 64);
    --size_;
    return i;
  }

 private:
  unsigned next(unsigned from) const {  // first member at or after `from`, cyclically
    uint64_t w = words_[from / 64] & (~0ull << from % 64);
    for (unsigned k = from / 64;; w = words_[k = (k + 1) % kWords])
      if (w) return k * 64 + static_cast<unsigned>(__builtin_ctzll(w));
  }
  unsigned last() const {
    for (unsigned k = kWords;;)
      if (words_[--k]) return k * 64 + 63 - static_cast<unsigned>(__builtin_clzll(words_[k]));
  }
  static constexpr unsigned kWords = kMaxThreads / 64;
  std::array<uint64_t, kWords> words_{};
  unsigned size_ = 0;
};

class Engine {
 public:
  Options options;
  Stats stats;
  std::string report;                        // since take_report
  std::string failure;                       // first line of the last launch that failed
  std::map<const void*, int> shared_opt_in;  // cudaFuncSetAttribute
  std::mutex mutex;

  Engine();

  cudaError_t check(const Launch& launch) const;  // its configuration
  cudaError_t run(const Launch& launch, void* call);

  Lane& self() { return *current_; }
  bool in_kernel() const { return current_ != nullptr; }
  unsigned linear() const { return static_cast<unsigned>(current_ - lanes_.data()); }
  // Records a fault with the kernel and, in a thread, its index; `place` adds the line it is at.
  void note(const std::string& message, bool place = false);
  std::string describe_kernel() const;
  [[noreturn]] void abort_launch(const std::string& message) {
    note(message, true);
    failed_ = true;
    throw LaneAborted{};
  }
  void suspend(const char* what, Where where);
  void wait_barrier(Barrier& barrier, unsigned expected, const char* what, Where where);
  void meet(uint32_t mask, const char* what, void* payload, Combine combine, Where where);
  void* allocate_shared(size_t bytes);
  void finish_copies(Lane& lane, unsigned below_group);
  bool owns_stack(const void* p) const {
    return static_cast<const char*>(p) - stacks_ + 0ul < kMaxThreads * kStackBytes;
  }
  bool owns_shared(const void* p, size_t& offset) const {
    return (offset = static_cast<size_t>(static_cast<const char*>(p) - arena_)) < kArenaBytes;
  }

  Barrier barriers[kNamedBarriers];
  unsigned threads = 0;
  uint64_t block_serial = 0;
  void* dynamic_shared = nullptr;
  Clock clock;  // what the race checker needs to order two accesses

 private:
  void run_block(void (*body)(void*), void* context, size_t dynamic_shared_bytes);
  void release(Lane& lane) { ready_.insert(static_cast<unsigned>(&lane - lanes_.data())); }
  void complete(Warp& warp, unsigned warp_index);
  Fiber& make_fiber();
  void run_threads(Fiber& fiber);
  void end_thread();
  Lane* next();
  void switch_to(Lane* to);
  void arrive(bc::fiber&& from, void* fake_stack);
  void take_over(Lane* lane);
  std::string describe_waiters();
  uint64_t random() {
    rng_ ^= rng_ << 13;
    rng_ ^= rng_ >> 7;
    return rng_ ^= rng_ << 17;
  }

  std::array<Lane, kMaxThreads> lanes_;
  std::array<Warp, kWarps> warps_;
  ReadySet ready_;
  Lane* current_ = nullptr;
  std::deque<Fiber> fibers_;  // stack i of the slab belongs to number i
  std::vector<Fiber*> idle_;  // wait for a fresh thread
  Fiber scheduler_;           // run_block, on the caller's stack
  Fiber* running_ = &scheduler_;
  Fiber* left_ = nullptr;  // whose context the fiber that resumes has to keep
  unsigned live_ = 0;      // threads of the block that have not ended
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  char *arena_, *stacks_;
  size_t arena_used_ = 0;
  uint64_t rng_ = 1, launches_ = 0;
  bool failed_ = false;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  const void* kernel_ = nullptr;  // being run
  bool in_block_ = false;
  Where combining_;  // the warp operation that is being done for its lanes
};

Engine& engine();

}  // namespace emu
