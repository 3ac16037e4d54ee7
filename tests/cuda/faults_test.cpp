// Every planted mistake must be found, by the build that looks for it.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

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
  std::string thrown;  // what launch said
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
    } catch (const Error& error) {
      v.thrown = error.what();
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

// "faulty.cu:17", where "@name" marks line 17 of the kernel.
std::string line_of(const std::string& name) {
  std::ifstream file(std::filesystem::path(__FILE__).replace_filename("faulty.cu"));
  std::string text;
  for (int line = 1; std::getline(file, text); ++line)
    if (text.ends_with("// @" + name)) return "faulty.cu:" + std::to_string(line);
  ADD_FAILURE() << "no @" << name << " in faulty.cu";
  return "?";
}
std::string kernel_of(Fault fault) {
  return "kernel faulty_kernel<(Fault)" + std::to_string(int(fault)) + "> (" + line_of("kernel") +
         ")";
}

// The report names the kernel, the line and what happened; the exception says its first line.
void expect_named(Fault fault, emu::Order order, const std::vector<std::string>& texts) {
  const Verdict v = run(fault, order, 1);
  EXPECT_EQ(v.reported, 1) << int(fault);
  EXPECT_NE(v.report.find(kernel_of(fault)), std::string::npos) << v.report;
  for (const std::string& text : texts)
    EXPECT_NE(v.report.find(text), std::string::npos) << text << " is not in: " << v.report;
  const std::string prefix = "emulator: ";
  ASSERT_EQ(v.report.substr(0, prefix.size()), prefix);
  const std::string first = v.report.substr(prefix.size(), v.report.find('\n') - prefix.size());
  EXPECT_NE(v.thrown.find(first), std::string::npos) << v.thrown;
}
constexpr emu::Order kOrders[] = {emu::Order::kAscending, emu::Order::kDescending,
                                  emu::Order::kRandom};

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
  for (emu::Order order : kOrders) {
    expect_named(Fault::kDivergentBarrier, order,
                 {"deadlock", "__syncthreads at " + line_of("barrier")});
    expect_named(Fault::kDivergentShuffle, order,
                 {"the warp has diverged", "called at " + line_of("shuffle")});
  }
}

TEST(Faults, CopiesUnderWayAtTheEndAreReported) {
  for (emu::Order order : kOrders)
    expect_named(Fault::kUnusedAsyncCopy, order,
                 {"a thread ends without the wait for its cp.async copy at ", line_of("unused")});
}

// One schedule is enough for the race checker, whatever the order.
TEST(Faults, RaceCheckerIsExact) {
  if (emu::checks() != emu::Checks::kRaces) GTEST_SKIP() << "not the race checker's build";
  for (emu::Order order : kOrders) {
    expect_named(Fault::kMissingBarrier, order,
                 {"race between", "in shared memory", line_of("partial"), line_of("sum")});
    expect_named(Fault::kMissingSyncwarp, order,
                 {"race between", "in shared memory", line_of("tree")});
    expect_named(
        Fault::kMissingAsyncWait, order,
        {"read of a cp.async destination before its wait", line_of("async"), line_of("read")});
    expect_named(Fault::kBlockRace, order,
                 {"race between two writes", "of different blocks", line_of("store")});
    expect_named(Fault::kUninitialisedShared, order,
                 {"read of uninitialised memory", "in shared memory", line_of("read")});
    expect_named(Fault::kWritePastEnd, order, {"device allocation", line_of("store")});
    expect_named(Fault::kReadPastEnd, order, {"device allocation", line_of("load")});
  }
}

// What the sanitizer says, the line and the kernel, in any order.
std::string dying(const std::string& what, const std::string& line, Fault fault) {
  std::string kernel = kernel_of(fault);
  for (size_t i = 0; i < kernel.size(); ++i)
    if (kernel[i] == '(' || kernel[i] == ')') kernel.insert(i++, 1, '\\');
  const auto both = [](const std::string& a, const std::string& b) {
    return "(" + a + "(.|\n)*" + b + "|" + b + "(.|\n)*" + a + ")";
  };
  return both(both(what, line), kernel);
}

using FaultsDeathTest = ::testing::Test;
TEST(FaultsDeathTest, SanitizersStop) {
  if (emu::checks() != emu::Checks::kMemory) GTEST_SKIP() << "not the sanitizers' build";
  const auto order = emu::Order::kRandom;
  EXPECT_DEATH(run(Fault::kWritePastEnd, order), dying("heap-buffer-overflow(.|\n)*WRITE of size 4",
                                                       line_of("store"), Fault::kWritePastEnd));
  EXPECT_DEATH(run(Fault::kReadPastEnd, order), dying("heap-buffer-overflow(.|\n)*READ of size 4",
                                                      line_of("load"), Fault::kReadPastEnd));
  EXPECT_DEATH(run(Fault::kSharedPastEnd, order),  // UBSan knows the array's size
               dying("index 128 out of bounds", line_of("load"), Fault::kSharedPastEnd));
  EXPECT_DEATH(
      run(Fault::kDynamicPastEnd, order),
      dying("use-after-poison(.|\n)*WRITE of size 4", line_of("dynamic"), Fault::kDynamicPastEnd));
  EXPECT_DEATH(run(Fault::kMisaligned, order, 1, 1),
               dying("misaligned address", line_of("misaligned"), Fault::kMisaligned));
}
TEST(FaultsDeathTest, HostMustNotTouchDeviceMemory) {
  if (emu::checks() != emu::Checks::kMemory) GTEST_SKIP() << "not the sanitizers' build";
  DeviceArray<float> d(16);
  EXPECT_DEATH(touch_from_host(d.get()), "use-after-poison");
}

// Seen only when the kernel is over, so there is no line but the kernel's.
TEST(Faults, RedZonesShowStrayWrites) {
  if (emu::checks() != emu::Checks::kNone) GTEST_SKIP() << "a checker sees it before";
  for (emu::Order order : kOrders)
    expect_named(Fault::kWritePastEnd, order, {"write outside a device allocation of 16 bytes"});
}
TEST(Faults, PoisonShowsUninitialisedMemory) {
  if (emu::checks() != emu::Checks::kNone) GTEST_SKIP() << "a checker sees it before";
  EXPECT_GT(run(Fault::kUninitialisedShared, emu::Order::kRandom).wrong, 0);
}

}  // namespace
}  // namespace graft
