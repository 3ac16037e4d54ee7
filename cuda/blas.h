// cuBLAS, opened at run time: graft starts and trains where the library is not installed.
// The emulated build has the same functions over a CPU BLAS.
#pragma once

#include <cublas_v2.h>

#include <string>

namespace graft {

// The calls that graft makes, by their names. (cublasGemmEx is overloaded in the toolkit's header.)
struct CublasFunctions {
  decltype(&cublasCreate) create = nullptr;
  decltype(&cublasDestroy) destroy = nullptr;
  decltype(&cublasSetStream) set_stream = nullptr;
  decltype(&cublasSetWorkspace) set_workspace = nullptr;
  cublasStatus_t (*gemm_ex)(cublasHandle_t, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                            int n, int k, const void* alpha, const void* a, cudaDataType, int lda,
                            const void* b, cudaDataType, int ldb, const void* beta, void* c,
                            cudaDataType, int ldc, cublasComputeType_t, cublasGemmAlgo_t) = nullptr;
  std::string path;  // of the library
};

// The library, opened on the first call: GRAFT_CUBLAS where it is set (a file), else that of the
// toolkit, of the loader's path, or of PyTorch's packages. Null where there is none; then `reason`
// says where it was looked for (may be null).
const CublasFunctions* cublas_functions(std::string* reason);

// One line for people: "cublasGemmEx: not supported (15)".
std::string cublas_error(const char* call, cublasStatus_t status);

}  // namespace graft
