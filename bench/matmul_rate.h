// What a GPU multiplies at its best: the ceiling that utilisations are shares of, measured in the
// run that quotes it.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include "cuda/cuda_backend.h"

namespace graft {

// FLOP/s of c = a b^T, 8192^3, BF16 in and out, on random numbers (a chip that is limited by its
// power is faster on zeros). The median of five runs of `repeats` products each, after as many for
// the clock to settle.
inline double gpu_matmul_rate(int64_t size = 8192, int repeats = 40) {
  Tensor matrix[3];
  for (uint32_t i = 0; i < 3; ++i) {
    matrix[i] = Tensor::empty({size, size}, DType::BF16, Device::CUDA, Scope::Scratch);
    if (i < 2) cuda_fill_normal(matrix[i], 7, i, 1.0);
  }
  const GemmTerm term{.a = matrix[0], .b = matrix[1], .transpose_b = true};
  const auto run = [&] {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeats; ++i) cuda_backend().gemm(matrix[2], {&term, 1});
    matrix[2].slice_rows(0, 1).slice_cols(0, 1).to(Device::CPU);  // waits for the products
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  run();
  std::vector<double> seconds;
  for (int i = 0; i < 5; ++i) seconds.push_back(run());
  std::sort(seconds.begin(), seconds.end());
  return 2 * double(size) * double(size) * double(size) * repeats / seconds[2];
}

}  // namespace graft
