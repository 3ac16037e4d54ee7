// The choice of code for this CPU, checked against what the kernel says in /proc/cpuinfo. The
// override is read once per process, so those tests look at it in a child.
#include "tensor/cpu/cpu_info.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "tensor/check.h"

namespace graft {
namespace {

std::set<std::string> kernel_flags() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> flags;
    for (std::string word; words >> word;) flags.insert(word);
    return flags;
  }
  return {};
}

CpuPath path_by_kernel_flags() {
  const std::set<std::string> flags = kernel_flags();
  const auto has = [&](std::initializer_list<const char*> names) {
    for (const char* name : names)
      if (!flags.count(name)) return false;
    return true;
  };
  if (!has({"avx2", "fma", "f16c"})) return CpuPath::Portable;
  return has({"avx512f", "avx512bw", "avx512dq", "avx512vl"}) ? CpuPath::Avx512 : CpuPath::Avx2;
}

// Prints the choice, or the error, on standard error and exits with 0 or 1.
[[noreturn]] void choose_in_child(const char* name) {
  setenv("GRAFT_CPU", name, 1);
  try {
    const CpuChoice& choice = cpu_choice();
    std::fprintf(stderr, "%s because %s", std::string(cpu_path_name(choice.path)).c_str(),
                 choice.reason.c_str());
    std::exit(0);
  } catch (const Error& error) {
    std::fprintf(stderr, "error %s", error.what());
    std::exit(1);
  }
}

// Each child is a fresh process, in which nothing has been chosen yet.
class CpuChoiceDeathTest : public testing::Test {
 protected:
  void SetUp() override { testing::FLAGS_gtest_death_test_style = "threadsafe"; }
};

TEST(CpuChoice, IsTheBestThatTheKernelReports) {
  if (std::getenv("GRAFT_CPU")) GTEST_SKIP() << "GRAFT_CPU is set";
  if (kernel_flags().empty()) GTEST_SKIP() << "/proc/cpuinfo has no flags";
  EXPECT_EQ(cpu_choice().path, path_by_kernel_flags()) << cpu_choice().reason;
}

TEST(CpuChoice, NamesVendorFamilyAndReason) {
  EXPECT_NE(cpu_choice().cpu.find(" family "), std::string::npos) << cpu_choice().cpu;
  EXPECT_NE(cpu_choice().cpu.find(" model "), std::string::npos) << cpu_choice().cpu;
  EXPECT_FALSE(cpu_choice().reason.empty());
}

TEST_F(CpuChoiceDeathTest, CanBeOverriddenDownwards) {
  EXPECT_EXIT(choose_in_child("portable"), testing::ExitedWithCode(0),
              "portable because GRAFT_CPU=portable");
  EXPECT_EXIT(choose_in_child(""), testing::ExitedWithCode(0), "because");
}

TEST_F(CpuChoiceDeathTest, RefusesAnOverrideThatTheCpuCannotRun) {
  if (path_by_kernel_flags() == CpuPath::Avx512)
    EXPECT_EXIT(choose_in_child("avx512"), testing::ExitedWithCode(0), "avx512 because");
  else
    EXPECT_EXIT(choose_in_child("avx512"), testing::ExitedWithCode(1),
                "error GRAFT_CPU: avx512 can't run on .*, wanted at most ");
}

TEST_F(CpuChoiceDeathTest, RefusesAnUnknownName) {
  EXPECT_EXIT(choose_in_child("sse9"), testing::ExitedWithCode(1),
              "error GRAFT_CPU: got 'sse9', wanted portable, avx2 or avx512");
}

}  // namespace
}  // namespace graft
