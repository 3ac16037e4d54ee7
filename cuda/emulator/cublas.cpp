// cuBLAS on a CPU BLAS. Both are column-major, so the call maps one to one; bf16 operands are
// widened to float first. Arguments are checked as cuBLAS would, and operands must lie within
// device allocations.
#include "cuda/emulator/cublas_v2.h"

#include <algorithm>
#include <vector>

#include "cuda/emulator/cuda_bf16.h"
#include "cuda/emulator/internal.h"

extern "C" void sgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k,
                       const float* alpha, const float* a, const int* lda, const float* b,
                       const int* ldb, const float* beta, float* c, const int* ldc);

namespace {

size_t element_size(cudaDataType t) { return t == CUDA_R_32F ? 4 : 2; }

// A column-major matrix in device memory.
struct Matrix {
  char* data;
  cudaDataType type;
  int rows, cols, ld;
  bool valid() const {
    if (rows == 0 || cols == 0) return true;
    char* begin;
    size_t bytes;
    if (ld < rows || !emu::find_device_allocation(data, begin, bytes)) return false;
    return data + (static_cast<size_t>(cols - 1) * static_cast<size_t>(ld) +
                   static_cast<size_t>(rows)) *
                      element_size(type) <=
           begin + bytes;
  }
  size_t at(int r, int c) const {
    return static_cast<size_t>(c) * static_cast<size_t>(ld) + static_cast<size_t>(r);
  }
  std::vector<float> load() const {  // packed, ld = rows
    std::vector<float> v;
    v.reserve(static_cast<size_t>(rows) * static_cast<size_t>(cols));
    for (int c = 0; c < cols; ++c)
      for (int r = 0; r < rows; ++r)
        v.push_back(type == CUDA_R_32F
                        ? reinterpret_cast<const float*>(data)[at(r, c)]
                        : float(reinterpret_cast<const __nv_bfloat16*>(data)[at(r, c)]));
    return v;
  }
  void store(const std::vector<float>& v) const {
    auto from = v.begin();
    for (int c = 0; c < cols; ++c)
      for (int r = 0; r < rows; ++r, ++from) {
        if (type == CUDA_R_32F)
          reinterpret_cast<float*>(data)[at(r, c)] = *from;
        else
          reinterpret_cast<__nv_bfloat16*>(data)[at(r, c)] = *from;
      }
    if (emu::on_host_write)
      for (int c = 0; c < cols; ++c)
        emu::on_host_write(data + at(0, c) * element_size(type),
                           static_cast<size_t>(rows) * element_size(type));
  }
};

}  // namespace

cublasStatus_t cublasCreate(cublasHandle_t* handle) {
  *handle = reinterpret_cast<cublasHandle_t>(1);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasSetWorkspace(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t op_a,
                                          cublasOperation_t op_b, int m, int n, int k,
                                          const void* alpha, const void* a, cudaDataType type_a,
                                          int lda, long long stride_a, const void* b,
                                          cudaDataType type_b, int ldb, long long stride_b,
                                          const void* beta, void* c, cudaDataType type_c, int ldc,
                                          long long stride_c, int batch, cublasComputeType_t,
                                          cublasGemmAlgo_t) {
  // cuBLAS wants A and B of one type, and C of that type or wider.
  if (type_a != type_b || (type_a == CUDA_R_32F && type_c != CUDA_R_32F))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  if (!handle || m < 0 || n < 0 || k < 0 || batch < 0) return CUBLAS_STATUS_INVALID_VALUE;
  if (m == 0 || n == 0 || batch == 0) return CUBLAS_STATUS_SUCCESS;
  const bool ta = op_a == CUBLAS_OP_T, tb = op_b == CUBLAS_OP_T;
  const float beta_value = *static_cast<const float*>(beta);
  emu::expose_device_memory(true);
  auto status = CUBLAS_STATUS_SUCCESS;
  for (long long i = 0; i < batch && status == CUBLAS_STATUS_SUCCESS; ++i) {
    auto shifted = [i](const void* p, long long stride, cudaDataType t) {
      return static_cast<char*>(const_cast<void*>(p)) +
             i * stride * static_cast<long long>(element_size(t));
    };
    const Matrix ma{shifted(a, stride_a, type_a), type_a, ta ? k : m, ta ? m : k, lda},
        mb{shifted(b, stride_b, type_b), type_b, tb ? n : k, tb ? k : n, ldb},
        mc{shifted(c, stride_c, type_c), type_c, m, n, ldc};
    if (!ma.valid() || !mb.valid() || !mc.valid()) {
      status = CUBLAS_STATUS_INVALID_VALUE;
      break;
    }
    const std::vector<float> fa = ma.load(), fb = mb.load();
    std::vector<float> fc =
        beta_value != 0 ? mc.load()
                        : std::vector<float>(static_cast<size_t>(m) * static_cast<size_t>(n));
    const int packed_a = std::max(1, ma.rows), packed_b = std::max(1, mb.rows);
    sgemm_(ta ? "T" : "N", tb ? "T" : "N", &m, &n, &k, static_cast<const float*>(alpha), fa.data(),
           &packed_a, fb.data(), &packed_b, &beta_value, fc.data(), &m);
    mc.store(fc);
  }
  emu::expose_device_memory(false);
  return status;
}
