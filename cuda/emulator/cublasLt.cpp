// cuBLASLt on product.cpp. A descriptor keeps its attributes in the opaque struct of the real size.
#include "cuda/emulator/cublasLt.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "cuda/emulator/internal.h"
#include "cuda/emulator/product.h"

struct cublasLtContext {};

using namespace emu;

namespace {

struct Desc {
  cublasComputeType_t compute;
  cudaDataType scale;
  cublasLtPointerMode_t pointer_mode;
  cublasOperation_t op_a, op_b;
  cublasLtEpilogue_t epilogue;
  int32_t sm_count, bias_type;
  void* bias;
  int64_t bias_stride;
};
struct Layout {
  cudaDataType type;
  cublasLtOrder_t order;
  uint64_t rows, cols;
  int64_t ld, stride;
  int32_t batch;
};
struct Preference {
  uint64_t max_workspace;
  int32_t search_mode;
  uint32_t alignment[4];  // of a, b, c, d
};
// In an algorithm: what it was made for, which is all that cuBLASLt promises to run with it.
struct Algo {
  uint64_t magic;
  uint64_t key;
  uint64_t workspace;
  bool halves;
  uint32_t alignment[4];
};
constexpr uint64_t kMagic = 0x6f676c4174666172;
constexpr struct {
  uint64_t workspace;
  bool halves;
} kAlgos[] = {{64 << 10, false}, {0, false}, {16 << 10, true}, {256 << 10, false}};

template <class T, class Opaque>
T& inside(Opaque* opaque) {
  static_assert(sizeof(T) <= sizeof(Opaque));
  return *reinterpret_cast<T*>(opaque->data);
}
template <class T, class Opaque>
cublasStatus_t create(Opaque** opaque, const T& initial) {
  if (!opaque) return CUBLAS_STATUS_INVALID_VALUE;
  *opaque = new Opaque{};
  inside<T>(*opaque) = initial;
  return CUBLAS_STATUS_SUCCESS;
}
template <class Opaque>
cublasStatus_t destroy(Opaque* opaque) {
  delete opaque;
  return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t assign(T& member, const void* value, size_t bytes) {
  if (!value || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&member, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

Matrices matrices(const void* data, const Layout& l) {
  return {static_cast<char*>(const_cast<void*>(data)),
          l.type,
          static_cast<int64_t>(l.rows),
          static_cast<int64_t>(l.cols),
          l.ld,
          l.stride};
}

struct Layouts {
  cublasLtMatrixLayout_t a, b, c, d;
};
// All but the addresses; p is only valid on success.
cublasStatus_t describe(cublasLtMatmulDesc_t opaque, const Layouts& layouts, Product& p) {
  if (!opaque || !layouts.a || !layouts.b || !layouts.c || !layouts.d)
    return CUBLAS_STATUS_INVALID_VALUE;
  const Desc& desc = inside<Desc>(opaque);
  const Layout &a = inside<Layout>(layouts.a), &b = inside<Layout>(layouts.b),
               &c = inside<Layout>(layouts.c), &d = inside<Layout>(layouts.d);
  for (const Layout* l : {&a, &b, &c, &d}) {
    if (l->order != CUBLASLT_ORDER_COL) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (l->batch != d.batch) return CUBLAS_STATUS_INVALID_VALUE;
  }
  const bool bias = desc.epilogue == CUBLASLT_EPILOGUE_BIAS;
  if (desc.scale != CUDA_R_32F || desc.pointer_mode != CUBLASLT_POINTER_MODE_HOST ||
      (!bias && desc.epilogue != CUBLASLT_EPILOGUE_DEFAULT) ||
      (bias && desc.bias_type != -1 && desc.bias_type != d.type))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  p = {matrices(nullptr, a),
       matrices(nullptr, b),
       matrices(nullptr, c),
       matrices(nullptr, d),
       desc.op_a != CUBLAS_OP_N,
       desc.op_b != CUBLAS_OP_N,
       1,
       0,
       desc.compute};
  p.batch = d.batch;
  p.bias = bias ? static_cast<char*>(desc.bias) : nullptr;
  p.bias_stride = desc.bias_stride;
  if (cublasStatus_t s = check_types(p)) return s;
  return check_shapes(p);
}

// Types, transposition and epilogue: an algorithm may serve other sizes.
uint64_t key_of(cublasLtMatmulDesc_t desc, const Product& p) {
  uint64_t key = 1;
  for (int part : {int(p.a.type), int(p.d.type), int(p.transpose_a), int(p.transpose_b),
                   int(p.compute), int(inside<Desc>(desc).epilogue)})
    key = key * 131 + static_cast<uint64_t>(part);
  return key;
}

}  // namespace

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
  *handle = new cublasLtContext;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete handle;
  return handle ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}
size_t cublasLtGetVersion() { return 130000; }

// ---- Descriptors

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  return create(desc, Desc{compute, scale, CUBLASLT_POINTER_MODE_HOST, CUBLAS_OP_N, CUBLAS_OP_N,
                           CUBLASLT_EPILOGUE_DEFAULT, 0, -1, nullptr, 0});
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy(desc); }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t opaque,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  if (!opaque) return CUBLAS_STATUS_INVALID_VALUE;
  Desc& desc = inside<Desc>(opaque);
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
      return assign(desc.compute, value, bytes);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
      return assign(desc.scale, value, bytes);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
      return assign(desc.pointer_mode, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return assign(desc.op_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return assign(desc.op_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return assign(desc.epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return assign(desc.bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE:
      return assign(desc.bias_stride, value, bytes);
    case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET:
      return assign(desc.sm_count, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
      return assign(desc.bias_type, value, bytes);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
  return create(layout, Layout{type, CUBLASLT_ORDER_COL, rows, cols, ld, 0, 1});
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  return destroy(layout);
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t opaque,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, size_t bytes) {
  if (!opaque) return CUBLAS_STATUS_INVALID_VALUE;
  Layout& layout = inside<Layout>(opaque);
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE:
      return assign(layout.type, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
      return assign(layout.order, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
      return assign(layout.rows, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_COLS:
      return assign(layout.cols, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_LD:
      return assign(layout.ld, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
      return assign(layout.batch, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
      return assign(layout.stride, value, bytes);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return create(preference, Preference{0, 0, {256, 256, 256, 256}});
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return destroy(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
  if (!preference) return CUBLAS_STATUS_INVALID_VALUE;
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
    return assign(inside<Preference>(preference).max_workspace, value, bytes);
  if (attribute == CUBLASLT_MATMUL_PREF_SEARCH_MODE)
    return assign(inside<Preference>(preference).search_mode, value, bytes);
  const int operand = int(attribute) - int(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
  if (operand >= 0 && operand < 4)
    return assign(inside<Preference>(preference).alignment[operand], value, bytes);
  return CUBLAS_STATUS_INVALID_VALUE;
}

// ---- Products

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int* found) {
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!preference || !results || !found || wanted <= 0) return CUBLAS_STATUS_INVALID_VALUE;
  *found = 0;
  Product p;
  if (cublasStatus_t s = describe(desc, {a, b, c, d}, p)) return s;
  for (const auto& algo : kAlgos) {
    if (*found == wanted) break;
    if (algo.workspace > inside<Preference>(preference).max_workspace) continue;
    cublasLtMatmulHeuristicResult_t& result = results[(*found)++];
    result = {};
    Algo& made = inside<Algo>(&result.algo);
    made = {kMagic, key_of(desc, p), algo.workspace, algo.halves, {}};
    std::copy_n(inside<Preference>(preference).alignment, 4, made.alignment);
    result.workspaceSize = algo.workspace;
    result.wavesCount = 1;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo,
                              void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!alpha || !beta) return CUBLAS_STATUS_INVALID_VALUE;
  Product p;
  if (cublasStatus_t s = describe(desc, {a_layout, b_layout, c_layout, d_layout}, p)) return s;
  if (inside<Desc>(desc).epilogue == CUBLASLT_EPILOGUE_BIAS && !p.bias)
    return CUBLAS_STATUS_INVALID_VALUE;
  p.alpha = *static_cast<const float*>(alpha);
  p.beta = *static_cast<const float*>(beta);
  const auto bytes_at = [](const void* q) { return static_cast<char*>(const_cast<void*>(q)); };
  p.a.data = bytes_at(a);
  p.b.data = bytes_at(b);
  p.c.data = bytes_at(c);
  p.d.data = bytes_at(d);
  uint64_t needed = 0;
  if (algo) {
    const Algo& chosen = inside<const Algo>(algo);
    if (chosen.magic != kMagic || chosen.key != key_of(desc, p)) return CUBLAS_STATUS_NOT_SUPPORTED;
    const void* operands[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i)
      if (reinterpret_cast<uintptr_t>(operands[i]) % chosen.alignment[i])
        return CUBLAS_STATUS_NOT_SUPPORTED;
    p.halves = chosen.halves;
    needed = chosen.workspace;
  }
  if (cublasStatus_t s = check_addresses(p)) return s;
  const Allocation* memory = find_device_allocation(workspace);
  if (workspace_bytes < needed ||
      (workspace_bytes && (!memory || reinterpret_cast<uintptr_t>(workspace) % 256 ||
                           bytes_at(workspace) + workspace_bytes > memory->begin + memory->bytes)))
    return CUBLAS_STATUS_INVALID_VALUE;
  // The workspace is the algorithm's: what anybody else keeps there is lost.
  if (needed && cudaMemsetAsync(workspace, 0xff, needed, stream))
    return CUBLAS_STATUS_EXECUTION_FAILED;
  return submit_product(stream, p);
}
