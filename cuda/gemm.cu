// Products of matrices by cuBLAS: by cublasLt (gemm_plan.h) where it has an algorithm, which adds
// c, an addend apart from c and a bias in one pass; else by cublasGemmEx and passes of our own.
// Where there is no cuBLAS, by own_gemm.cu and the same passes. The ladder of products by hand is
// beside it (gemm_by_hand.cu).
#include "cuda/blas.h"
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"
#include "cuda/own_gemm.h"

namespace graft {
namespace {

cudaDataType data_type(DType dtype) {
  CHECK(dtype == DType::F32 || dtype == DType::BF16, "gemm: dtype is ", dtype_name(dtype),
        ", wanted F32 or BF16 on the GPU");
  return dtype == DType::F32 ? CUDA_R_32F : CUDA_R_16BF;
}

// cuBLAS counts in int; a row that stands alone may have any stride, so take one that is allowed.
int leading_dimension(const Tensor& t) {
  const int64_t stride = t.num_rows() <= 1 ? t.cols() : t.row_stride();
  CHECK(stride <= INT32_MAX && t.num_rows() <= INT32_MAX, "gemm: an operand is ", t.shape(),
        ", wanted fewer than 2^31 rows and columns");
  return int(stride > 1 ? stride : 1);
}

// bias_rows: c[r,n] = (addend[r,n] +) bias[n].
//   what a product is then added to, so that the bias costs no pass over the result
// Shapes    c, addend (M, N) F32 or BF16; bias (N) F32, BF16 or F16; rows strided.
// Mapping   a thread owns one column of one row.
// Bytes     MN elements written (and read, with an addend).
// Roofline  - (only models with biases). Measured: -
// Numerics  F32, rounded at the store: the product is then added to a rounded bias.
template <class T, class W>
__global__ void __launch_bounds__(256)
    bias_rows_kernel(T* c, int64_t c_stride, const T* addend, int64_t addend_stride, const W* bias,
                     int64_t cols, unsigned blocks_per_row) {
  const auto [row, col] = row_place<1>(blocks_per_row);
  if (col >= cols) return;
  const float before = addend ? as_float(addend[row * addend_stride + col]) : 0;
  c[row * c_stride + col] = round_to<T>(before + as_float(bias[col]));
}

void fill_with_bias(Tensor& c, const Tensor& addend, const Tensor& bias, cudaStream_t stream) {
  dispatch_activation("gemm", c.dtype(), [&]<class T>(T) {
    dispatch_device(bias.dtype(), [&]<class W>(W) {
      const RowGrid grid = row_grid(c.num_rows(), c.cols(), 1);
      launch(bias_rows_kernel<T, W>, dim3(grid.blocks), dim3(grid.threads), 0, stream,
             device_data<T>(c), c.row_stride(),
             addend.defined() ? device_data<const T>(addend) : nullptr,
             addend.defined() ? addend.row_stride() : int64_t(0), device_data<const W>(bias),
             c.cols(), grid.blocks_per_row);
    });
  });
}

}  // namespace

// Row-major c = op(a) op(b) is column-major c^T = op(b)^T op(a)^T, with every matrix as it lies.
void CudaBackend::add_product_in_place(Tensor& c, const GemmTerm& term, float beta) {
  if (!uses_cublas_) return own_gemm(c, term, beta, stream_);
  const Tensor &a = term.a, &b = term.b;
  const int64_t m = c.num_rows(), n = c.cols(), k = term.transpose_a ? a.num_rows() : a.cols();
  const float alpha = float(term.alpha);
  const cublasStatus_t status = cublas_functions(nullptr)->gemm_ex(
      cublas_, term.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
      term.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, int(n), int(m), int(k), &alpha, b.raw(),
      data_type(b.dtype()), leading_dimension(b), a.raw(), data_type(a.dtype()),
      leading_dimension(a), &beta, c.raw(), data_type(c.dtype()), leading_dimension(c),
      CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  CHECK(status == CUBLAS_STATUS_SUCCESS, cublas_error("cublasGemmEx", status), " for c ", c.shape(),
        " ", dtype_name(c.dtype()), " from a ", a.shape(), " and b ", b.shape(), " ",
        dtype_name(a.dtype()));
}

void CudaBackend::add_product(Tensor& c, const GemmTerm& term, const Tensor& addend,
                              const Tensor& bias) {
  GemmTerm product = term;
  // Tensor cores want operands of one type. b is a weight, or small beside a.
  product.b = widened(term.b, term.a.dtype());
  data_type(term.a.dtype());  // throws for what cannot be multiplied here
  CHECK(c.dtype() == term.a.dtype() || c.dtype() == DType::F32,
        "gemm: ", dtype_name(term.a.dtype()), " operands into ", dtype_name(c.dtype()),
        ", wanted that dtype or F32");
  if (uses_cublas_ && plans_->multiply(c, product, addend, bias)) return;
  if (bias.defined())
    fill_with_bias(c, addend, bias, stream_);
  else if (addend.defined() && addend.raw() != c.raw())
    copy(c, addend);
  add_product_in_place(c, product, bias.defined() || addend.defined() ? 1.0f : 0.0f);
}

void CudaBackend::gemm(Tensor& c, std::span<const GemmTerm> terms, const Tensor& addend,
                       const Tensor& bias) {
  if (c.num_elements() == 0) return;
  Tensor before = addend, still_to_add = bias;  // to the next product
  bool written = false;
  for (const GemmTerm& term : terms) {
    if (term.a.num_elements() == 0) continue;  // K is 0: a sum of nothing
    add_product(c, term, before, still_to_add);
    before = c;
    still_to_add = Tensor();
    written = true;
  }
  if (written) return;
  if (bias.defined())
    fill_with_bias(c, addend, bias, stream_);
  else if (!addend.defined())
    fill(c, 0);
  else if (addend.raw() != c.raw())
    copy(c, addend);
}

}  // namespace graft
