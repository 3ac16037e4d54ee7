// The emulator's headers against CUDA's own: names, values, layouts and signatures. Compiled
// against the stand-ins by `make emulated` and against the real headers by `make test`; where
// both agree with this file, they agree with each other.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#define VALUE(name, value) static_assert(int(name) == value)

// ---- Runtime
VALUE(cudaErrorInvalidValue, 1);
VALUE(cudaErrorMemoryAllocation, 2);
VALUE(cudaErrorInvalidConfiguration, 9);
VALUE(cudaErrorInsufficientDriver, 35);
VALUE(cudaErrorNoDevice, 100);
VALUE(cudaErrorInvalidResourceHandle, 400);
VALUE(cudaErrorIllegalState, 401);
VALUE(cudaErrorNotReady, 600);
VALUE(cudaErrorIllegalAddress, 700);
VALUE(cudaErrorLaunchFailure, 719);
VALUE(cudaErrorNotSupported, 801);
VALUE(cudaErrorStreamCaptureUnsupported, 900);
VALUE(cudaErrorStreamCaptureInvalidated, 901);
VALUE(cudaErrorStreamCaptureMerge, 902);
VALUE(cudaErrorStreamCaptureUnmatched, 903);
VALUE(cudaErrorStreamCaptureUnjoined, 904);
VALUE(cudaErrorStreamCaptureIsolation, 905);
VALUE(cudaErrorStreamCaptureImplicit, 906);
VALUE(cudaErrorCapturedEvent, 907);
VALUE(cudaErrorGraphExecUpdateFailure, 910);
VALUE(cudaFuncAttributeMaxDynamicSharedMemorySize, 8);
VALUE(cudaStreamDefault, 0);
VALUE(cudaStreamNonBlocking, 1);
VALUE(cudaEventDefault, 0);
VALUE(cudaEventBlockingSync, 1);
VALUE(cudaEventDisableTiming, 2);
VALUE(cudaHostAllocDefault, 0);
VALUE(cudaHostAllocPortable, 1);
VALUE(cudaHostAllocMapped, 2);
VALUE(cudaHostAllocWriteCombined, 4);
VALUE(cudaMemcpyHostToHost, 0);
VALUE(cudaMemcpyHostToDevice, 1);
VALUE(cudaMemcpyDeviceToHost, 2);
VALUE(cudaMemcpyDeviceToDevice, 3);
VALUE(cudaMemcpyDefault, 4);
VALUE(cudaStreamCaptureModeGlobal, 0);
VALUE(cudaStreamCaptureModeThreadLocal, 1);
VALUE(cudaStreamCaptureModeRelaxed, 2);
VALUE(cudaStreamCaptureStatusNone, 0);
VALUE(cudaStreamCaptureStatusActive, 1);
VALUE(cudaStreamCaptureStatusInvalidated, 2);
VALUE(cudaGraphExecUpdateSuccess, 0);
VALUE(cudaGraphExecUpdateError, 1);
VALUE(cudaGraphExecUpdateErrorTopologyChanged, 2);
VALUE(cudaGraphExecUpdateErrorNodeTypeChanged, 3);
VALUE(cudaGraphExecUpdateErrorParametersChanged, 5);

#define SIGNATURE(name, ...) static_assert(std::is_same_v<decltype(&name), __VA_ARGS__>)
SIGNATURE(cudaStreamBeginCapture, cudaError_t (*)(cudaStream_t, cudaStreamCaptureMode));
SIGNATURE(cudaStreamEndCapture, cudaError_t (*)(cudaStream_t, cudaGraph_t*));
SIGNATURE(cudaStreamIsCapturing, cudaError_t (*)(cudaStream_t, cudaStreamCaptureStatus*));
// Overloaded in the real header, so that the address must be taken by type.
[[maybe_unused]] constexpr cudaError_t (*instantiate)(cudaGraphExec_t*, cudaGraph_t,
                                                      unsigned long long) = &cudaGraphInstantiate;
[[maybe_unused]] constexpr cudaError_t (*update)(
    cudaGraphExec_t, cudaGraph_t, cudaGraphExecUpdateResultInfo*) = &cudaGraphExecUpdate;
SIGNATURE(cudaGraphLaunch, cudaError_t (*)(cudaGraphExec_t, cudaStream_t));
SIGNATURE(cudaGraphGetNodes, cudaError_t (*)(cudaGraph_t, cudaGraphNode_t*, size_t*));
SIGNATURE(cudaEventElapsedTime, cudaError_t (*)(float*, cudaEvent_t, cudaEvent_t));
SIGNATURE(cudaStreamWaitEvent, cudaError_t (*)(cudaStream_t, cudaEvent_t, unsigned));

// ---- cuBLAS
VALUE(CUBLAS_STATUS_SUCCESS, 0);
VALUE(CUBLAS_STATUS_NOT_INITIALIZED, 1);
VALUE(CUBLAS_STATUS_ALLOC_FAILED, 3);
VALUE(CUBLAS_STATUS_INVALID_VALUE, 7);
VALUE(CUBLAS_STATUS_ARCH_MISMATCH, 8);
VALUE(CUBLAS_STATUS_MAPPING_ERROR, 11);
VALUE(CUBLAS_STATUS_EXECUTION_FAILED, 13);
VALUE(CUBLAS_STATUS_INTERNAL_ERROR, 14);
VALUE(CUBLAS_STATUS_NOT_SUPPORTED, 15);
VALUE(CUBLAS_STATUS_LICENSE_ERROR, 16);
VALUE(CUBLAS_OP_N, 0);
VALUE(CUBLAS_OP_T, 1);
VALUE(CUBLAS_OP_C, 2);
VALUE(CUBLAS_DEFAULT_MATH, 0);
VALUE(CUBLAS_PEDANTIC_MATH, 2);
VALUE(CUBLAS_TF32_TENSOR_OP_MATH, 3);
VALUE(CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, 16);
VALUE(CUDA_R_32F, 0);
VALUE(CUDA_R_64F, 1);
VALUE(CUDA_R_16F, 2);
VALUE(CUDA_R_16BF, 14);
VALUE(CUBLAS_COMPUTE_16F, 64);
VALUE(CUBLAS_COMPUTE_32F, 68);
VALUE(CUBLAS_COMPUTE_32F_PEDANTIC, 69);
VALUE(CUBLAS_COMPUTE_64F, 70);
VALUE(CUBLAS_COMPUTE_32F_FAST_16F, 74);
VALUE(CUBLAS_COMPUTE_32F_FAST_16BF, 75);
VALUE(CUBLAS_COMPUTE_32F_FAST_TF32, 77);
VALUE(CUBLAS_GEMM_DEFAULT, -1);
SIGNATURE(cublasCreate_v2, cublasStatus_t (*)(cublasHandle_t*));
SIGNATURE(cublasDestroy_v2, cublasStatus_t (*)(cublasHandle_t));
SIGNATURE(cublasSetStream_v2, cublasStatus_t (*)(cublasHandle_t, cudaStream_t));
SIGNATURE(cublasSetWorkspace_v2, cublasStatus_t (*)(cublasHandle_t, void*, size_t));
SIGNATURE(cublasSetMathMode, cublasStatus_t (*)(cublasHandle_t, cublasMath_t));
SIGNATURE(cublasGetStatusString, const char* (*)(cublasStatus_t));
[[maybe_unused]] constexpr cublasStatus_t (*gemm_ex)(cublasHandle_t, cublasOperation_t,
                                                     cublasOperation_t, int, int, int, const void*,
                                                     const void*, cudaDataType, int, const void*,
                                                     cudaDataType, int, const void*, void*,
                                                     cudaDataType, int, cublasComputeType_t,
                                                     cublasGemmAlgo_t) = &cublasGemmEx;
[[maybe_unused]] constexpr cublasStatus_t (*gemm_strided)(
    cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void*, const void*,
    cudaDataType, int, long long, const void*, cudaDataType, int, long long, const void*, void*,
    cudaDataType, int, long long, int, cublasComputeType_t,
    cublasGemmAlgo_t) = &cublasGemmStridedBatchedEx;

// ---- cuBLASLt
static_assert(sizeof(cublasLtMatrixLayoutOpaque_t) == 64);
static_assert(sizeof(cublasLtMatmulAlgo_t) == 64);
static_assert(sizeof(cublasLtMatmulDescOpaque_t) == 256);
static_assert(sizeof(cublasLtMatmulPreferenceOpaque_t) == 64);
static_assert(sizeof(cublasLtMatmulHeuristicResult_t) == 96);
static_assert(offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) == 64);
static_assert(offsetof(cublasLtMatmulHeuristicResult_t, state) == 72);
static_assert(offsetof(cublasLtMatmulHeuristicResult_t, wavesCount) == 76);
VALUE(CUBLASLT_POINTER_MODE_HOST, 0);
VALUE(CUBLASLT_POINTER_MODE_DEVICE, 1);
VALUE(CUBLASLT_ORDER_COL, 0);
VALUE(CUBLASLT_ORDER_ROW, 1);
VALUE(CUBLASLT_EPILOGUE_DEFAULT, 1);
VALUE(CUBLASLT_EPILOGUE_BIAS, 4);
VALUE(CUBLASLT_MATRIX_LAYOUT_TYPE, 0);
VALUE(CUBLASLT_MATRIX_LAYOUT_ORDER, 1);
VALUE(CUBLASLT_MATRIX_LAYOUT_ROWS, 2);
VALUE(CUBLASLT_MATRIX_LAYOUT_COLS, 3);
VALUE(CUBLASLT_MATRIX_LAYOUT_LD, 4);
VALUE(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, 5);
VALUE(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, 6);
VALUE(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, 0);
VALUE(CUBLASLT_MATMUL_DESC_SCALE_TYPE, 1);
VALUE(CUBLASLT_MATMUL_DESC_POINTER_MODE, 2);
VALUE(CUBLASLT_MATMUL_DESC_TRANSA, 3);
VALUE(CUBLASLT_MATMUL_DESC_TRANSB, 4);
VALUE(CUBLASLT_MATMUL_DESC_EPILOGUE, 7);
VALUE(CUBLASLT_MATMUL_DESC_BIAS_POINTER, 8);
VALUE(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, 10);
VALUE(CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, 15);
VALUE(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, 26);
VALUE(CUBLASLT_MATMUL_PREF_SEARCH_MODE, 0);
VALUE(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, 1);
SIGNATURE(cublasLtCreate, cublasStatus_t (*)(cublasLtHandle_t*));
SIGNATURE(cublasLtDestroy, cublasStatus_t (*)(cublasLtHandle_t));
SIGNATURE(cublasLtGetVersion, size_t (*)());
SIGNATURE(cublasLtMatmulDescCreate,
          cublasStatus_t (*)(cublasLtMatmulDesc_t*, cublasComputeType_t, cudaDataType_t));
SIGNATURE(cublasLtMatmulDescDestroy, cublasStatus_t (*)(cublasLtMatmulDesc_t));
SIGNATURE(cublasLtMatmulDescSetAttribute,
          cublasStatus_t (*)(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void*,
                             size_t));
SIGNATURE(cublasLtMatrixLayoutCreate,
          cublasStatus_t (*)(cublasLtMatrixLayout_t*, cudaDataType, uint64_t, uint64_t, int64_t));
SIGNATURE(cublasLtMatrixLayoutDestroy, cublasStatus_t (*)(cublasLtMatrixLayout_t));
SIGNATURE(cublasLtMatrixLayoutSetAttribute,
          cublasStatus_t (*)(cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, const void*,
                             size_t));
SIGNATURE(cublasLtMatmulPreferenceCreate, cublasStatus_t (*)(cublasLtMatmulPreference_t*));
SIGNATURE(cublasLtMatmulPreferenceDestroy, cublasStatus_t (*)(cublasLtMatmulPreference_t));
SIGNATURE(cublasLtMatmulPreferenceSetAttribute,
          cublasStatus_t (*)(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                             const void*, size_t));
SIGNATURE(cublasLtMatmulAlgoGetHeuristic,
          cublasStatus_t (*)(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                             cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                             cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t*,
                             int*));
SIGNATURE(cublasLtMatmul,
          cublasStatus_t (*)(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*,
                             cublasLtMatrixLayout_t, const void*, cublasLtMatrixLayout_t,
                             const void*, const void*, cublasLtMatrixLayout_t, void*,
                             cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*, void*, size_t,
                             cudaStream_t));
