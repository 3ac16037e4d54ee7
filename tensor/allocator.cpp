#include "tensor/allocator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "tensor/check.h"

namespace graft {

RawMemory& cuda_memory();  // cuda/cuda_backend.h; tensor/ includes nothing of cuda/

namespace {

constexpr int64_t kSmall = 64;       // granularity of small blocks, and the alignment of all
constexpr int64_t kLarge = 1 << 20;  // from here on: pages
constexpr int64_t kPage = 4096;
constexpr int64_t kHugePage = 2 << 20;

// Blocks come in sizes 1/8 of a power of two apart, so that rows of almost the same length reuse
// the same block and at most 12.5 % of one is unused.
int64_t block_size(int64_t bytes) {
  bytes = std::max(bytes, kSmall);
  int64_t power = kSmall;
  while (power * 2 <= bytes) power *= 2;
  const int64_t step = std::max(power / 8, bytes >= kLarge ? kPage : kSmall);
  return (bytes + step - 1) / step * step;
}

// Anonymous pages, huge ones where the system has them: a 1 GB activation is 512 faults, not
// 262,144.
class CpuMemory : public RawMemory {
 public:
  void* system_allocate(size_t bytes) override {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    if (int64_t(bytes) >= kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
    return p;
  }
  void system_free(void* pointer, size_t bytes) override { munmap(pointer, bytes); }
};

// Address space alone: nothing may be read or written there.
class MetaMemory : public RawMemory {
 public:
  void* system_allocate(size_t bytes) override {
    void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
  }
  void system_free(void* pointer, size_t bytes) override { munmap(pointer, bytes); }
};

std::string megabytes(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", double(bytes) / (1 << 20));
  return text;
}

}  // namespace

std::string_view scope_name(Scope scope) {
  switch (scope) {
    case Scope::Weights:
      return "weights";
    case Scope::Adapters:
      return "adapters";
    case Scope::Optimizer:
      return "optimizer";
    case Scope::Activations:
      return "activations";
    case Scope::Scratch:
      return "scratch";
  }
  fail("scope: unknown value ", int(scope));
}

Allocator::~Allocator() { release_cached(); }

// The smallest block that fits and wastes at most an eighth; a memory checker wants its own size.
void* Allocator::take(Cache& cache, int64_t size, size_t bytes) {
  for (auto found = cache.lower_bound(size);
       found != cache.end() && found->first <= size + size / 8; ++found) {
    void* pointer = found->second;
    const size_t has = blocks_.at(pointer).bytes;
    if (has < bytes || (memory_.exact() && has != bytes)) continue;
    cache.erase(found);
    return pointer;
  }
  return nullptr;
}

void* Allocator::ask_system(size_t bytes) {
  if (void* pointer = memory_.system_allocate(bytes)) return pointer;
  release(cached_);  // what is cached may be just what is missing
  return memory_.system_allocate(bytes);
}

void* Allocator::allocate(int64_t bytes, Scope scope) {
  CHECK(bytes >= 0, "allocate: ", bytes, " bytes");
  const int64_t size = block_size(bytes);
  const size_t mapped = memory_.exact() ? size_t(std::max<int64_t>(bytes, 1))
                                        : size_t((size + kPage - 1) / kPage * kPage);
  std::unique_lock lock(mutex_);
  void* pointer = take(pooled_ ? pool_ : cached_, size, mapped);
  if (!pointer) {
    pointer = ask_system(mapped);
    if (!pointer) {
      lock.unlock();
      fail_out_of_memory(size, scope);
    }
    blocks_[pointer] = {size, mapped, pooled_};
    stats_.reserved += size;
    stats_.reserved_peak = std::max(stats_.reserved_peak, stats_.reserved);
    ++stats_.system_calls;
  }
  // Counted as asked for, not as found: totals must not depend on what happened to be cached.
  const int i = int(scope);
  if (pooled_) pooled_live_ += size;
  stats_.live[i] += size;
  stats_.live_total += size;
  stats_.peak[i] = std::max(stats_.peak[i], stats_.live[i]);
  stats_.peak_total = std::max(stats_.peak_total, stats_.live_total);
  return pointer;
}

void Allocator::free(void* pointer, int64_t bytes, Scope scope) {
  std::lock_guard lock(mutex_);
  const auto found = blocks_.find(pointer);
  CHECK(found != blocks_.end() && found->second.size >= bytes,
        "free: not a block of this allocator");
  const Block block = found->second;
  stats_.live[int(scope)] -= block_size(bytes);
  stats_.live_total -= block_size(bytes);
  if (block.pooled) {
    pooled_live_ -= block_size(bytes);
    pool_.emplace(block.size, pointer);
    return;
  }
  cached_.emplace(block.size, pointer);
  if (memory_.exact()) release(cached_);
}

void Allocator::release(Cache& cache) {
  for (auto& [size, pointer] : cache) {
    stats_.reserved -= size;
    memory_.system_free(pointer, blocks_.at(pointer).bytes);
    blocks_.erase(pointer);
  }
  cache.clear();
}

void Allocator::release_cached() {
  std::lock_guard lock(mutex_);
  release(cached_);
}

bool Allocator::set_pooled(bool pooled) {
  std::lock_guard lock(mutex_);
  return std::exchange(pooled_, pooled);
}

int64_t Allocator::pooled_live() const {
  std::lock_guard lock(mutex_);
  return pooled_live_;
}

void Allocator::release_pool() {
  std::lock_guard lock(mutex_);
  for (auto& [pointer, block] : blocks_) block.pooled = false;
  pooled_live_ = 0;
  cached_.merge(pool_);
  if (memory_.exact()) release(cached_);
}

namespace {
// What to change where there is no room for something of this scope.
std::string_view advice(Scope scope) {
  switch (scope) {
    case Scope::Weights:
      return "the weights do not fit: take a smaller model, or dtype: bfloat16";
    case Scope::Adapters:
    case Scope::Optimizer:
      return "what is trained does not fit: lower r, name fewer target_modules, take optim: "
             "adamw_8bit, or dtype: bfloat16";
    default:
      return "lower per_device_train_batch_size or max_seq_length (in generation the prompt or "
             "max_new_tokens), set gradient_checkpointing, or take dtype: bfloat16";
  }
}
}  // namespace

void Allocator::fail_out_of_memory(int64_t size, Scope scope) {
  const std::string text =
      concat("out of memory: ", megabytes(size), " more for ", scope_name(scope), "; ",
             memory_.describe(), " holds\n", table(), advice(scope));
  if (memory_.is_gpu()) throw OutOfMemory(text);
  fail(text);
}

void Allocator::reset_peak() {
  std::lock_guard lock(mutex_);
  stats_.peak = stats_.live;
  stats_.peak_total = stats_.live_total;
  stats_.reserved_peak = stats_.reserved;
}

MemoryStats Allocator::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

std::string Allocator::table() const {
  const MemoryStats now = stats();
  std::string text;
  for (int i = 0; i < kNumScopes; ++i)
    text += concat("  ", scope_name(Scope(i)), ": ", megabytes(now.live[i]), " (peak ",
                   megabytes(now.peak[i]), ")\n");
  return text + concat("  total: ", megabytes(now.live_total), " (peak ", megabytes(now.peak_total),
                       ", held from the system ", megabytes(now.reserved), ")\n");
}

Allocator& allocator_of(Device device) {
  // Never destroyed: tensors with static storage duration may outlive any order of destructors.
  static CpuMemory& cpu_memory = *new CpuMemory;
  static MetaMemory& meta_memory = *new MetaMemory;
  static Allocator& cpu = *new Allocator(cpu_memory);
  static Allocator& meta = *new Allocator(meta_memory);
  switch (device) {
    case Device::CPU:
      return cpu;
    case Device::Meta:
      return meta;
    case Device::CUDA: {
      static Allocator& cuda = *new Allocator(cuda_memory());
      return cuda;
    }
  }
  fail("allocator: unknown device ", int(device));
}

}  // namespace graft
