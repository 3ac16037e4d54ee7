// Every planted mistake must be found. EMU_ASAN and EMU_RACECHECK tell which build this is.
#include <gtest/gtest.h>

#include "cuda/emulator/emulator.h"
#include "tensor/check.h"
#include "tests/cuda/faulty.h"
#include "tests/cuda/support.h"

namespace graft {
namespace {

constexpr int kN = 512;

// Runs the faulty kernel under several schedules; says in how many the sum came out wrong or an
// error was reported.
struct Verdict {
  int wrong = 0, reported = 0, runs = 0;
  std::string report;
};
Verdict run(Fault fault, emu::Order order, int seeds = 20, int shift = 0) {
  Verdict v;
  const auto in = random_values<float>(kN + static_cast<size_t>(shift), 1);
  std::vector<double> want(kN / 128);
  for (int i = 0; i < kN; ++i)
    want[static_cast<size_t>(i / 128)] += static_cast<double>(in[static_cast<size_t>(i + shift)]);
  const emu::Options saved = emu::options();
  for (int seed = 1; seed <= (order == emu::Order::kRandom ? seeds : 1); ++seed) {
    emu::options() = {order, static_cast<uint64_t>(seed)};
    DeviceArray<float> din(in), dout(want.size());
    try {
      faulty_block_sum(fault, din.get() + shift, dout.get(), kN);
    } catch (const Error&) {  // what went wrong is in the report
    }
    v.wrong += !(worst_error(dout.host(), want) < 1e-5);
    const std::string report = emu::take_report();
    v.reported += !report.empty();
    if (!report.empty()) v.report = report;
    (void)cudaGetLastError();
    ++v.runs;
  }
  emu::options() = saved;
  return v;
}

TEST(Faults, CorrectKernelPasses) {
  for (auto order : {emu::Order::kAscending, emu::Order::kDescending, emu::Order::kRandom}) {
    const Verdict v = run(Fault::kNone, order);
    EXPECT_EQ(v.wrong + v.reported, 0) << v.report;
  }
}

// The schedule alone turns these into wrong results.
TEST(Faults, ScheduleShowsRaces) {
  for (Fault f : {Fault::kMissingBarrier, Fault::kMissingSyncwarp, Fault::kMissingAsyncWait,
                  Fault::kBlockRace}) {
    const Verdict up = run(f, emu::Order::kAscending), down = run(f, emu::Order::kDescending),
                  random = run(f, emu::Order::kRandom);
    std::printf("fault %d: wrong in ascending %d/%d, descending %d/%d, random %d/%d\n",
                static_cast<int>(f), up.wrong, up.runs, down.wrong, down.runs, random.wrong,
                random.runs);
    EXPECT_GT(random.wrong, 0);
  }
}

TEST(Faults, DivergenceIsReported) {
  EXPECT_NE(run(Fault::kDivergentBarrier, emu::Order::kRandom).report.find("__syncthreads"),
            std::string::npos);
  EXPECT_NE(run(Fault::kDivergentShuffle, emu::Order::kRandom).report.find("diverged"),
            std::string::npos);
}

#if defined(EMU_RACECHECK)

// One schedule is enough for the race checker, whatever the order.
TEST(Faults, RaceCheckerIsExact) {
  const std::pair<Fault, const char*> cases[] = {
      {Fault::kMissingBarrier, "race between"},
      {Fault::kMissingSyncwarp, "race between"},
      {Fault::kMissingAsyncWait, "before its wait"},
      {Fault::kBlockRace, "race between two writes"},
      {Fault::kUninitialisedShared, "uninitialised"},
      {Fault::kWritePastEnd, "past the end|outside every"},
      {Fault::kReadPastEnd, "past the end|outside every"}};
  for (auto [fault, text] : cases)
    for (auto order : {emu::Order::kAscending, emu::Order::kDescending}) {
      const Verdict v = run(fault, order);
      EXPECT_EQ(v.reported, 1) << static_cast<int>(fault);
      EXPECT_TRUE(::testing::internal::RE::PartialMatch(v.report, ::testing::internal::RE(text)))
          << v.report;
    }
}

#elif EMU_ASAN

using FaultsDeathTest = ::testing::Test;
TEST(FaultsDeathTest, AddressSanitizerStops) {
  EXPECT_DEATH(run(Fault::kWritePastEnd, emu::Order::kRandom),
               "heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*faulty.cu");
  EXPECT_DEATH(run(Fault::kReadPastEnd, emu::Order::kRandom),
               "heap-buffer-overflow(.|\n)*READ of size 4(.|\n)*faulty.cu");
  EXPECT_DEATH(run(Fault::kSharedPastEnd, emu::Order::kRandom),
               "faulty.cu.*index 128 out of bounds");  // UBSan knows the array's size
  EXPECT_DEATH(run(Fault::kDynamicPastEnd, emu::Order::kRandom),
               "use-after-poison(.|\n)*WRITE of size 4(.|\n)*faulty.cu");
  EXPECT_DEATH(run(Fault::kMisaligned, emu::Order::kRandom, 1, 1), "misaligned address");
}
TEST(FaultsDeathTest, HostMustNotTouchDeviceMemory) {
  DeviceArray<float> d(16);
  EXPECT_DEATH(*d.get() = 1, "use-after-poison");
}

#else

TEST(Faults, RedZonesShowStrayWrites) {
  EXPECT_NE(
      run(Fault::kWritePastEnd, emu::Order::kRandom).report.find("outside a device allocation"),
      std::string::npos);
}
TEST(Faults, PoisonShowsUninitialisedMemory) {
  EXPECT_GT(run(Fault::kUninitialisedShared, emu::Order::kRandom).wrong, 0);
}

#endif

}  // namespace
}  // namespace graft
