// DoRA: columns scaled by g = magnitude / norm, alone and inside SwiGLU, and the norm of the rows
// of W + s B A, here by its definition.
#include <algorithm>
#include <cmath>

#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::In;
using reference::Out;

namespace {

double over(double a, double b) { return b == 0 ? 0 : a / b; }

struct Factors {
  std::vector<double> g, norm, magnitude;  // of every column
  Factors(const DoraScale& dora, int64_t cols) {
    g.assign(size_t(cols), 1);
    if (!dora.norm.defined()) return;
    norm = dora.norm.to_doubles();
    magnitude = dora.magnitude.to_doubles();
    for (size_t c = 0; c < g.size(); ++c) g[c] = over(magnitude[c], norm[c]);
  }
};

double silu(double x) { return x / (1 + std::exp(-x)); }
double silu_slope(double x) {
  const double s = 1 / (1 + std::exp(-x));
  return s * (1 + x * (1 - s));
}

}  // namespace

void ReferenceBackend::dora_scale(Tensor& y, const Tensor& h, const DoraScale& dora,
                                  const Tensor& bias, bool accumulate) {
  const Factors factors(dora, y.cols());
  Out out(y);
  In in(h);
  for (int64_t t = 0; t < y.num_rows(); ++t)
    for (int64_t n = 0; n < y.cols(); ++n) {
      const double before = accumulate ? out.get(t, n) : 0;
      const double b = bias.defined() ? In(bias)(0, n) : 0;
      out.set(t, n, before + factors.g[size_t(n)] * in(t, n) + b);
    }
}

void ReferenceBackend::dora_scale_backward(Tensor& dh, Tensor& dmagnitude, const Tensor& dy,
                                           const Tensor& h, const DoraScale& dora, bool of_scaled) {
  const Factors factors(dora, dy.cols());
  In grad(dy);
  for (int64_t n = 0; n < dy.cols(); ++n) {
    double sum = 0;
    for (int64_t t = 0; t < dy.num_rows(); ++t) {
      const double d = grad(t, n);
      if (dmagnitude.defined()) sum += d * In(h)(t, n);
      if (dh.defined()) Out(dh).set(t, n, factors.g[size_t(n)] * d);
    }
    if (!dmagnitude.defined()) continue;
    const double divisor = of_scaled ? factors.magnitude[size_t(n)] : factors.norm[size_t(n)];
    Out(dmagnitude).set(0, n, over(sum, divisor));
  }
}

void ReferenceBackend::dora_swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up,
                                           const DoraScale& of_gate, const DoraScale& of_up) {
  const Factors first(of_gate, y.cols()), second(of_up, y.cols());
  Out out(y);
  In in_gate(gate), in_up(up);
  for (int64_t t = 0; t < y.num_rows(); ++t)
    for (int64_t n = 0; n < y.cols(); ++n)
      out.set(t, n, silu(first.g[size_t(n)] * in_gate(t, n)) * second.g[size_t(n)] * in_up(t, n));
}

void ReferenceBackend::dora_swiglu_backward(Tensor& dgate, Tensor& dup, Tensor& dgate_magnitude,
                                            Tensor& dup_magnitude, const Tensor& dy,
                                            const Tensor& gate, const Tensor& up,
                                            const DoraScale& of_gate, const DoraScale& of_up) {
  const Factors first(of_gate, dy.cols()), second(of_up, dy.cols());
  In grad(dy), in_gate(gate), in_up(up);
  for (int64_t n = 0; n < dy.cols(); ++n) {
    const double g1 = first.g[size_t(n)], g2 = second.g[size_t(n)];
    double gate_sum = 0, up_sum = 0;
    for (int64_t t = 0; t < dy.num_rows(); ++t) {
      // All three are read before anything is written: the outputs may be the inputs.
      const double d = grad(t, n), h1 = in_gate(t, n), h2 = in_up(t, n);
      const double d1 = d * g2 * h2 * silu_slope(g1 * h1), d2 = d * silu(g1 * h1);
      gate_sum += d1 * h1;
      up_sum += d2 * h2;
      if (dgate.defined()) Out(dgate).set(t, n, g1 * d1);
      if (dup.defined()) Out(dup).set(t, n, g2 * d2);
    }
    if (dgate_magnitude.defined())
      Out(dgate_magnitude).set(0, n, over(gate_sum, first.norm[size_t(n)]));
    if (dup_magnitude.defined()) Out(dup_magnitude).set(0, n, over(up_sum, second.norm[size_t(n)]));
  }
}

void ReferenceBackend::row_squares(Tensor& squares, const Tensor& w) {
  Out out(squares);
  In in(w);
  for (int64_t n = 0; n < w.num_rows(); ++n) {
    double sum = 0;
    for (int64_t k = 0; k < w.cols(); ++k) sum += in(n, k) * in(n, k);
    out.set(0, n, sum);
  }
}

void ReferenceBackend::dora_norms(std::span<const DoraNorm> layers) {
  for (const DoraNorm& layer : layers) {
    Tensor norm = layer.norm;
    Out out(norm);
    In w(layer.weight), a(layer.a), b(layer.b);
    for (int64_t n = 0; n < layer.weight.num_rows(); ++n) {
      double sum = 0;
      for (int64_t k = 0; k < layer.weight.cols(); ++k) {
        double element = w(n, k);
        for (int64_t j = 0; j < layer.a.size(0); ++j) element += layer.scaling * b(n, j) * a(j, k);
        sum += element * element;
      }
      out.set(0, n, std::sqrt(sum));
    }
  }
}

}  // namespace graft
