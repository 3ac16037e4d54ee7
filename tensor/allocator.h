// One caching allocator per device, with totals by scope. Memory that is given back is kept and
// handed out again, so that after the first training step a step asks the system for nothing: on
// the CPU page faults are what eager frameworks pay most for (PEFT: a third of its step).
//
// Thread rules: allocate and free may be called from any thread; a mutex guards the lists.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

#include "tensor/check.h"
#include "tensor/device.h"

namespace graft {

// What an allocation is for; the memory plan (graft info) and the out-of-memory table list these.
enum class Scope : uint8_t { Weights, Adapters, Optimizer, Activations, Scratch };
constexpr int kNumScopes = 5;
std::string_view scope_name(Scope scope);

// How a device hands out raw memory. system_allocate returns nullptr when there is none left.
class RawMemory {
 public:
  virtual ~RawMemory() = default;
  virtual void* system_allocate(size_t bytes) = 0;
  virtual void system_free(void* pointer, size_t bytes) = 0;
  // Whether every block is to be asked for by its exact size and given back at once, so that a
  // memory checker sees the end of each tensor. For tests.
  virtual bool exact() const { return false; }
  virtual std::string describe() const { return "memory"; }  // for the out-of-memory message
  virtual bool is_gpu() const { return false; }
};

// A GPU has no memory left: a first line, the table of totals, and what to change. (On the CPU the
// same text is an Error like any other, said in one line.)
struct OutOfMemory : Error {
  using Error::Error;
};

struct MemoryStats {
  std::array<int64_t, kNumScopes> live{};  // bytes handed out now, rounded up to blocks
  std::array<int64_t, kNumScopes> peak{};  // the most that was live in each scope since reset_peak
  int64_t live_total = 0;
  int64_t peak_total = 0;  // the most that was live at once: not the sum of the scopes' peaks
  int64_t reserved = 0;    // bytes held from the system, live and cached
  int64_t reserved_peak = 0;
  int64_t system_calls = 0;  // how often the system was asked; must not grow after the first step
};

class Allocator {
 public:
  explicit Allocator(RawMemory& memory) : memory_(memory) {}
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  // At least `bytes` bytes, aligned to 64, contents unspecified. Throws OutOfMemory, or Error.
  void* allocate(int64_t bytes, Scope scope);
  // Bytes must be what was asked for.
  void free(void* pointer, int64_t bytes, Scope scope);
  void release_cached();  // give every cached block back to the system, but those of the pool

  // While set, blocks come from a pool that nobody else gets blocks from; they go back to it
  // whenever they are freed, and it gives none back to the system. So the addresses that a captured
  // step has seen remain its own between its launches. Steps that run one after the other share
  // one pool: what they leave there is of no use to anybody.
  bool set_pooled(bool pooled);  // what it was
  int64_t pooled_live() const;   // bytes of the pool handed out now
  void release_pool();           // its blocks are cached as others are; no captured step is left
  void reset_peak();
  MemoryStats stats() const;
  std::string table() const;  // one line per scope, for people

 private:
  struct Block {
    int64_t size;  // as it is counted
    size_t bytes;  // as the system gave it
    bool pooled;
  };
  using Cache = std::multimap<int64_t, void*>;  // block size -> block

  void* take(Cache& cache, int64_t size, size_t bytes);  // nullptr if none fits
  void* ask_system(size_t bytes);
  void release(Cache& cache);
  [[noreturn]] void fail_out_of_memory(int64_t size, Scope scope);

  RawMemory& memory_;
  mutable std::mutex mutex_;
  Cache cached_, pool_;
  std::unordered_map<void*, Block> blocks_;  // every block, live or cached
  bool pooled_ = false;
  int64_t pooled_live_ = 0;
  MemoryStats stats_;
};

// While it lives, blocks come from the pool, or do not.
class SetPooled {
 public:
  SetPooled(Allocator& allocator, bool pooled)
      : allocator_(allocator), before_(allocator.set_pooled(pooled)) {}
  ~SetPooled() { allocator_.set_pooled(before_); }
  SetPooled(const SetPooled&) = delete;
  SetPooled& operator=(const SetPooled&) = delete;

 private:
  Allocator& allocator_;
  bool before_;
};

Allocator& allocator_of(Device device);  // one per device, for the life of the process

}  // namespace graft
