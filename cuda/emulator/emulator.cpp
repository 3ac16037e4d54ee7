#include "cuda/emulator/emulator.h"

#include <sys/mman.h>
#include <boost/context/fiber.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "cuda/emulator/cuda_runtime.h"
#include "cuda/emulator/internal.h"
#include "cuda/emulator/streams.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {
namespace {

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
};

struct Lane {
  bc::fiber fiber;  // suspended here
  uint3 index{};
  bool done = true;
  const char* waits_for = nullptr;
  Where where;
  std::vector<AsyncCopy> copies;
  unsigned copy_group = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  char* stack_bottom = nullptr;
};

bool same_place(const Where& a, const Where& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// A warp-level rendezvous in progress.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  Combine combine = nullptr;
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
    unsigned i = order == Order::kAscending    ? next(0)
                 : order == Order::kDescending ? last()
                                               : next(static_cast<unsigned>(random % threads));
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

  Engine() {
    const char* order = std::getenv("EMU_ORDER");
    if (order)
      options.order = order[0] == 'a'   ? Order::kAscending
                      : order[0] == 'd' ? Order::kDescending
                                        : Order::kRandom;
    if (const char* seed = std::getenv("EMU_SEED")) options.seed = std::strtoull(seed, nullptr, 10);
    arena_ = static_cast<char*>(
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    stacks_ = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    poison(arena_, kArenaBytes);
  }

  cudaError_t check(const Launch& launch) const;  // its configuration
  cudaError_t run(const Launch& launch, void* call);

  Lane& self() { return *current_; }
  bool in_kernel() const { return current_ != nullptr; }
  unsigned linear() const { return static_cast<unsigned>(current_ - lanes_.data()); }
  void note(const std::string& message);
  [[noreturn]] void abort_launch(const std::string& message) {
    note(message);
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
  void resume(unsigned i);
  void release(Lane& lane) { ready_.insert(static_cast<unsigned>(&lane - lanes_.data())); }
  void complete(Warp& warp, unsigned warp_index);
  void start_fiber(Lane& lane);
  void switch_to_scheduler(Lane& lane);
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
  bc::fiber scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  char *arena_, *stacks_;
  size_t arena_used_ = 0;
  uint64_t rng_ = 1;
  bool failed_ = false;
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  const void* kernel_ = nullptr;  // being run
  bool in_block_ = false;
};

Engine& engine() {
  static Engine& e = *new Engine;  // never destroyed: its fibers have nothing to unwind at exit
  return e;
}

// ---- Fibers
// ---------------------------------------------------------------------------------------------

void Engine::start_fiber(Lane& lane) {
  // One slab for all stacks (the race checker skips it with one comparison), a guard page below
  // each.
  char* base = stacks_ + (&lane - lanes_.data()) * kStackBytes;
  mprotect(base, kPage, PROT_NONE);
  lane.stack_bottom = base + kPage;
  struct SlabStack {
    bc::stack_context stack;
    bc::stack_context allocate() { return stack; }
    void deallocate(bc::stack_context&) {}
  } allocator;
  // Staggered tops: at equal offsets within their pages the stacks would fight for the same cache
  // sets.
  const size_t stagger = static_cast<size_t>(&lane - lanes_.data()) % 61 * 320;
  allocator.stack.sp = base + kStackBytes - stagger;
  allocator.stack.size = kStackBytes - kPage - stagger;
  lane.fiber =
      bc::fiber(std::allocator_arg, std::move(allocator), [this, &lane](bc::fiber&& scheduler) {
        finish_switch(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
        scheduler_ = std::move(scheduler);
        for (;;) {  // the fiber serves this thread index in every block of every launch
          try {
            body_(context_);
            finish_copies(lane, ~0u);
          } catch (const LaneAborted&) {
          }
          lane.done = true;
          switch_to_scheduler(lane);
        }
        return std::move(scheduler_);
      });
}

void Engine::resume(unsigned i) {
  Lane& lane = lanes_[i];
  if (!lane.fiber) start_fiber(lane);
  current_ = &lane;
  threadIdx = lane.index;
  ++stats.switches;
  void* fake = nullptr;
  start_switch(&fake, lane.stack_bottom, kStackBytes - kPage);
  lane.fiber = std::move(lane.fiber).resume();
  finish_switch(fake, nullptr, nullptr);
  current_ = nullptr;
}

void Engine::switch_to_scheduler(Lane& lane) {
  start_switch(&lane.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
  scheduler_ = std::move(scheduler_).resume();
  finish_switch(lane.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
}

// Gives up the processor until some other thread puts this one back into the ready set.
void Engine::suspend(const char* what, Where where) {
  Lane& lane = *current_;
  lane.waits_for = what;
  lane.where = where;
  switch_to_scheduler(lane);
  lane.waits_for = nullptr;
  if (failed_) throw LaneAborted{};
}

// ---- Grid and block
// ---------------------------------------------------------------------------------------

cudaError_t Engine::check(const Launch& launch) const {
  const auto [grid, block] = std::pair(launch.grid, launch.block);
  const uint64_t n = uint64_t{block.x} * block.y * block.z;
  if (n == 0 || n > kMaxThreads || block.z > 64 || uint64_t{grid.x} * grid.y * grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return set_last_error(cudaErrorInvalidConfiguration);
  auto opt_in = shared_opt_in.find(launch.kernel);
  const size_t limit =
      opt_in == shared_opt_in.end() ? kStaticLimit : static_cast<size_t>(opt_in->second);
  return launch.dynamic_shared > limit ? set_last_error(cudaErrorInvalidValue) : cudaSuccess;
}

cudaError_t Engine::run(const Launch& launch, void* call) {
  std::scoped_lock lock(mutex);
  const auto [grid, block] = std::pair(launch.grid, launch.block);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  ++stats.launches;
  kernel_ = launch.kernel;
  rng_ = options.seed * 0x9e3779b97f4a7c15ull | 1;
  threads = block.x * block.y * block.z;
  blockDim = block;
  gridDim = grid;
  failed_ = false;
  const size_t reports_before = report.size();
  failure.clear();
  clock.launch_first_block = block_serial + 1;
  std::vector<uint32_t> sequence(blocks);
  std::iota(sequence.begin(), sequence.end(), 0u);
  if (options.order == Order::kDescending) std::reverse(sequence.begin(), sequence.end());
  if (options.order == Order::kRandom)
    for (size_t i = blocks; i > 1; --i) std::swap(sequence[i - 1], sequence[random() % i]);

  expose_device_memory(true);  // host code must not touch it, kernels may
  for (uint32_t b : sequence) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    in_block_ = true;
    run_block(launch.body, call, launch.dynamic_shared);
    in_block_ = false;
    if (failed_) break;
  }
  expose_device_memory(false);
  kernel_ = nullptr;
  return report.size() == reports_before ? cudaSuccess : set_last_error(cudaErrorLaunchFailure);
}

void Engine::run_block(void (*body)(void*), void* context, size_t dynamic_shared_bytes) {
  body_ = body;
  context_ = context;
  ++stats.blocks;
  stats.threads += threads;
  clock = {++block_serial, clock.launch_first_block, 0, {}};
  poison(arena_, arena_used_);
  arena_used_ = 0;
  dynamic_shared = dynamic_shared_bytes ? allocate_shared(dynamic_shared_bytes) : nullptr;
  for (Warp& w : warps_) w.live = 0, w.meetings.clear();
  for (unsigned i = 0; i < threads; ++i) {
    Lane& lane = lanes_[i];
    lane.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    lane.done = false;
    lane.copies.clear();
    lane.copy_group = 0;
    warps_[i / 32].live |= 1u << i % 32;
    ready_.insert(i);
  }
  for (unsigned live = threads; live > 0;) {
    if (ready_.empty()) {  // nobody can go on
      note(describe_waiters());
      failed_ = true;
    }
    if (failed_) {  // unwind every suspended thread
      ready_.clear();
      for (unsigned i = 0; i < threads; ++i)
        if (!lanes_[i].done && lanes_[i].waits_for) resume(i);
      break;
    }
    const unsigned i = ready_.pop(options.order, random(), threads);
    resume(i);
    if (!lanes_[i].done) continue;
    --live;
    Warp& warp = warps_[i / 32];
    warp.live &= ~(1u << i % 32);
    complete(warp, i / 32);  // the others no longer wait for it
  }
  for (Barrier& b : barriers) b.waiting.clear();
}

std::string Engine::describe_waiters() {
  std::map<std::string, unsigned> count;
  unsigned exited = 0;
  for (unsigned i = 0; i < threads; ++i) {
    const Lane& l = lanes_[i];
    if (l.done)
      ++exited;
    else
      ++count[std::string(l.waits_for) + " at " + l.where.file + ":" +
              std::to_string(l.where.line)];
  }
  std::string text =
      "deadlock: " + std::to_string(exited) + " of " + std::to_string(threads) + " threads exited";
  for (auto& [what, n] : count) text += ", " + std::to_string(n) + " wait in " + what;
  return text;
}

void Engine::note(const std::string& message) {
  const auto triple = [](auto v) {
    return " (" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  std::string line;
  if (kernel_) line = "kernel " + kernel_name(kernel_) + ": ";
  if (in_block_) line += "block" + triple(blockIdx);
  if (current_) line += " thread" + triple(threadIdx);
  if (in_block_) line += ": ";
  line += message;
  if (failure.empty()) failure = line;
  line = "emulator: " + line + "\n";
  std::fputs(line.c_str(), stderr);
  report += line;
}

// ---- Rendezvous
// -------------------------------------------------------------------------------------------

void Engine::wait_barrier(Barrier& barrier, unsigned expected, const char* what, Where where) {
  barrier.where = where;
  barrier.waiting.push_back(current_);
  if (barrier.waiting.size() == expected) {
    ++stats.rendezvous;
    if (expected == threads) ++clock.block_epoch;
    for (Lane* l : barrier.waiting) release(*l);
    barrier.waiting.clear();
  }
  suspend(what, where);
}

// Runs those meetings of a warp all of whose live members have come.
void Engine::complete(Warp& warp, unsigned warp_index) {
  for (size_t k = 0; k < warp.meetings.size();) {
    if (warp.meetings[k].arrived != (warp.meetings[k].mask & warp.live)) {
      ++k;
      continue;
    }
    const Meeting done = warp.meetings[k];
    warp.meetings.erase(warp.meetings.begin() + static_cast<long>(k));
    ++stats.rendezvous;
    if (done.combine)
      done.combine(done.payload, done.arrived);
    else if (done.mask == ~0u || done.arrived == warp.live)
      ++clock.warp_epoch[warp_index];  // __syncwarp
    for (uint32_t rest = done.arrived; rest; rest &= rest - 1)
      release(lanes_[warp_index * 32 + static_cast<unsigned>(__builtin_ctz(rest))]);
  }
}

void Engine::meet(uint32_t mask, const char* what, void* payload, Combine combine, Where where) {
  const unsigned i = linear(), lane = i % 32;
  Warp& warp = warps_[i / 32];
  if (!(mask >> lane & 1)) fail(std::string(what) + " by a lane that its mask leaves out");
  Meeting* meeting = nullptr;
  for (Meeting& m : warp.meetings) {
    if (!(m.mask & mask)) continue;
    if (m.mask != mask || m.combine != combine || (combine && !same_place(m.where, where)))
      fail(std::string(what) + " at line " + std::to_string(where.line) +
           " meets another operation, mask or line (" + std::to_string(m.where.line) +
           "): the warp has diverged");
    meeting = &m;
  }
  if (!meeting) {
    meeting = &warp.meetings.emplace_back();
    meeting->mask = mask;
    meeting->combine = combine;
    meeting->where = where;
  }
  meeting->arrived |= 1u << lane;
  meeting->payload[lane] = payload;
  complete(warp, i / 32);
  suspend(what, where);
}

// ---- Shared memory and asynchronous copies
// ----------------------------------------------------------------

void* Engine::allocate_shared(size_t bytes) {
  char* p = arena_ + arena_used_ + kRedZone;
  arena_used_ += kRedZone + (bytes + 127) / 128 * 128 + kRedZone;
  if (arena_used_ > kSharedLimit + 64 * kRedZone)
    abort_launch("more than 227 KiB of shared memory in one block");
  unpoison(p, bytes);
  if (EMU_ASAN)
    std::memset(p, 0xff, bytes);
  else
    std::memset(
        p - kRedZone, 0xff,
        static_cast<size_t>(arena_ + arena_used_ - (p - kRedZone)));  // a stray read finds NaN, too
  return p;
}

void Engine::finish_copies(Lane& lane, unsigned below_group) {
  size_t kept = 0;
  for (const AsyncCopy& c : lane.copies) {
    if (c.group >= below_group) {
      lane.copies[kept++] = c;
      continue;
    }
    std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
    std::memset(c.to + c.valid, 0, static_cast<size_t>(c.bytes - c.valid));
    touch(c.from, static_cast<size_t>(c.valid), Access::kRead);
    touch(c.to, static_cast<size_t>(c.bytes), Access::kWrite);
  }
  lane.copies.resize(kept);
}

}  // namespace

// ---- Interface
// ------------------------------------------------------------------------------------------

Options& options() { return engine().options; }
Stats& stats() { return engine().stats; }
const std::string& failure_text() { return engine().failure; }
void report_failure(const std::string& message) {
  engine().failure.clear();
  engine().note(message);
}
std::string take_report() { return std::exchange(engine().report, {}); }
unsigned lane_id() { return engine().linear() % 32; }
void report(const std::string& message) { engine().note(message); }
void fail(const std::string& message) { engine().abort_launch(message); }
const Clock& race_clock() { return engine().clock; }
int running_thread() { return engine().in_kernel() ? static_cast<int>(engine().linear()) : -1; }
bool on_fiber_stack(const void* p) { return engine().owns_stack(p); }
bool in_shared_arena(const void* p, size_t& offset) { return engine().owns_shared(p, offset); }

void sync_block(Where where) {
  Engine& e = engine();
  Barrier& b = e.barriers[0];
  if (!b.waiting.empty() && !same_place(b.where, where))
    fail("threads of one block wait in different __syncthreads: lines " +
         std::to_string(b.where.line) + " and " + std::to_string(where.line));
  e.wait_barrier(b, e.threads, "__syncthreads", where);
}
void sync_named(int id, unsigned threads, Where where) {
  engine().wait_barrier(engine().barriers[id], threads, "bar.sync", where);
}
void warp_collective(uint32_t mask, const char* what, void* payload, Combine combine, Where where) {
  engine().meet(mask, what, payload, combine, where);
}
void sync_warp(uint32_t mask, Where where) {
  engine().meet(mask, "__syncwarp", nullptr, nullptr, where);
}

void* shared_static(SharedSlot& slot, size_t bytes) {
  Engine& e = engine();
  if (slot.block != e.block_serial) slot = {e.block_serial, e.allocate_shared(bytes)};
  return slot.memory;
}
void copy_bytes(void* to, const void* from, size_t n) { std::memcpy(to, from, n); }
void* shared_dynamic() { return engine().dynamic_shared; }

void cp_async(void* shared, const void* global, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(shared) % static_cast<uintptr_t>(bytes) ||
      (valid && reinterpret_cast<uintptr_t>(global) % static_cast<uintptr_t>(bytes)))
    fail("cp.async with a misaligned address");
  Lane& lane = engine().self();
  // Between issue and wait the destination holds neither the old nor the new data: poison it now,
  // fill it as late as possible. Shows a missing wait as well as a buffer overwritten while others
  // still read it.
  touch(shared, static_cast<size_t>(bytes), Access::kPending);
  std::memset(shared, 0xff, static_cast<size_t>(bytes));
  lane.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid,
                         lane.copy_group});
}
void cp_async_commit() { ++engine().self().copy_group; }
void cp_async_wait(unsigned pending_groups) {
  Lane& lane = engine().self();
  if (pending_groups == ~0u)
    engine().finish_copies(lane, ~0u);
  else if (lane.copy_group > pending_groups)
    engine().finish_copies(lane, lane.copy_group - pending_groups);
}

cudaError_t submit_launch(const Launch& launch) {
  if (cudaError_t e = engine().check(launch)) return e;
  // 16-byte units, the strictest alignment of a parameter.
  struct alignas(16) Unit {
    uintptr_t words[2];
  };
  auto call = std::make_shared<std::vector<Unit>>((launch.call_bytes + 15) / 16);
  std::memcpy(call->data(), launch.call, launch.call_bytes);
  std::vector<uintptr_t> words(launch.call_bytes / sizeof(uintptr_t));
  std::memcpy(words.data(), launch.call, words.size() * sizeof(uintptr_t));
  return submit(launch.stream,
                {Work::kKernel, launch.kernel,
                 [launch, call] { return engine().run(launch, call->data()); }, std::move(words)});
}

}  // namespace emu

cudaError_t emuFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > (227 << 10))
    return emu::set_last_error(cudaErrorInvalidValue);
  emu::engine().shared_opt_in[kernel] = value;
  return cudaSuccess;
}
