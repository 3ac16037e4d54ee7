// DoRA on the fast CPU backend: how columns are scaled piece by piece, and the norms of rows by the
// factorised form.
#include <algorithm>
#include <cmath>
#include <vector>

#include "tensor/cpu/cpu_backend.h"
#include "tensor/cpu/gemm.h"
#include "tensor/cpu/gemm_nf4.h"
#include "tensor/cpu/kernels/table.h"
#include "tensor/thread_pool.h"

namespace graft {

namespace {

constexpr int64_t kRows = 32;  // of one piece of a kernel over rows

int64_t pieces_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

void check_activation(const char* op, const Tensor& t) {
  CHECK(t.dtype() == DType::F32 || t.dtype() == DType::BF16, op,
        ": the CPU kernel takes F32 or BF16, got ", dtype_name(t.dtype()));
}

// From this row on.
DoraRows rows_of(const Tensor& t, int64_t row) {
  if (!t.defined()) return {nullptr, 0};
  return {static_cast<char*>(t.raw()) + row * t.row_stride() * dtype_size(t.dtype()),
          t.row_stride()};
}

// magnitude / norm of every column; undefined where there is no DoRA.
Tensor factors_of(const DoraScale& dora) {
  if (!dora.norm.defined()) return {};
  const int64_t cols = dora.norm.num_elements();
  Tensor factors = Tensor::empty({cols}, DType::F32, Device::CPU, Scope::Scratch);
  const float *m = dora.magnitude.data<float>(), *norm = dora.norm.data<float>();
  for (int64_t n = 0; n < cols; ++n) factors.data<float>()[n] = norm[n] == 0 ? 0 : m[n] / norm[n];
  return factors;
}
float* from(const Tensor& values) { return values.defined() ? values.data<float>() : nullptr; }

// The sums of columns piece by piece of rows, (pieces, cols); undefined where nobody asks for them.
Tensor partial_sums(const Tensor& dmagnitude, const Tensor& dy) {
  if (!dmagnitude.defined()) return {};
  return Tensor::empty({pieces_of(dy.num_rows(), kRows), dy.cols()}, DType::F32, Device::CPU,
                       Scope::Scratch);
}
float* of_piece(const Tensor& partial, int64_t first_row) {
  return partial.defined() ? partial.data<float>() + first_row / kRows * partial.cols() : nullptr;
}

// sums /= divisors, or 0 where the divisor is.
void divide(const Tensor& sums, const Tensor& divisors) {
  for (int64_t n = 0; n < sums.num_elements(); ++n) {
    const float divisor = divisors.data<float>()[n];
    sums.data<float>()[n] = divisor == 0 ? 0 : sums.data<float>()[n] / divisor;
  }
}

// body(first row, rows).
template <class Body>
void for_each_rows(int64_t rows, const Body& body) {
  thread_pool().run(pieces_of(rows, kRows), [&](int64_t piece, int) {
    body(piece * kRows, std::min(kRows, rows - piece * kRows));
  });
}

}  // namespace

void CpuBackend::dora_scale(Tensor& y, const Tensor& h, const DoraScale& dora, const Tensor& bias,
                            bool accumulate) {
  check_activation("dora_scale", y);
  const Tensor factors = factors_of(dora), wide = bias.defined() ? weight_as_f32(bias) : bias;
  for_each_rows(y.num_rows(), [&](int64_t first, int64_t rows) {
    kernels_.dora_scale(rows_of(y, first), rows_of(h, first), y.dtype(), from(factors), from(wide),
                        rows, y.cols(), accumulate);
  });
}

void CpuBackend::dora_scale_backward(Tensor& dh, Tensor& dmagnitude, const Tensor& dy,
                                     const Tensor& h, const DoraScale& dora, bool of_scaled) {
  check_activation("dora_scale_backward", dy);
  const Tensor factors = factors_of(dora), partial = partial_sums(dmagnitude, dy);
  for_each_rows(dy.num_rows(), [&](int64_t first, int64_t rows) {
    kernels_.dora_scale_backward(rows_of(dh, first), of_piece(partial, first), rows_of(dy, first),
                                 rows_of(h, first), dy.dtype(), from(factors), rows, dy.cols());
  });
  if (!dmagnitude.defined()) return;
  sum_rows(dmagnitude, partial, false);
  divide(dmagnitude, of_scaled ? dora.magnitude : dora.norm);
}

void CpuBackend::dora_swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up,
                                     const DoraScale& of_gate, const DoraScale& of_up) {
  check_activation("dora_swiglu", y);
  const Tensor gate_scale = factors_of(of_gate), up_scale = factors_of(of_up);
  for_each_rows(y.num_rows(), [&](int64_t first, int64_t rows) {
    kernels_.dora_swiglu_forward(rows_of(y, first),
                                 {rows_of(gate, first), rows_of(up, first), from(gate_scale),
                                  from(up_scale), y.dtype(), rows, y.cols()});
  });
}

void CpuBackend::dora_swiglu_backward(Tensor& dgate, Tensor& dup, Tensor& dgate_magnitude,
                                      Tensor& dup_magnitude, const Tensor& dy, const Tensor& gate,
                                      const Tensor& up, const DoraScale& of_gate,
                                      const DoraScale& of_up) {
  check_activation("dora_swiglu_backward", dy);
  const Tensor gate_scale = factors_of(of_gate), up_scale = factors_of(of_up);
  const Tensor gate_partial = partial_sums(dgate_magnitude, dy);
  const Tensor up_partial = partial_sums(dup_magnitude, dy);
  for_each_rows(dy.num_rows(), [&](int64_t first, int64_t rows) {
    kernels_.dora_swiglu_backward(rows_of(dgate, first), rows_of(dup, first),
                                  of_piece(gate_partial, first), of_piece(up_partial, first),
                                  rows_of(dy, first),
                                  {rows_of(gate, first), rows_of(up, first), from(gate_scale),
                                   from(up_scale), dy.dtype(), rows, dy.cols()});
  });
  if (dgate_magnitude.defined()) {
    sum_rows(dgate_magnitude, gate_partial, false);
    divide(dgate_magnitude, of_gate.norm);
  }
  if (dup_magnitude.defined()) {
    sum_rows(dup_magnitude, up_partial, false);
    divide(dup_magnitude, of_up.norm);
  }
}

// NF4: a row at a time, widened.
void CpuBackend::row_squares(Tensor& squares, const Tensor& w) {
  if (is_nf4(w.dtype())) {
    const GemmKernels& widening = gemm_kernels(cpu_choice().path);
    return for_each_rows(w.num_rows(), [&](int64_t first, int64_t rows) {
      std::vector<float> row(size_t(w.cols()));
      for (int64_t n = first; n < first + rows; ++n) {
        Nf4Matrix{nf4_view(w), w.cols(), DType::F32}.widen(widening, row.data(), n, 1, 0, w.cols());
        kernels_.row_squares(squares.data<float>() + n, {row.data(), w.cols()}, DType::F32, 1,
                             w.cols());
      }
    });
  }
  for_each_rows(w.num_rows(), [&](int64_t first, int64_t rows) {
    kernels_.row_squares(squares.data<float>() + first, rows_of(w, first), w.dtype(), rows,
                         w.cols());
  });
}

// P (r, N) = s^2 (A A^T) B^T + 2 s A W^T: W is read once, as in a forward of r rows. Then
// norm[n]^2 = squares[n] + sum_j P[j,n] B[n,j].
void CpuBackend::dora_norms(std::span<const DoraNorm> layers) {
  for (const DoraNorm& layer : layers) {
    const int64_t r = layer.a.size(0), N = layer.b.size(0);
    const double s = layer.scaling;
    Tensor gram = Tensor::empty({r, r}, DType::F32, Device::CPU, Scope::Scratch);
    Tensor p = Tensor::empty({r, N}, DType::F32, Device::CPU, Scope::Scratch);
    const GemmTerm gram_term{.a = layer.a, .b = layer.a, .transpose_b = true};
    gemm(gram, {&gram_term, 1});
    const GemmTerm terms[] = {
        {.a = gram, .b = layer.b, .transpose_b = true, .alpha = s * s},
        {.a = layer.a, .b = layer.weight, .transpose_b = true, .alpha = 2 * s}};
    gemm(p, terms);
    const float *b = layer.b.data<float>(), *squares = layer.squares.data<float>();
    for (int64_t n = 0; n < N; ++n) {
      float sum = squares[n];
      for (int64_t j = 0; j < r; ++j)
        sum += p.data<float>()[j * N + n] * b[n * layer.b.row_stride() + j];
      layer.norm.data<float>()[n] = std::sqrt(std::max(sum, 0.0f));
    }
  }
}

}  // namespace graft
