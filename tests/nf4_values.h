// The inputs of tests/golden/make_nf4.py, by the same formula.
#pragma once

#include "tensor/tensor.h"

namespace graft {

inline Tensor nf4_test_values(int64_t n, int64_t seed) {
  Tensor tensor = Tensor::empty({n}, DType::F32);
  for (int64_t i = 0; i < n; ++i) {
    const auto u = uint32_t(uint64_t(i) * 2654435761u + uint64_t(seed) * 40503u);
    const float x = float(u >> 8) * 0x1p-24f - 0.5f;
    const int64_t block = i / 64;
    const float scale = float(block * 37 % 101 + 1) * 0x1p-7f;
    tensor.data<float>()[i] = block == 2 ? 0.0f : x * scale;
  }
  return tensor;
}

}  // namespace graft
