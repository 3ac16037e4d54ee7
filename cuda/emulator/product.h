// A product of matrices in device memory, as both cuBLAS interfaces describe it. product.cpp.
#pragma once
#include <cstdint>

#include "cuda/emulator/cublas_v2.h"

namespace emu {

// Column-major matrices, one per batch, `stride` elements apart.
struct Matrices {
  char* data;
  cudaDataType type;
  int64_t rows, cols, ld, stride;
};

// d = alpha op(a) op(b) + beta c + bias, with op(a) of (m, k), op(b) of (k, n); c may be d. bias,
// one number for each row of d and of its type, is null if there is none.
struct Product {
  Matrices a, b, c, d;
  bool transpose_a, transpose_b;
  float alpha, beta;
  cublasComputeType_t compute;
  int batch = 1;
  char* bias = nullptr;
  int64_t bias_stride = 0;
  bool halves = false;  // k is summed in two parts
};

size_t element_size(cudaDataType type);
cublasStatus_t check_types(const Product& p);      // which combinations cuBLAS has
cublasStatus_t check_shapes(const Product& p);     // and leading dimensions
cublasStatus_t check_addresses(const Product& p);  // everything lies within device allocations
// Does it, or leaves it to the graph that is being captured. After the checks.
cublasStatus_t submit_product(cudaStream_t stream, const Product& p);

}  // namespace emu
