// Which code runs on this CPU. One function decides, from vendor, family and features, never by
// timing: the same machine gives the same bytes.
#pragma once

#include <string>
#include <string_view>

namespace graft {

enum class CpuPath { Portable, Avx2, Avx512, Avx512Bf16, Amx };  // each has what came before it

// What choose_cpu_path looks at.
struct CpuFeatures {
  std::string vendor, brand;  // as cpuid spells them
  int family = 0, model = 0;
  bool avx2 = false;         // AVX2, FMA and F16C, the OS saving ymm
  bool avx512 = false;       // F, BW, DQ and VL, the OS saving zmm and masks
  bool avx512_bf16 = false;  // vdpbf16ps
  bool amx_bf16 = false;     // tdpbf16ps, the OS granting its registers
};

struct CpuChoice {
  CpuPath path;
  std::string cpu;     // "AuthenticAMD family 25 model 1 (AMD EPYC ...)"
  std::string reason;  // why this path, for `graft info --cpu`
};

// Of this CPU. GRAFT_CPU=portable|avx2|avx512|avx512_bf16|amx overrides; one that it can't run is
// an Error.
const CpuChoice& cpu_choice();

// The decision itself: the path and the reason for a CPU with these features.
CpuChoice choose_cpu_path(const CpuFeatures& features);
// The last path that such a CPU can run, which need not be its fastest.
CpuPath last_cpu_path(const CpuFeatures& features);
const CpuFeatures& cpu_features();  // of this CPU

std::string_view cpu_path_name(CpuPath path);

}  // namespace graft
