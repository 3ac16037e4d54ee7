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

#include "tensor/backend.h"
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

// The first value of a key of /proc/cpuinfo.
std::string kernel_value(const std::string& key) {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind(key + "\t", 0) == 0) return line.substr(line.find(':') + 2);
  return "";
}

CpuPath last_path_by_kernel_flags() {
  const std::set<std::string> flags = kernel_flags();
  const auto has = [&](std::initializer_list<const char*> names) {
    for (const char* name : names)
      if (!flags.count(name)) return false;
    return true;
  };
  if (!has({"avx2", "fma", "f16c"})) return CpuPath::Portable;
  if (!has({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) return CpuPath::Avx2;
  if (!has({"avx512_bf16"})) return CpuPath::Avx512;
  return has({"amx_tile", "amx_bf16"}) ? CpuPath::Amx : CpuPath::Avx512Bf16;
}

CpuPath path_by_kernel_flags() {
  const CpuPath last = last_path_by_kernel_flags();
  const std::string family = kernel_value("cpu family");
  const bool zen =
      kernel_value("vendor_id") == "AuthenticAMD" && (family == "25" || family == "26");
  return last == CpuPath::Avx512Bf16 && !zen ? CpuPath::Avx512 : last;
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

// Tiles are worth it wherever they are; vdpbf16ps at twice the F32 rate is Zen 4's and Zen 5's; a
// CPU that has the bit is not enough.
TEST(CpuChoice, TakesBf16InstructionsOnZen4AndZen5Alone) {
  struct Row {
    const char* vendor;
    int family;
    bool avx2, avx512, avx512_bf16, amx_bf16;
    CpuPath path, last;
    const char* reason;
  };
  const CpuPath bf16 = CpuPath::Avx512Bf16;
  const Row rows[] = {
      {"AuthenticAMD", 25, true, true, true, false, bf16, bf16,
       "multiplied by vdpbf16ps"},  // Zen 4
      {"AuthenticAMD", 26, true, true, true, false, bf16, bf16,
       "multiplied by vdpbf16ps"},  // Zen 5
      {"AuthenticAMD", 27, true, true, true, false, CpuPath::Avx512, bf16, "widened to F32"},
      {"AuthenticAMD", 25, true, false, false, false, CpuPath::Avx2, CpuPath::Avx2, "no AVX-512"},
      {"GenuineIntel", 6, true, true, true, false, CpuPath::Avx512, bf16, "widened to F32"},
      {"GenuineIntel", 25, true, true, true, false, CpuPath::Avx512, bf16, "widened to F32"},
      {"GenuineIntel", 6, true, true, false, false, CpuPath::Avx512, CpuPath::Avx512, "AVX-512 F"},
      {"GenuineIntel", 6, true, true, true, true, CpuPath::Amx, CpuPath::Amx, "AMX tiles"},
      {"GenuineIntel", 6, false, false, false, false, CpuPath::Portable, CpuPath::Portable,
       "no AVX2"},
  };
  for (const Row& row : rows) {
    const CpuFeatures f{row.vendor, "",         row.family,      17,
                        row.avx2,   row.avx512, row.avx512_bf16, row.amx_bf16};
    const CpuChoice choice = choose_cpu_path(f);
    EXPECT_EQ(choice.path, row.path) << choice.cpu;
    EXPECT_EQ(last_cpu_path(f), row.last) << choice.cpu;
    EXPECT_NE(choice.reason.find(row.reason), std::string::npos) << choice.cpu << choice.reason;
  }
}

TEST(CpuChoice, IsWhatTheBackendSaysItRuns) {
  const std::string name(cpu_path_name(cpu_choice().path)), text = cpu_backend().describe();
  EXPECT_NE(text.find(" " + name + " kernels,"), std::string::npos) << text;
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
  for (const CpuPath path : {CpuPath::Avx2, CpuPath::Avx512, CpuPath::Avx512Bf16, CpuPath::Amx}) {
    const std::string name(cpu_path_name(path));
    if (path <= last_path_by_kernel_flags())
      EXPECT_EXIT(choose_in_child(name.c_str()), testing::ExitedWithCode(0),
                  name + " because GRAFT_CPU=" + name);
    else
      EXPECT_EXIT(choose_in_child(name.c_str()), testing::ExitedWithCode(1),
                  "error GRAFT_CPU: " + name + " can't run on .*, wanted at most ");
  }
}

TEST_F(CpuChoiceDeathTest, RefusesAnUnknownName) {
  EXPECT_EXIT(choose_in_child("sse9"), testing::ExitedWithCode(1),
              "error GRAFT_CPU: got 'sse9', wanted portable, avx2, avx512, avx512_bf16 or amx");
}

}  // namespace
}  // namespace graft
