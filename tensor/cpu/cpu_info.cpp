// Reads cpuid once and chooses. A feature counts only if the operating system saves its registers
// (xgetbv), since a virtual machine may show one without the other.
#include "tensor/cpu/cpu_info.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tensor/check.h"

namespace graft {
namespace {

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

// The registers are so large (8 KiB) that Linux saves them for processes alone that have asked.
// [Linux, Documentation/arch/x86/xstate.rst]
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
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
  const bool tiles = (state & 0x60000) == 0x60000 && bit(seven.d, 24) && bit(seven.d, 22);
  f.amx_bf16 = f.avx512_bf16 && tiles && may_use_tiles();
  return f;
}

// vdpbf16ps multiplies two pairs in the time of one F32 multiply-add on AMD's Zen 4 (family 25, as
// Zen 3, which lacks it) and Zen 5 (family 26). On Intel's Sapphire Rapids kind it does half of the
// work of F32 multiply-adds in the same time, so widening BF16 to F32 is twice as fast there.
bool has_fast_bf16(const CpuFeatures& f) {
  return f.avx512_bf16 && f.vendor == "AuthenticAMD" && (f.family == 25 || f.family == 26);
}

constexpr CpuPath kPaths[] = {CpuPath::Portable, CpuPath::Avx2, CpuPath::Avx512,
                              CpuPath::Avx512Bf16, CpuPath::Amx};

CpuPath path_by_name(const char* name) {
  for (const CpuPath path : kPaths)
    if (cpu_path_name(path) == name) return path;
  fail("GRAFT_CPU: got '", name, "', wanted portable, avx2, avx512, avx512_bf16 or amx");
}

CpuChoice choose_with_override() {
  CpuChoice choice = choose_cpu_path(cpu_features());
  const char* name = std::getenv("GRAFT_CPU");
  if (!name || !*name) return choice;
  const CpuPath last = last_cpu_path(cpu_features());
  choice.path = path_by_name(name);
  CHECK(choice.path <= last, "GRAFT_CPU: ", name, " can't run on ", choice.cpu, ", wanted at most ",
        cpu_path_name(last));
  choice.reason = concat("GRAFT_CPU=", name);
  return choice;
}

}  // namespace

CpuPath last_cpu_path(const CpuFeatures& f) {
  return f.amx_bf16      ? CpuPath::Amx
         : f.avx512_bf16 ? CpuPath::Avx512Bf16
         : f.avx512      ? CpuPath::Avx512
         : f.avx2        ? CpuPath::Avx2
                         : CpuPath::Portable;
}

// The place of the choice. The order of preference is fixed: nothing is timed.
CpuChoice choose_cpu_path(const CpuFeatures& f) {
  CpuChoice choice;
  choice.cpu = concat(f.vendor, " family ", f.family, " model ", f.model,
                      f.brand.empty() ? "" : " (" + f.brand + ")");
  choice.path = last_cpu_path(f);
  if (choice.path == CpuPath::Avx512Bf16 && !has_fast_bf16(f)) choice.path = CpuPath::Avx512;
  const char* avx512 = "AVX-512 F, BW, DQ and VL, enabled by the operating system";
  switch (choice.path) {
    case CpuPath::Amx:
      choice.reason = concat(avx512, "; BF16 is multiplied by AMX tiles");
      break;
    case CpuPath::Avx512Bf16:
      choice.reason =
          concat(avx512, "; BF16 is multiplied by vdpbf16ps, twice as fast here as F32");
      break;
    case CpuPath::Avx512:
      choice.reason = avx512;
      if (f.avx512_bf16)
        choice.reason +=
            "; BF16 is widened to F32: vdpbf16ps is known to be faster on AMD families 25 and 26 "
            "alone";
      break;
    case CpuPath::Avx2:
      choice.reason = "AVX2, FMA and F16C, no AVX-512";
      break;
    case CpuPath::Portable:
      choice.reason = "no AVX2 with FMA and F16C";
      break;
  }
  return choice;
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = read_features();
  return features;
}

const CpuChoice& cpu_choice() {
  static const CpuChoice choice = choose_with_override();
  return choice;
}

std::string_view cpu_path_name(CpuPath path) {
  switch (path) {
    case CpuPath::Amx:
      return "amx";
    case CpuPath::Avx512Bf16:
      return "avx512_bf16";
    case CpuPath::Avx512:
      return "avx512";
    case CpuPath::Avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace graft
