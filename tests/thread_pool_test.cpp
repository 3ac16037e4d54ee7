// The pool of threads: every piece once, exceptions, and more threads than cores.
#include "tensor/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tensor/check.h"

namespace graft {
namespace {

TEST(ThreadPool, RunsEveryPieceOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (const int64_t pieces : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(pieces));
      pool.run(pieces, [&](int64_t piece, int thread) {
        EXPECT_GE(thread, 0);
        EXPECT_LT(thread, threads);
        ++runs[static_cast<size_t>(piece)];
      });
      for (const std::atomic<int>& count : runs) EXPECT_EQ(count, 1);
    }
  }
}

// Runs that follow each other closely are where a worker that comes late could take a piece of the
// next run with the body of the last.
TEST(ThreadPool, KeepsManyShortRunsApart) {
  ThreadPool pool(8);
  for (int64_t round = 0; round < 20000; ++round) {
    std::atomic<int64_t> sum = 0;
    pool.run(3, [&](int64_t piece, int) { sum += round + piece; });
    ASSERT_EQ(sum, 3 * round + 3);
  }
}

TEST(ThreadPool, WakesWorkersThatSleep) {
  ThreadPool pool(2);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));  // far longer than they spin
    std::atomic<int> arrived = 0;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    pool.run(2, [&](int64_t, int) {  // each piece waits for the other: needs both threads
      ++arrived;
      while (arrived < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    });
    EXPECT_EQ(arrived, 2);
  }
}

TEST(ThreadPool, RethrowsTheExceptionOfAPieceAndGoesOn) {
  for (const int threads : {1, 2, 8}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 200; ++round) {
      try {
        pool.run(50, [&](int64_t piece, int) {
          if (piece % 10 == 7) fail("piece ", piece);
        });
        FAIL() << "nothing was thrown";
      } catch (const Error& error) {
        EXPECT_EQ(std::string(error.what()).substr(0, 6), "piece ");
      }
      std::atomic<int> count = 0;
      pool.run(50, [&](int64_t, int) { ++count; });
      ASSERT_EQ(count, 50);
    }
  }
}

TEST(ThreadPool, RunsOnTheCallingThreadWhenThereIsOnlyOne) {
  ThreadPool pool(1);
  const std::thread::id caller = std::this_thread::get_id();
  pool.run(4, [&](int64_t, int) { EXPECT_EQ(std::this_thread::get_id(), caller); });
}

TEST(ThreadPool, TakesNoMoreThreadsThanTheAffinityMaskHas) {
  cpu_set_t set;
  ASSERT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
  const int before = thread_pool().num_threads();
  set_num_threads(3);
  EXPECT_EQ(thread_pool().num_threads(), 3);
  set_num_threads(0);
  EXPECT_GE(thread_pool().num_threads(), 1);
  EXPECT_LE(thread_pool().num_threads(), CPU_COUNT(&set));
  set_num_threads(before);
}

TEST(ThreadPool, RefusesANegativeNumberOfThreads) {
  EXPECT_THROW(set_num_threads(-1), Error);
  EXPECT_THROW(ThreadPool(0), Error);
}

}  // namespace
}  // namespace graft
