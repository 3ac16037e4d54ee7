// Element types. F32 and BF16 are computed in; F16 only comes from files (used in place, widened to
// F32 when read); F64 exists on the CPU for gradient checks; I32 holds token ids and positions. NF4
// is that of frozen weights, four bits an element in blocks (nf4.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

namespace graft {

enum class DType : uint8_t { F32, BF16, F16, F64, I32, U8, NF4, NF4Single };

inline bool is_nf4(DType dtype) { return dtype == DType::NF4 || dtype == DType::NF4Single; }
int64_t dtype_size(DType dtype);           // bytes per element; Error for NF4, which has none
std::string_view dtype_name(DType dtype);  // "F32", "BF16": the spelling of safetensors

// The 16-bit storage types. Conversion to 16 bits rounds to nearest even, as hardware and PyTorch
// do.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

inline BFloat16 to_bfloat16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};  // NaN stays NaN
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

float to_float(Float16 x);
Float16 to_float16(float f);
inline float to_float(float x) { return x; }

}  // namespace graft
