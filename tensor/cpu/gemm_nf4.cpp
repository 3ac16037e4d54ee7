#include "tensor/cpu/gemm_nf4.h"

#include <algorithm>
#include <array>

namespace graft {

// The scales are worked out here and not in the kernels: an instruction set with fused
// multiply-adds would round them once where bitsandbytes rounds twice.
GemmMatrix Nf4Matrix::widen(const GemmKernels& kernels, void* dst, int64_t row, int64_t n,
                            int64_t col, int64_t count) const {
  std::array<float, 1024> scales;
  const int64_t per_row = (count + kNf4Block - 2) / kNf4Block + 1;  // blocks that a row may touch
  const int64_t step = int64_t(scales.size()) / per_row, row_bytes = count * dtype_size(widened);
  for (int64_t done = 0; done < n; done += step) {
    const int64_t rows = std::min(step, n - done), first = (row + done) * cols + col;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t begin = first + i * cols, last = (begin + count - 1) / kNf4Block;
      for (int64_t block = begin / kNf4Block, at = i * per_row; block <= last; ++block, ++at)
        scales[size_t(at)] = nf4_absmax(view, block);
    }
    kernels.widen_nf4(static_cast<char*>(dst) + done * row_bytes, widened,
                      {view.codes, first, cols, rows, count, scales.data(), per_row});
  }
  return {dst, count, widened};
}

}  // namespace graft
