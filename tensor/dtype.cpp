#include "tensor/dtype.h"

#include "tensor/check.h"
#include "tensor/device.h"

namespace graft {

int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return 4;
    case DType::BF16:
      return 2;
    case DType::F16:
      return 2;
    case DType::F64:
      return 8;
    case DType::I32:
      return 4;
    case DType::U8:
      return 1;
    case DType::NF4:
    case DType::NF4Single:
      fail("dtype: ", dtype_name(dtype), " lies in blocks and has no bytes per element");
  }
  fail("dtype: unknown value ", int(dtype));
}

std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return "F32";
    case DType::BF16:
      return "BF16";
    case DType::F16:
      return "F16";
    case DType::F64:
      return "F64";
    case DType::I32:
      return "I32";
    case DType::U8:
      return "U8";
    case DType::NF4:
      return "NF4";
    case DType::NF4Single:
      return "NF4 (single)";
  }
  fail("dtype: unknown value ", int(dtype));
}

std::string_view device_name(Device device) {
  switch (device) {
    case Device::CPU:
      return "cpu";
    case Device::CUDA:
      return "cuda";
    case Device::Meta:
      return "meta";
  }
  fail("device: unknown value ", int(device));
}

float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1f;
  const uint32_t fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    const float magnitude = float(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 31 ? sign | 0x7f800000u | fraction << 13
                                       : sign | (exponent + 112) << 23 | fraction << 13;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

Float16 to_float16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};   // NaN
  if (u >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more: infinity
  if (u < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, rounded to even by the FPU's own add
    float magnitude;
    std::memcpy(&magnitude, &u, 4);
    const float shifted = magnitude + 0.5f;  // the last bit of a float in [0.5, 1) is 2^-24
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    return {uint16_t(sign | uint16_t(bits - 0x3f000000u))};
  }
  u += 0xfffu + (u >> 13 & 1);
  return {uint16_t(sign | uint16_t((u >> 13) - (112u << 10)))};
}

}  // namespace graft
