// What bench/cuda_ladder_table.cpp makes of a listing of ptxas and of a results file.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <sstream>

#include "bench/cuda_ladder_table.h"

#include "bench/page.h"
#include "cuda/variants.h"
#include "tensor/check.h"

namespace graft {
namespace {

class TextFile {
 public:
  TextFile(const std::string& name, const std::string& text)
      : path_(testing::TempDir() + "graft_" + std::to_string(getpid()) + "_" + name) {
    std::ofstream(path_) << text;
  }
  ~TextFile() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }
  std::string text() const {
    std::stringstream whole;
    whole << std::ifstream(path_).rdbuf();
    return whole.str();
  }

 private:
  std::string path_;
};

// As nvcc 13 prints it; the names are those of gemm_1_naive<__nv_bfloat16> and gemm_7_large.
const char* kListing =
    "ptxas info    : 0 bytes gmem\n"
    "ptxas info    : Compiling entry function "
    "'_ZN5graft12_GLOBAL__N_112gemm_1_naiveI13__nv_bfloat16EEvPT_lPKS3_lS6_liii' for 'sm_90a'\n"
    "ptxas info    : Function properties for "
    "_ZN5graft12_GLOBAL__N_112gemm_1_naiveI13__nv_bfloat16EEvPT_lPKS3_lS6_liii\n"
    "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    "ptxas info    : Used 29 registers, used 0 barriers\n"
    "ptxas info    : Compiling entry function "
    "'_ZN5graft12_GLOBAL__N_112gemm_7_largeEP13__nv_bfloat16lbNS_12GemmOperandsEii' for 'sm_90a'\n"
    "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    "ptxas info    : Used 206 registers, used 1 barriers, 96 bytes smem\n";

TEST(LadderTable, ReadsRegistersAndSpillsByKernel) {
  const TextFile listing("listing.ptxas", kListing);
  std::map<std::string, KernelResources> kernels;
  read_ptxas(kernels, listing.path());
  ASSERT_EQ(kernels.size(), 2u);
  for (const auto& [name, resources] : kernels) {
    const bool naive = name.ends_with("::gemm_1_naive<__nv_bfloat16>");
    EXPECT_TRUE(naive || name.ends_with("::gemm_7_large")) << name;
    EXPECT_EQ(resources.registers, naive ? 29 : 206);
    EXPECT_EQ(resources.spilled_bytes, naive ? 0 : 16);
  }
}

std::string row_of(const std::string& markdown, const std::string& family,
                   const std::string& rung) {
  const size_t section = markdown.find("**" + family + "**");
  const size_t row = markdown.find("\n| " + rung + " |", section);
  if (section == std::string::npos || row == std::string::npos) return "no such row";
  return markdown.substr(row + 1, markdown.find('\n', row + 1) - row - 1);
}

TEST(LadderTable, MarksWhatIsNotKnown) {
  const std::string markdown = ladder_markdown({});
  for (const LadderFamily& family : ladder_families())
    for (const LadderRung& rung : family.rungs)
      EXPECT_EQ(row_of(markdown, family.name, std::to_string(rung.number) + " " + rung.name),
                "| " + std::to_string(rung.number) + " " + rung.name + " | " + rung.sentence +
                    " | - | - | - | - | - | - |");
}

TEST(LadderTable, RefusesAKernelThatPtxasDidNotSee) {
  LadderMeasurements measured;
  measured.kernels["graft::gemm_1_naive<__nv_bfloat16>"] = {29, 0};
  EXPECT_THROW(ladder_markdown(measured), Error);
}

// 4096^3 products are 2 * 4096^3 = 137.4 GFLOP, 139.0 us at the 989 TFLOP/s of an H200; in 278 us
// that is 494 TFLOP/s, half of the peak. RMSNorm is bound by its 4.8 TB/s:
// 4 RH + 2 H + 4 R = 268,509,184 bytes, 55.9 us.
TEST(LadderTable, GivesTimesOfEveryCardAsAShareOfItsRoofline) {
  const TextFile results("results.json", R"({"other": 1, "ladder": {
      "device": "NVIDIA H200", "commit": "abc1234", "families": {
        "gemm": {"sizes": [4096, 4096, 4096], "us": {"7": 278, "library": 185}},
        "rms_norm": {"sizes": [16384, 4096], "us": {"2": 112}},
        "rms_norm_backward": {"sizes": [1, 4096], "us": {"2": 99}}}}})");
  LadderMeasurements measured;
  read_results(measured.cards, results.path());
  ASSERT_EQ(measured.cards.size(), 1u);
  measured.bank_waves["gemm"] = {{4, 4}, {7, 1}};
  const std::string markdown = ladder_markdown(measured);
  EXPECT_NE(markdown.find("NVIDIA H200: commit abc1234"), std::string::npos);
  const auto ends = [&](const char* family, const char* rung, const std::string& ending) {
    const std::string row = row_of(markdown, family, rung);
    EXPECT_TRUE(row.ends_with(ending)) << row;
  };
  ends("gemm", "7 large tiles", " | 278 | 494.4 TFLOP/s | 50 % | - | - | 1.00 |");
  ends("gemm", "cuBLAS", " | 185 | 742.9 TFLOP/s | 75 % | | | |");
  ends("gemm", "4 tensor cores", " | - | - | - | - | - | 4.00 |");
  ends("rms_norm", "2 warp", " | 112 | 2397 GB/s | 50 % | - | - | - |");
  ends("rms_norm_backward", "2 warp", " | - | - | - | - | - | - |");  // of another size
}

TEST(LadderTable, IgnoresResultsOfOtherBenchmarks) {
  const TextFile results("results.json", R"({"train_step": {}})");
  std::vector<CardTimes> cards;
  read_results(cards, results.path());
  EXPECT_TRUE(cards.empty());
}

TEST(LadderTable, ReplacesOnlyWhatIsBetweenTheMarkers) {
  const TextFile page("page.md", "a\n<!-- ladder -->\nold\n<!-- /ladder -->\nb\n");
  replace_section(page.path(), "ladder", "new\n");
  EXPECT_EQ(page.text(), "a\n<!-- ladder -->\nnew\n<!-- /ladder -->\nb\n");
  const TextFile other("other.md", "a\n<!-- /ladder -->\n<!-- ladder -->\n");
  EXPECT_THROW(replace_section(other.path(), "ladder", ""), Error);
}

}  // namespace
}  // namespace graft
