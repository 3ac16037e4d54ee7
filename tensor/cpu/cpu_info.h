// Which code runs on this CPU. One function decides, from vendor, family and features, never by
// timing: the same machine gives the same bytes.
#pragma once

#include <string>
#include <string_view>

namespace graft {

enum class CpuPath {
  Portable,
  Avx2,
  Avx512
};  // Avx512Bf16 (vdpbf16ps, for Zen 4) has its place here

struct CpuChoice {
  CpuPath path;
  std::string cpu;     // "AuthenticAMD family 25 model 1 (AMD EPYC ...)"
  std::string reason;  // why this path, for `graft info --cpu`
};

// GRAFT_CPU=portable|avx2|avx512 overrides; one that this CPU can't run is an Error.
const CpuChoice& cpu_choice();
std::string_view cpu_path_name(CpuPath path);

}  // namespace graft
