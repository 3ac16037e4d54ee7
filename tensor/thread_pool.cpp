// The pool. Workers spin for a few tens of microseconds after a run, since a training step is a
// train of short runs, and then sleep in the kernel. A worker joins a run if it is still open when
// it wakes; one that comes late is not waited for, so more threads than cores do little harm.
#include "tensor/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tensor/check.h"

namespace graft {
namespace {

constexpr uint32_t kOpen = 1u << 31;  // of state: workers may join; the other bits count who has
constexpr auto kSpin = std::chrono::microseconds(30);

int affinity_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

// Cores that quota/period amounts to, rounded up; 0 where there is no limit or no such file.
int quota_v2(const std::string& folder) {
  std::ifstream in(folder + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(in >> quota >> period) || quota == "max" || period <= 0) return 0;
  return std::max(1, int((std::stod(quota) + period - 1) / period));
}

int quota_v1(const std::string& folder) {
  std::ifstream quota_in(folder + "/cpu.cfs_quota_us"), period_in(folder + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  if (!(quota_in >> quota) || !(period_in >> period) || quota <= 0 || period <= 0) return 0;
  return std::max(1, int((quota + period - 1) / period));
}

// The smallest limit on the way from this process's cgroup to the root.
int cgroup_cpus() {
  int limit = 0;
  const auto take = [&](int cpus) {
    if (cpus > 0) limit = limit == 0 ? cpus : std::min(limit, cpus);
  };
  std::ifstream in("/proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    for (std::string path = line.substr(second + 1);; path.erase(path.rfind('/'))) {
      take(v2 ? quota_v2(root + path) : quota_v1(root + path));
      if (path.find('/') == std::string::npos) break;
    }
  }
  return limit;
}

int available_cpus() {
  const int affinity = affinity_cpus(), quota = cgroup_cpus();
  return quota > 0 ? std::min(affinity, quota) : affinity;
}

inline void relax() { __builtin_ia32_pause(); }

// Waits until ready(): spins for `spin`, then calls sleep() between looks.
template <class Ready, class Sleep>
void wait_until(std::chrono::microseconds spin, Ready ready, Sleep sleep) {
  if (spin.count() > 0) {
    const auto end = std::chrono::steady_clock::now() + spin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (ready()) return;
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
  }
  while (!ready()) sleep();
}

}  // namespace

struct ThreadPool::Impl {
  int num_threads = 1;
  std::chrono::microseconds spin{0};
  std::vector<std::thread> workers;

  // The run. Written by the caller while nobody is joined, read by those who joined.
  void (*body)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  int64_t pieces = 0;
  std::exception_ptr error;
  std::mutex error_mutex;

  alignas(64) std::atomic<uint32_t> epoch{0};  // counts runs; what sleeping workers wait on
  alignas(64) std::atomic<uint32_t> state{0};  // kOpen | number of workers inside
  alignas(64) std::atomic<int64_t> next{0};    // the next piece to hand out
  std::atomic<bool> stop{false};

  void work(int thread) {
    try {
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;)
        body(context, piece, thread);
    } catch (...) {
      next.store(pieces, std::memory_order_relaxed);  // the pieces left are not started
      std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }

  bool join() {
    uint32_t s = state.load(std::memory_order_acquire);
    while (s & kOpen)
      if (state.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  void leave() {
    if (state.fetch_sub(1, std::memory_order_acq_rel) == 1) state.notify_all();
  }

  void worker(int thread) {
    uint32_t seen = 0;
    while (true) {
      wait_until(
          spin, [&] { return epoch.load(std::memory_order_acquire) != seen; },
          [&] { epoch.wait(seen, std::memory_order_acquire); });
      seen = epoch.load(std::memory_order_acquire);
      if (stop.load()) return;
      if (!join()) continue;
      work(thread);
      leave();
    }
  }

  void wake_workers() {
    epoch.fetch_add(1, std::memory_order_release);
    epoch.notify_all();
  }
};

ThreadPool::ThreadPool(int num_threads) : impl_(std::make_unique<Impl>()) {
  CHECK(num_threads >= 1 && num_threads <= 1024, "thread pool: ", num_threads,
        " threads, wanted 1 to 1024");
  impl_->num_threads = num_threads;
  if (num_threads <= affinity_cpus()) impl_->spin = kSpin;
  for (int t = 1; t < num_threads; ++t)
    impl_->workers.emplace_back([impl = impl_.get(), t] { impl->worker(t); });
}

ThreadPool::~ThreadPool() {
  impl_->stop.store(true);
  impl_->wake_workers();
  for (std::thread& worker : impl_->workers) worker.join();
}

int ThreadPool::num_threads() const { return impl_->num_threads; }

void ThreadPool::run_erased(int64_t pieces, void (*body)(void*, int64_t, int), void* context) {
  Impl& pool = *impl_;
  if (pool.num_threads == 1 || pieces <= 1) {
    for (int64_t piece = 0; piece < pieces; ++piece) body(context, piece, 0);
    return;
  }
  pool.body = body;
  pool.context = context;
  pool.pieces = pieces;
  pool.next.store(0, std::memory_order_relaxed);
  pool.state.store(kOpen, std::memory_order_release);
  pool.wake_workers();
  pool.work(0);
  pool.state.fetch_and(~kOpen, std::memory_order_acq_rel);  // nobody joins any more
  const auto inside = [&] { return pool.state.load(std::memory_order_acquire); };
  wait_until(
      pool.spin, [&] { return inside() == 0; },
      [&] {
        if (const uint32_t s = inside()) pool.state.wait(s, std::memory_order_acquire);
      });
  if (pool.error) std::rethrow_exception(std::exchange(pool.error, nullptr));
}

namespace {

std::unique_ptr<ThreadPool>& pool_slot() {
  static std::unique_ptr<ThreadPool> pool;
  return pool;
}

}  // namespace

ThreadPool& thread_pool() {
  if (!pool_slot()) set_num_threads(0);
  return *pool_slot();
}

void set_num_threads(int num_threads) {
  CHECK(num_threads >= 0, "threads: ", num_threads, ", wanted 1 or more, or 0 for all cores");
  const int wanted = num_threads == 0 ? available_cpus() : num_threads;
  if (!pool_slot() || pool_slot()->num_threads() != wanted)
    pool_slot() = std::make_unique<ThreadPool>(wanted);
}

}  // namespace graft
