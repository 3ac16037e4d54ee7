// Where threads meet: barriers, warp operations, shared memory and asynchronous copies into it.
#include "cuda/emulator/engine.h"

namespace emu {

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
    if (done.combine) {
      combining_ = done.where;
      done.combine(done.payload, done.arrived);
      combining_ = {};
    } else if (done.mask == ~0u || done.arrived == warp.live)
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
      fail(std::string(what) + " (" + describe(where) +
           ") meets another operation, mask or line (" + describe(m.where) +
           "): the warp has diverged");
    meeting = &m;
  }
  if (!meeting) meeting = &warp.meetings.emplace_back(mask, combine, where);
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

// ---- Interface

void sync_block(Where where) {
  Engine& e = engine();
  Barrier& b = e.barriers[0];
  if (!b.waiting.empty() && !same_place(b.where, where))
    fail("threads of one block wait in different __syncthreads: " + describe(b.where) + " and " +
         describe(where));
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
                         lane.copy_group, __builtin_return_address(0)});
}
void cp_async_commit() { ++engine().self().copy_group; }
void cp_async_wait(unsigned pending_groups) {
  Lane& lane = engine().self();
  if (pending_groups == ~0u)
    engine().finish_copies(lane, ~0u);
  else if (lane.copy_group > pending_groups)
    engine().finish_copies(lane, lane.copy_group - pending_groups);
}

}  // namespace emu
