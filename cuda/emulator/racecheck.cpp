// Race, initialisation and bounds checker for kernels, exact for the run at hand.
//
// The kernels are compiled with -fsanitize=thread, which makes the compiler announce every load and
// store to functions named __tsan_*; this file supplies those functions instead of
// ThreadSanitizer's own library (so link *without* -fsanitize=thread). Each byte of device and
// shared memory remembers its last write and its last reads; two accesses, one of them a write, are
// a race unless the CUDA execution model orders them: same thread, a __syncthreads between, a
// __syncwarp between within one warp, or an earlier launch. Bytes that have only been accessed
// together, four or two of them, share one memory.
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include "cuda/emulator/engine.h"

extern "C" char __executable_start, end;

namespace {

using emu::Access;

// Who touched a cell, where and when: two words, so that it is made, copied and compared in
// registers. Zero: nobody.
struct Stamp {
  uint64_t place = 0;  // block, and above it the pc as an offset into the program
  uint64_t time = 0;   // epoch, warp_epoch, thread and flags, 16 bits each

  enum : uint64_t { kUsed = 1ull << 48, kAtomic = 2ull << 48, kPending = 4ull << 48 };
  uint32_t block() const { return uint32_t(place); }
  uint32_t pc() const { return uint32_t(place >> 32); }
  uint16_t epoch() const { return uint16_t(time); }
  uint16_t warp_epoch() const { return uint16_t(time >> 16); }
  uint16_t thread() const { return uint16_t(time >> 32); }
  bool used() const { return time & kUsed; }
  bool atomic() const { return time & kAtomic; }
  bool pending() const { return time & kPending; }  // an unfinished cp.async
};
// The last write and three reads, enough to be exact: if some past read is unordered with a write,
// then so is the latest, or the latest by another thread than that, or the latest by another warp
// than that.
struct Cell {
  Stamp write, read, other_thread, other_warp;
};
static_assert(sizeof(Cell) == 64);  // a line of the cache

// The memory of a stretch of bytes. The four bytes of a word share the cell of the first until some
// access takes a part of them; then each half has one, or each byte.
struct History {
  size_t words = 0;
  Cell* cells = nullptr;        // those of all first bytes, of all second bytes, ...
  uint8_t* halvings = nullptr;  // one for each word: 0, 1 or 2

  Cell& cell(size_t offset) const { return cells[offset % 4 * words + offset / 4]; }
};

struct Region {
  char* begin;
  size_t bytes;
  History history;
  bool* initialised;
};

template <class T>
T* reserve(size_t n) {  // pages appear when touched, zeroed
  return static_cast<T*>(mmap(nullptr, n * sizeof(T), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

// Histories of freed memory, by the bytes that they serve. What they remember is of earlier
// launches, which are over, so the next owner need not forget it; fresh pages cost more.
std::multimap<size_t, History>& spare() {
  static auto& m = *new std::multimap<size_t, History>;
  return m;
}
size_t capacity(size_t bytes) { return std::bit_ceil(std::max<size_t>(bytes, 4096)); }
History take_history(size_t bytes) {
  const size_t n = capacity(bytes);
  if (auto it = spare().find(n); it != spare().end()) return spare().extract(it).mapped();
  return {n / 4, reserve<Cell>(n), reserve<uint8_t>(n / 4)};
}

// Splits the word at `offset` until it remembers parts of `grain` bytes; says of how many it does.
size_t refine(const History& h, size_t offset, size_t grain) {
  const size_t word = offset / 4 * 4;
  uint8_t& halvings = h.halvings[offset / 4];
  for (; 4u >> halvings > grain; ++halvings) {
    const size_t half = 2u >> halvings;
    for (size_t at = half; at < 4; at += 2 * half) h.cell(word + at) = h.cell(word + at - half);
  }
  return 4u >> halvings;
}

std::map<char*, Region>& regions() {
  static auto& m = *new std::map<char*, Region>;
  return m;
}

size_t changes = 1;  // of the regions: the number of them alone misses a free and a new one
Region* find(const void* p) {
  static Region* last = nullptr;
  static size_t generation = 0;
  auto inside = [p](const Region& r) {
    return static_cast<size_t>(static_cast<const char*>(p) - r.begin) < r.bytes;
  };
  if (generation != changes) last = nullptr, generation = changes;
  if (last && inside(*last)) return last;
  auto it = regions().upper_bound(static_cast<char*>(const_cast<void*>(p)));
  if (it == regions().begin() || !inside((--it)->second)) return nullptr;
  return last = &it->second;
}

std::string describe(uint32_t pc) {
  return emu::place_in_kernel({&__executable_start + pc}, nullptr);
}

void report_once(const char* what, uint32_t pc1, uint32_t pc2, const std::string& detail) {
  static std::set<std::pair<uint64_t, uint64_t>> seen;
  if (!seen.insert({emu::engine().clock.launch_first_block, uint64_t{pc1} << 32 | pc2}).second)
    return;
  emu::report(std::string(what) + " at " + describe(pc2) + (pc1 ? " and " + describe(pc1) : "") +
              detail);
}

// Whether CUDA orders an earlier access before this one.
inline bool ordered(const Stamp& first, const Stamp& now, bool shared, uint32_t launch_block) {
  if (!first.used()) return true;
  if (first.block() != now.block()) return shared || first.block() < launch_block;
  return first.thread() == now.thread() || first.epoch() < now.epoch() ||
         (first.thread() / 32 == now.thread() / 32 && first.warp_epoch() < now.warp_epoch());
}

[[gnu::cold, gnu::noinline]] void report_race(const char* what, const Stamp& first,
                                              const Stamp& now, bool shared) {
  report_once(what, first.pc(), now.pc(),
              std::string(shared ? " in shared memory" : " in device memory") + ", threads " +
                  std::to_string(first.thread()) + " and " + std::to_string(now.thread()) +
                  (first.block() == now.block() ? "" : " of different blocks"));
}

[[gnu::cold, gnu::noinline]] void report_unwritten(const Stamp& now, bool shared) {
  report_once("read of uninitialised memory", 0, now.pc(),
              shared ? " in shared memory" : " in device memory");
}

inline bool all(const bool* flags, size_t n) {
  if (n == 4) {
    uint32_t four;
    std::memcpy(&four, flags, 4);
    return four == 0x01010101;
  }
  return flags[0] && flags[n - 1];  // one or two
}

// An access to all the bytes of one cell; `initialised` is null in shared memory.
template <bool kShared>
inline void check_part(Cell& c, bool* initialised, size_t bytes, bool read, const Stamp& now,
                       uint32_t launch_block) {
  auto conflict = [&](const char* what, const Stamp& first) {
    if (!ordered(first, now, kShared, launch_block) && !(first.atomic() && now.atomic()))
        [[unlikely]]
      report_race(what, first, now, kShared);
  };
  if (!read) {
    conflict("race between two writes", c.write);
    for (const Stamp* one : {&c.read, &c.other_thread, &c.other_warp})
      conflict("race between a read and a write", *one);
    c.write = now;
    if constexpr (!kShared)
      for (size_t i = 0; i < bytes; ++i) initialised[i] = true;
    return;
  }
  const bool same_block = c.write.block() == now.block();
  if (kShared ? !c.write.used() || !same_block : !all(initialised, bytes)) [[unlikely]]
    report_unwritten(now, kShared);
  else if (c.write.pending() && same_block) [[unlikely]]
    report_once("read of a cp.async destination before its wait", c.write.pc(), now.pc(), "");
  conflict("race between a write and a read", c.write);
  if (c.read.used()) {
    const bool other_block = c.read.block() != now.block();
    if (other_block || c.read.thread() != now.thread()) c.other_thread = c.read;
    if (other_block || c.read.thread() / 32 != now.thread() / 32) c.other_warp = c.read;
  }
  c.read = now;
}

// What lies in one word is checked in the parts that the access starts and ends between.
template <bool kShared>
inline void check_words(const History& history, bool* initialised, size_t offset, size_t bytes,
                        bool read, const Stamp& now, uint32_t launch_block) {
  for (const size_t last = offset + bytes; offset < last;) {
    const size_t n = std::min(4 - offset % 4, last - offset);
    const size_t grain = refine(history, offset, (offset | n) & -(offset | n) & 7);
    for (const size_t stop = offset + n; offset < stop; offset += grain)
      check_part<kShared>(history.cell(offset), kShared ? nullptr : initialised + offset, grain,
                          read, now, launch_block);
  }
}

void check(const void* p, size_t bytes, Access kind, int thread, const void* pc_pointer) {
  static bool inside = false;  // inline library code of an instrumented object may be ours, too
  if (inside) return;
  static emu::Engine& engine = emu::engine();
  if (!engine.in_kernel() || engine.owns_stack(p)) return;  // host code, or a local variable
  struct Guard {
    Guard() { inside = true; }
    ~Guard() { inside = false; }
  } guard;
  if (thread < 0) thread = int(engine.linear());
  ++engine.stats.accesses;
  const emu::Clock& clock = engine.clock;
  const uint64_t pc = uint64_t(static_cast<const char*>(pc_pointer) - &__executable_start);
  const uint64_t flags = Stamp::kUsed | (kind == Access::kAtomic    ? uint64_t(Stamp::kAtomic)
                                         : kind == Access::kPending ? uint64_t(Stamp::kPending)
                                                                    : 0);
  const Stamp now{uint32_t(clock.block) | pc << 32,
                  uint16_t(clock.block_epoch) |
                      uint64_t(uint16_t(clock.warp_epoch[size_t(thread) / 32])) << 16 |
                      uint64_t(thread & 1023) << 32 | flags};
  const bool read = kind == Access::kRead;
  const auto launch_block = uint32_t(clock.launch_first_block);
  static const History shared_history = take_history(512 << 10);
  if (size_t offset; engine.owns_shared(p, offset))
    return check_words<true>(shared_history, nullptr, offset, bytes, read, now, launch_block);
  const Region* r = find(p);
  if (!r) {
    if (p >= &__executable_start && p < &end) return;  // a constant or __device__ variable
    return report_once("access outside every device allocation", 0, now.pc(), "");
  }
  const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - r->begin);
  if (offset + bytes > r->bytes)
    return report_once("access past the end of a device allocation", 0, now.pc(), "");
  check_words<false>(r->history, r->initialised, offset, bytes, read, now, launch_block);
}

[[maybe_unused]] const bool installed = [] {
  emu::on_access = check;
  emu::on_device_allocation = [](void* p, size_t bytes, bool alive) {
    auto* begin = static_cast<char*>(p);
    ++changes;
    if (alive) {
      regions()[begin] = {begin, bytes, take_history(bytes), reserve<bool>(bytes)};
    } else {
      const Region& r = regions()[begin];
      spare().emplace(capacity(bytes), r.history);
      munmap(r.initialised, bytes);
      regions().erase(begin);
    }
  };
  emu::on_host_write = [](void* p, size_t bytes) {
    if (Region* r = find(p))
      std::memset(r->initialised + (static_cast<char*>(p) - r->begin), 1, bytes);
  };
  return true;
}();

}  // namespace

#define HOOK(name, bytes, kind)                                     \
  extern "C" void __tsan_##name(void* p) {                          \
    check(p, bytes, Access::kind, -1, __builtin_return_address(0)); \
  }
#define HOOKS(n)          \
  HOOK(read##n, n, kRead) \
  HOOK(write##n, n, kWrite) HOOK(unaligned_read##n, n, kRead) HOOK(unaligned_write##n, n, kWrite)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) extern "C" {
  void __tsan_read_range(void* p, size_t n) {
    check(p, n, Access::kRead, -1, __builtin_return_address(0));
  }
  void __tsan_write_range(void* p, size_t n) {
    check(p, n, Access::kWrite, -1, __builtin_return_address(0));
  }
  // Host code of a .cu file counts references to tensors.
  int __tsan_atomic32_fetch_add(volatile int* p, int v, int) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
  }
  void __tsan_vptr_update(void**, void*) {}
  void __tsan_init() {}
  void __tsan_func_entry(void*) {}
  void __tsan_func_exit() {}
}
