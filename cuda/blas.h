// cuBLAS, opened at run time: graft starts and trains where the library is not installed.
// The emulated build has the same functions over a CPU BLAS.
#pragma once

#include <cublasLt.h>
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

// The same of cublasLt, which lies beside cuBLAS: products with C apart from D, a bias, and a
// choice among algorithms (cuda/gemm_plan.h).
struct CublasLtFunctions {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtGetVersion) version = nullptr;
  decltype(&cublasLtMatmulDescCreate) create_desc = nullptr;
  decltype(&cublasLtMatmulDescDestroy) destroy_desc = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_desc = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) create_layout = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) find_algorithms = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
};

// The library, opened on the first call: GRAFT_CUBLAS where it is set (a file, or "none"), else
// that of the toolkit, of the loader's path, or of PyTorch's packages. Null where there is none:
// products are then those of own_gemm.h, and `reason` says where it was looked for (may be null).
const CublasFunctions* cublas_functions(std::string* reason);
// Null where cublasLt is not beside the cuBLAS that was opened: products then go by cublasGemmEx.
const CublasLtFunctions* cublas_lt_functions();

// One line for people: "cublasGemmEx: not supported (15)".
std::string cublas_error(const char* call, cublasStatus_t status);

}  // namespace graft
