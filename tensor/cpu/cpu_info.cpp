// Reads cpuid once and chooses. A feature counts only if the operating system saves its registers
// (xgetbv), since a virtual machine may show one without the other.
#include "tensor/cpu/cpu_info.h"

#include <cpuid.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tensor/check.h"

namespace graft {
namespace {

struct CpuFeatures {
  std::string vendor, brand;
  int family = 0, model = 0;
  bool avx2 = false;         // AVX2, FMA and F16C, the OS saving ymm
  bool avx512 = false;       // F, BW, DQ and VL, the OS saving zmm and masks
  bool avx512_bf16 = false;  // vdpbf16ps
};

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

std::string brand_string() {
  if (cpuid(0x80000000).a < 0x80000004) return "";
  char text[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002 + i);
    std::memcpy(text + 16 * i, &r, 16);
  }
  std::string brand = text;
  brand.erase(0, brand.find_first_not_of(' '));
  brand.erase(brand.find_last_not_of(' ') + 1);
  return brand;
}

CpuFeatures read_features() {
  CpuFeatures f;
  const Registers zero = cpuid(0), one = cpuid(1), seven = cpuid(7), seven_one = cpuid(7, 1);
  char vendor[13] = {};
  std::memcpy(vendor, &zero.b, 4);
  std::memcpy(vendor + 4, &zero.d, 4);
  std::memcpy(vendor + 8, &zero.c, 4);
  f.vendor = vendor;
  f.brand = brand_string();
  const int family = one.a >> 8 & 15, model = one.a >> 4 & 15;
  f.family = family == 15 ? family + (one.a >> 20 & 255) : family;
  f.model = family == 6 || family == 15 ? model + (one.a >> 16 & 15) * 16 : model;

  const auto bit = [](uint32_t word, int i) { return (word >> i & 1) != 0; };
  const bool osxsave = bit(one.c, 27);
  const uint64_t state = osxsave ? enabled_state() : 0;
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  f.avx2 = ymm && bit(one.c, 28) && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5);
  f.avx512 =
      f.avx2 && zmm && bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);
  f.avx512_bf16 = f.avx512 && bit(seven_one.a, 5);
  return f;
}

// The place of the choice. The order of preference is fixed: nothing is timed. A future Avx512Bf16
// path belongs above Avx512, for vendor AuthenticAMD from family 25 (Zen 4) on alone: there
// vdpbf16ps does twice the F32 rate, while on Intel from Sapphire Rapids on it does half of it.
CpuChoice choose(const CpuFeatures& f) {
  CpuChoice choice;
  choice.cpu = concat(f.vendor, " family ", f.family, " model ", f.model,
                      f.brand.empty() ? "" : " (" + f.brand + ")");
  if (f.avx512) {
    choice.path = CpuPath::Avx512;
    choice.reason = "AVX-512 F, BW, DQ and VL, enabled by the operating system";
    if (f.avx512_bf16 && f.vendor == "AuthenticAMD")
      choice.reason += "; BF16 is widened to F32, a kernel with vdpbf16ps, faster here, is to come";
    else if (f.avx512_bf16)
      choice.reason +=
          "; BF16 is widened to F32, as vdpbf16ps is slower than F32 FMA on this vendor";
  } else if (f.avx2) {
    choice.path = CpuPath::Avx2;
    choice.reason = "AVX2, FMA and F16C, no AVX-512";
  } else {
    choice.path = CpuPath::Portable;
    choice.reason = "no AVX2 with FMA and F16C";
  }
  return choice;
}

void override_choice(CpuChoice& choice, const char* name) {
  const CpuPath best = choice.path;
  if (std::strcmp(name, "portable") == 0)
    choice.path = CpuPath::Portable;
  else if (std::strcmp(name, "avx2") == 0)
    choice.path = CpuPath::Avx2;
  else if (std::strcmp(name, "avx512") == 0)
    choice.path = CpuPath::Avx512;
  else
    fail("GRAFT_CPU: got '", name, "', wanted portable, avx2 or avx512");
  CHECK(choice.path <= best, "GRAFT_CPU: ", name, " can't run on ", choice.cpu, ", wanted at most ",
        cpu_path_name(best));
  choice.reason = concat("GRAFT_CPU=", name);
}

CpuChoice choose_with_override() {
  CpuChoice choice = choose(read_features());
  if (const char* name = std::getenv("GRAFT_CPU"); name && *name) override_choice(choice, name);
  return choice;
}

}  // namespace

const CpuChoice& cpu_choice() {
  static const CpuChoice choice = choose_with_override();
  return choice;
}

std::string_view cpu_path_name(CpuPath path) {
  switch (path) {
    case CpuPath::Avx512:
      return "avx512";
    case CpuPath::Avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace graft
