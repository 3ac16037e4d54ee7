// An NF4 operand of the matrix product (gemm.cpp), which is widened a part at a time.
#pragma once

#include "tensor/cpu/kernels/gemm_kernels.h"
#include "tensor/nf4.h"

namespace graft {

struct Nf4Matrix {
  Nf4View view;
  int64_t cols = 0;
  DType widened = DType::F32;  // or BF16: the dtype of the other operand

  explicit operator bool() const { return view.codes != nullptr; }
  // Rows [row, row + n) and columns [col, col + count), at most 65,000 of these, written to `dst`.
  GemmMatrix widen(const GemmKernels& kernels, void* dst, int64_t row, int64_t n, int64_t col,
                   int64_t count) const;
};

}  // namespace graft
