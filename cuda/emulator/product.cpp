// Products on a CPU BLAS, which is column-major as cuBLAS is. Operands are widened to F32 first,
// the sum is rounded once to the type of the result.
#include "cuda/emulator/product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cuda/emulator/cuda_bf16.h"
#include "cuda/emulator/cuda_fp16.h"
#include "cuda/emulator/internal.h"
#include "cuda/emulator/streams.h"

extern "C" void sgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k,
                       const float* alpha, const float* a, const int* lda, const float* b,
                       const int* ldb, const float* beta, float* c, const int* ldc);

namespace emu {
namespace {

float read(const char* p, cudaDataType type) {
  if (type == CUDA_R_32F) return *reinterpret_cast<const float*>(p);
  if (type == CUDA_R_16F) return __half2float(*reinterpret_cast<const __half*>(p));
  return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(p));
}
void write(char* p, cudaDataType type, float value) {
  if (type == CUDA_R_32F)
    *reinterpret_cast<float*>(p) = value;
  else if (type == CUDA_R_16F)
    *reinterpret_cast<__half*>(p) = __float2half(value);
  else
    *reinterpret_cast<__nv_bfloat16*>(p) = __float2bfloat16(value);
}

// What the tensor cores keep of an F32 operand in the TF32 modes: ten bits of fraction.
float to_tf32(float x) {
  uint32_t u = __float_as_uint(x);
  if (x == x) u += 0xfff + (u >> 13 & 1);
  return __uint_as_float(u & ~0x1fffu);
}

// Matrix i of a batch, packed: ld = rows.
std::vector<float> load(const Matrices& m, int64_t i) {
  std::vector<float> v;
  v.reserve(static_cast<size_t>(m.rows * m.cols));
  const auto size = static_cast<int64_t>(element_size(m.type));
  for (int64_t col = 0; col < m.cols; ++col)
    for (int64_t row = 0; row < m.rows; ++row)
      v.push_back(read(m.data + (i * m.stride + col * m.ld + row) * size, m.type));
  return v;
}
void store(const Matrices& m, int64_t i, const std::vector<float>& v) {
  const auto size = static_cast<int64_t>(element_size(m.type));
  auto from = v.begin();
  for (int64_t col = 0; col < m.cols; ++col) {
    char* column = m.data + (i * m.stride + col * m.ld) * size;
    for (int64_t row = 0; row < m.rows; ++row) write(column + row * size, m.type, *from++);
    if (on_host_write) on_host_write(column, static_cast<size_t>(m.rows * size));
  }
}

bool within_one_allocation(const Matrices& m, int batch) {
  if (m.rows == 0 || m.cols == 0) return true;
  const Allocation* a = find_device_allocation(m.data);
  const int64_t last = (batch - 1) * m.stride + (m.cols - 1) * m.ld + m.rows;
  return a && m.stride >= 0 &&
         last * static_cast<int64_t>(element_size(m.type)) <= a->begin + a->bytes - m.data;
}

// Whether x and y have an element in common; only asked of matrices of one type and leading
// dimension, which slices of one buffer are.
bool overlap(const Matrices& x, const Matrices& y) {
  const auto size = static_cast<int64_t>(element_size(x.type));
  if (x.ld != y.ld || x.type != y.type || (y.data - x.data) % size) return false;
  // y begins this many whole columns and then this many rows after x.
  const int64_t distance = (y.data - x.data) / size;
  const int64_t rows = (distance % x.ld + x.ld) % x.ld, cols = (distance - rows) / x.ld;
  const auto share_columns = [&](int64_t shift) { return shift < x.cols && -shift < y.cols; };
  return (share_columns(cols) && rows < x.rows) ||
         (share_columns(cols + 1) && rows + y.rows > x.ld);  // y's columns run into x's next ones
}

void run_one(const Product& p, int64_t i) {
  std::vector<float> a = load(p.a, i), b = load(p.b, i);
  if (p.compute == CUBLAS_COMPUTE_32F_FAST_TF32)
    for (auto* v : {&a, &b})
      for (float& x : *v) x = to_tf32(x);
  std::vector<float> d =
      p.beta != 0 ? load(p.c, i) : std::vector<float>(static_cast<size_t>(p.d.rows * p.d.cols));
  const int m = static_cast<int>(p.d.rows), n = static_cast<int>(p.d.cols),
            k = static_cast<int>(p.transpose_a ? p.a.rows : p.a.cols);
  const int lda = std::max(1, static_cast<int>(p.a.rows)),
            ldb = std::max(1, static_cast<int>(p.b.rows)), ldd = std::max(1, m);
  float beta = p.beta;
  for (int begin = 0, end = p.halves ? k / 2 : k;; begin = end, end = k, beta = 1) {
    const int part = end - begin;
    sgemm_(p.transpose_a ? "T" : "N", p.transpose_b ? "T" : "N", &m, &n, &part, &p.alpha,
           a.data() + (p.transpose_a ? begin : begin * lda), &lda,
           b.data() + (p.transpose_b ? begin * ldb : begin), &ldb, &beta, d.data(), &ldd);
    if (end == k) break;
  }
  if (p.bias) {
    const Matrices bias{p.bias, p.d.type, p.d.rows, 1, p.d.rows, p.bias_stride};
    const std::vector<float> add = load(bias, i);
    for (size_t at = 0; at < d.size(); ++at) d[at] += add[at % add.size()];
  }
  store(p.d, i, d);
}

}  // namespace

size_t element_size(cudaDataType type) {
  return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2;
}

// The table under cublasLtMatmul in the manual, as far as it concerns F32 sums of real numbers.
cublasStatus_t check_types(const Product& p) {
  const cudaDataType in = p.a.type, out = p.d.type;
  const bool f32 = in == CUDA_R_32F, narrow = in == CUDA_R_16F || in == CUDA_R_16BF;
  const bool plain = p.compute == CUBLAS_COMPUTE_32F || p.compute == CUBLAS_COMPUTE_32F_PEDANTIC;
  const bool fast = p.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
  if (p.b.type != in || p.c.type != out || !(f32 || narrow) || !(plain || (fast && f32)))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  return out == CUDA_R_32F || out == in ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t check_shapes(const Product& p) {
  const auto rows = [](const Matrices& x, bool t) { return t ? x.cols : x.rows; };
  const auto cols = [](const Matrices& x, bool t) { return t ? x.rows : x.cols; };
  bool good = rows(p.a, p.transpose_a) == p.d.rows && cols(p.b, p.transpose_b) == p.d.cols &&
              cols(p.a, p.transpose_a) == rows(p.b, p.transpose_b) && p.c.rows == p.d.rows &&
              p.c.cols == p.d.cols && p.batch >= 0;
  for (const Matrices* x : {&p.a, &p.b, &p.c, &p.d})
    good = good && x->rows >= 0 && x->cols >= 0 && x->ld >= std::max<int64_t>(1, x->rows);
  if (p.batch > 1 && p.d.stride == 0) good = false;  // every product on top of the last
  return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t check_addresses(const Product& p) {
  if (p.d.rows == 0 || p.d.cols == 0 || p.batch == 0) return CUBLAS_STATUS_SUCCESS;
  bool good = within_one_allocation(p.a, p.batch) && within_one_allocation(p.b, p.batch) &&
              within_one_allocation(p.d, p.batch) &&
              (p.beta == 0 || within_one_allocation(p.c, p.batch));
  if (p.bias)
    good = good &&
           within_one_allocation({p.bias, p.d.type, p.d.rows, 1, p.d.rows, p.bias_stride}, p.batch);
  // In place is not possible: a block of d would be written while others still read a or b.
  good = good && !overlap(p.d, p.a) && !overlap(p.d, p.b);
  return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t submit_product(cudaStream_t stream, const Product& p) {
  if (p.d.rows == 0 || p.d.cols == 0 || p.batch == 0) return CUBLAS_STATUS_SUCCESS;
  Work work{Work::kKernel,
            nullptr,
            [p] {
              expose_device_memory(true);
              for (int64_t i = 0; i < p.batch; ++i) run_one(p, i);
              expose_device_memory(false);
              return cudaSuccess;
            },
            {}};
  for (const void* pointer :
       {p.a.data, p.b.data, p.d.data, p.bias, p.beta != 0 ? p.c.data : nullptr})
    if (pointer) work.words.push_back(reinterpret_cast<uintptr_t>(pointer));
  return submit(stream, std::move(work)) ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}

}  // namespace emu
