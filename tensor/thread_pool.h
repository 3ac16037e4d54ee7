// One persistent pool of threads for the CPU kernels. Work is given as numbered pieces; which
// thread runs which piece is open, so a kernel's result must depend on the piece alone: that is how
// one seed gives the same bytes with any number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace graft {

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // including the calling thread
  ~ThreadPool();
  int num_threads() const;

  // Calls body(piece, thread) for every piece in [0, pieces), thread in [0, num_threads()); returns
  // when all are done. The first exception of a piece is rethrown. Not reentrant: a body must not
  // call run.
  template <class Body>
  void run(int64_t pieces, Body&& body) {
    using B = std::remove_reference_t<Body>;
    run_erased(
        pieces, [](void* b, int64_t piece, int thread) { (*static_cast<B*>(b))(piece, thread); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  void run_erased(int64_t pieces, void (*body)(void*, int64_t, int), void* context);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The pool of the CPU backend. set_num_threads(0) takes what the machine (cgroup and affinity) has.
ThreadPool& thread_pool();
void set_num_threads(int num_threads);

}  // namespace graft
