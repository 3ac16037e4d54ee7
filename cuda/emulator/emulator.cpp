#include "cuda/emulator/emulator.h"

#include <execinfo.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>

#include "cuda/emulator/engine.h"
#include "cuda/emulator/streams.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Engine& engine() {
  static Engine& e = *new Engine;  // never destroyed: its fibers have nothing to unwind at exit
  return e;
}

Engine::Engine() {
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

// ---- Fibers
// ---------------------------------------------------------------------------------------------

Fiber& Engine::make_fiber() {
  // One slab for all stacks (the race checker skips it with one comparison), a guard page below
  // each.
  const size_t index = fibers_.size();
  Fiber& fiber = fibers_.emplace_back();
  char* base = stacks_ + index * kStackBytes;
  mprotect(base, kPage, PROT_NONE);
  fiber.stack_bottom = base + kPage;
  struct SlabStack {
    bc::stack_context stack;
    bc::stack_context allocate() { return stack; }
    void deallocate(bc::stack_context&) {}
  } allocator;
  // Staggered tops: at equal offsets within their pages the stacks would fight for the same cache
  // sets.
  const size_t stagger = index % 61 * 320;
  allocator.stack.sp = base + kStackBytes - stagger;
  allocator.stack.size = kStackBytes - kPage - stagger;
  fiber.context =
      bc::fiber(std::allocator_arg, std::move(allocator), [this, &fiber](bc::fiber&& from) {
        arrive(std::move(from), nullptr);
        run_threads(fiber);
        return std::move(scheduler_.context);  // never
      });
  return fiber;
}

// The life of a fiber: threads, of this block and of all later ones.
void Engine::run_threads(Fiber& fiber) {
  for (;;) {
    current_->fiber = &fiber;
    try {
      body_(context_);
      // PTX does not say what becomes of copies under way when their thread ends.
      if (!current_->copies.empty())
        abort_launch("a thread ends without the wait for its cp.async copy at " +
                     place_in_kernel({current_->copies[0].issued}, kernel_));
    } catch (const LaneAborted&) {
    }
    end_thread();
    Lane* lane = next();
    if (lane && !lane->fiber) {
      take_over(lane);
      continue;
    }
    idle_.push_back(&fiber);
    switch_to(lane);
  }
}

void Engine::end_thread() {
  const unsigned i = linear();
  current_->done = true;
  current_->fiber = nullptr;
  --live_;
  if (failed_) return;
  Warp& warp = warps_[i / 32];
  warp.live &= ~(1u << i % 32);
  try {
    complete(warp, i / 32);  // the others no longer wait for it
  } catch (const LaneAborted&) {
  }
}

// The thread that goes on, or null if none can.
Lane* Engine::next() {
  if (failed_ || ready_.empty()) return nullptr;
  return &lanes_[ready_.pop(options.order, random(), threads)];
}

void Engine::take_over(Lane* lane) {
  current_ = lane;
  if (lane) threadIdx = lane->index;
}

// Leaves the running fiber for that of `to`, or for the scheduler's; returns when somebody comes
// back.
void Engine::switch_to(Lane* to) {
  if (to && !to->fiber) {
    if (idle_.empty()) idle_.push_back(&make_fiber());
    to->fiber = idle_.back();
    idle_.pop_back();
  }
  Fiber *self = running_, *target = to ? to->fiber : &scheduler_;
  take_over(to);
  ++stats.switches;
  left_ = self;
  running_ = target;
  if (to)
    start_switch(&self->fake_stack, target->stack_bottom, kStackBytes - kPage);
  else
    start_switch(&self->fake_stack, scheduler_stack_, scheduler_stack_bytes_);
  arrive(std::move(target->context).resume(), self->fake_stack);
}

// On the stack that was switched to: keeps what the one that was left needs to go on.
void Engine::arrive(bc::fiber&& from, void* fake_stack) {
  const void* bottom = nullptr;
  size_t bytes = 0;
  finish_switch(fake_stack, &bottom, &bytes);
  if (left_ == &scheduler_) scheduler_stack_ = bottom, scheduler_stack_bytes_ = bytes;
  left_->context = std::move(from);
}

// Gives up the processor until some other thread puts this one back into the ready set.
void Engine::suspend(const char* what, Where where) {
  Lane& lane = *current_;
  lane.waits_for = what;
  lane.where = where;
  if (Lane* to = next(); to != &lane) switch_to(to);
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
  // Every launch in an order of its own, or what is run twice to be compared would run the same
  // way.
  rng_ = (options.seed + 0x632be59bd9b4e019ull * launches_++) * 0x9e3779b97f4a7c15ull | 1;
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
  combining_ = {};
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
    lane.fiber = nullptr;
    lane.copies.clear();
    lane.copy_group = 0;
    warps_[i / 32].live |= 1u << i % 32;
    ready_.insert(i);
  }
  for (live_ = threads; live_ > 0;) {
    if (Lane* lane = next()) {
      switch_to(lane);  // comes back when nobody can go on
      continue;
    }
    if (!failed_) note(describe_waiters());
    failed_ = true;
    ready_.clear();  // unwind every suspended thread
    for (unsigned i = 0; i < threads; ++i)
      if (lanes_[i].fiber) switch_to(&lanes_[i]);
    break;
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
      ++count[std::string(l.waits_for) + " at " + describe(l.where)];
  }
  std::string text =
      "deadlock: " + std::to_string(exited) + " of " + std::to_string(threads) + " threads exited";
  for (auto& [what, n] : count) text += ", " + std::to_string(n) + " wait in " + what;
  return text;
}

// "kernel sum_kernel<4> (sum.cu:17), block (0,0,0), thread (3,0,0): ", as far as there are such.
std::string Engine::describe_kernel() const {
  const auto triple = [](auto v) {
    return " (" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  std::string text;
  if (kernel_) text = "kernel " + kernel_name(kernel_);
  if (in_block_) text += ", block" + triple(blockIdx);
  if (current_) text += ", thread" + triple(threadIdx);
  return text.empty() ? text : text + ": ";
}

void Engine::note(const std::string& message, bool place) {
  std::string line = describe_kernel() + message;
  if (place && current_) {
    void* pcs[64];
    const int n = backtrace(pcs, 64);
    std::string at = place_in_kernel(std::vector<void*>(pcs, pcs + n), kernel_);
    // A thread that has left the kernel ends the others' wait, and finds their fault.
    if (at.empty() && combining_.line) at = describe(combining_);
    if (!at.empty()) line += ", at " + at;
  }
  if (failure.empty()) failure = line;
  line = "emulator: " + line + "\n";
  std::fputs(line.c_str(), stderr);
  report += line;
}

// ---- Interface
// ------------------------------------------------------------------------------------------

Options& options() { return engine().options; }
Checks checks() { return EMU_ASAN ? Checks::kMemory : on_access ? Checks::kRaces : Checks::kNone; }
Stats& stats() { return engine().stats; }
const std::string& failure_text() { return engine().failure; }
std::string running_kernel() { return engine().describe_kernel(); }
void report_failure(const std::string& message) {
  engine().failure.clear();
  engine().note(message);
}
std::string take_report() { return std::exchange(engine().report, {}); }
unsigned lane_id() { return engine().linear() % 32; }
void report(const std::string& message) { engine().note(message); }
void fail(const std::string& message) { engine().abort_launch(message); }
int running_thread() { return engine().in_kernel() ? static_cast<int>(engine().linear()) : -1; }

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
