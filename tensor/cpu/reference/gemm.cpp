// c = addend + bias + sum of alpha op(a) op(b): three loops over operands widened to double.
#include <vector>

#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::In;
using reference::Out;

namespace {

// The tensor, transposed where asked for, as a dense row-major matrix. NF4 beside BF16 is rounded
// to BF16.
std::vector<double> widened(const Tensor& t, bool transpose, const Tensor& other) {
  const int64_t rows = t.num_rows(), cols = t.cols();
  const bool narrow = is_nf4(t.dtype()) && other.dtype() == DType::BF16;
  std::vector<double> dense(rows * cols);
  In in(t);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const double value = in(r, c);
      dense[transpose ? c * rows + r : r * cols + c] =
          narrow ? to_float(to_bfloat16(float(value))) : value;
    }
  return dense;
}

}  // namespace

void ReferenceBackend::gemm(Tensor& c, std::span<const GemmTerm> terms, const Tensor& addend,
                            const Tensor& bias) {
  const int64_t M = c.num_rows(), N = c.cols();
  std::vector<double> sum(M * N, 0.0);  // (M, N)
  for (const GemmTerm& term : terms) {
    const int64_t K = term.transpose_a ? term.a.num_rows() : term.a.cols();
    CHECK((term.transpose_a ? term.a.cols() : term.a.num_rows()) == M &&
              (term.transpose_b ? term.b.num_rows() : term.b.cols()) == N &&
              (term.transpose_b ? term.b.cols() : term.b.num_rows()) == K,
          "gemm: c is ", c.shape(), " but a is ", term.a.shape(), " and b is ", term.b.shape());
    const std::vector<double> a = widened(term.a, term.transpose_a, term.b);   // (M, K)
    const std::vector<double> b = widened(term.b, !term.transpose_b, term.a);  // (N, K)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n) {
        double dot = 0;
        for (int64_t k = 0; k < K; ++k) dot += a[m * K + k] * b[n * K + k];
        sum[m * N + n] += term.alpha * dot;
      }
  }
  Out out(c);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double value = sum[m * N + n];
      if (addend.defined()) value += In(addend)(m, n);
      if (bias.defined()) value += In(bias)(0, n);
      out.set(m, n, value);
    }
}

}  // namespace graft
