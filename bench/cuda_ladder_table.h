// The table of rungs in cuda/README.md, from what was measured. Needs neither a GPU nor the
// emulator, so that it has a test (tests/cuda/ladder_table_test.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace graft {

struct KernelResources {
  int registers = 0;
  int spilled_bytes = 0;  // stores and loads
};

// One bench/results/<gpu>.json.
struct CardTimes {
  std::string device, commit;
  struct Family {
    std::vector<int64_t> sizes;
    std::map<std::string, double> us;  // by rung number, or "library"
  };
  std::map<std::string, Family> families;
};

struct LadderMeasurements {
  std::map<std::string, std::map<int, double>> bank_waves;  // by family and rung
  std::map<std::string, KernelResources> kernels;  // by demangled name without parameters, sm_90a
  std::vector<CardTimes> cards;
};

// Adds the kernels that `nvcc -Xptxas -v` listed in a file.
void read_ptxas(std::map<std::string, KernelResources>& kernels, const std::string& path);
// Adds the key "ladder" of a results file, if it has one.
void read_results(std::vector<CardTimes>& cards, const std::string& path);

// Throws Error where kernels are known, but not that of a rung: the table of rungs names it
// wrongly.
std::string ladder_markdown(const LadderMeasurements& measured);

}  // namespace graft
