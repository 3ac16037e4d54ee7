// NF4 (Dettmers et al. 2023): four bits an element for frozen weights, byte for byte as
// bitsandbytes quantises them. The tensor is one line of elements, row after row, in blocks of 64;
// an element is one of 16 values times the absmax of its block. A Tensor of such a dtype has it all
// in one storage, each part from a multiple of 64 bytes on:
//   codes    two elements a byte, the first in the high half
//   DType::NF4, the scales quantised too ("double quantisation"):
//     absmax codes   U8, one a block:  absmax = map[code] * scale[block / 256] + offset
//     scales         F32, one for 256 blocks
//     map            256 F32, and behind it the offset, which is the mean of all absmax
//   DType::NF4Single: absmax F32, one a block
// Views of such a tensor are reshape alone. Backend::copy widens it, Backend::gemm takes it as b.
#pragma once

#include "tensor/tensor.h"

namespace graft {

constexpr int64_t kNf4Block = 64;
extern const float kNf4Values[16];

// Where the parts lie, and in what number.
struct Nf4View {
  uint8_t* codes = nullptr;
  uint8_t* absmax_codes = nullptr;  // NF4; nullptr in NF4Single
  float* scales = nullptr;
  float* map = nullptr;     // 256 values, then the offset
  float* absmax = nullptr;  // NF4Single
  int64_t elements = 0, blocks = 0, groups = 0;
};
// Addresses alone: of a tensor on any device.
Nf4View nf4_view(const Tensor& tensor);
int64_t nf4_bytes(int64_t elements, DType dtype);

// Rounded after the product and after the sum, as bitsandbytes does it: not for files that are
// compiled for fused multiply-adds.
inline float nf4_absmax(const Nf4View& view, int64_t block) {
  if (view.absmax) return view.absmax[block];
  return view.map[view.absmax_codes[block]] * view.scales[block / 256] + view.map[256];
}
inline uint8_t nf4_code(const Nf4View& view, int64_t i) {
  return i % 2 ? view.codes[i / 2] & 15 : view.codes[i / 2] >> 4;
}
// The element in F32.
inline float nf4_value(const Nf4View& view, int64_t i) {
  return kNf4Values[nf4_code(view, i)] * nf4_absmax(view, i / kNf4Block);
}

// The bytes of bitsandbytes.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4",
// compress_statistics=double_quant) on the CPU, in one thread of torch. dense F32, BF16 or F16 on
// the CPU, dense rows, finite; on Device::Meta only its shape counts.
Tensor nf4_quantise(const Tensor& dense, bool double_quant, Scope scope = Scope::Weights);

}  // namespace graft
