// RMSNorm of every head and then its rotation, in one pass; and the gradient, the same backwards:
// dn turns dy by the opposite angle, and from there on it is that of rms_norm.cpp with dn for dy.
#include <cmath>
#include <vector>

#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"
#include "tensor/heads.h"

namespace graft {

using reference::In;
using reference::Out;

namespace {

// Element (token, head, column) of a tensor in either of the two layouts.
class Heads {
 public:
  Heads(const Tensor& t, int64_t head_dim)
      : at_(head_layout(t, head_dim)), dtype_(t.dtype()), data_(t.raw()) {}
  double operator()(int64_t t, int64_t h, int64_t c) const {
    return reference::load(dtype_, data_, t * at_.token_stride + h * at_.head_stride + c);
  }
  void set(int64_t t, int64_t h, int64_t c, double value) {
    reference::store(dtype_, data_, t * at_.token_stride + h * at_.head_stride + c, value);
  }
  int64_t tokens() const { return at_.tokens; }
  int64_t heads() const { return at_.heads; }

 private:
  HeadLayout at_;
  DType dtype_;
  void* data_;
};

int64_t position_of(const Tensor& positions, int64_t t, const Tensor& cos_sin) {
  const int64_t position = positions.data<int32_t>()[t];
  CHECK(position >= 0 && position < cos_sin.size(0), "qk_norm_rope: position ", position,
        " but the table has ", cos_sin.size(0), " rows");
  return position;
}

// The pairs (i, i + D/2) of a head turned by the angles of a row of the table, or by their
// opposites.
std::vector<double> turned(const std::vector<double>& head, const In& table, int64_t position,
                           int direction) {
  const int64_t half = int64_t(head.size()) / 2;
  std::vector<double> result(head.size());
  for (int64_t i = 0; i < half; ++i) {
    const double cosine = table(position, i), sine = direction * table(position, half + i);
    const double first = head[size_t(i)], second = head[size_t(half + i)];
    result[size_t(i)] = first * cosine - second * sine;
    result[size_t(half + i)] = second * cosine + first * sine;
  }
  return result;
}

}  // namespace

void ReferenceBackend::qk_norm_rope_forward(Tensor& y, Tensor& rstd, const Tensor& x,
                                            const Tensor& weight, double eps,
                                            const Tensor& positions, const Tensor& cos_sin) {
  const int64_t D = cos_sin.size(1);
  Heads out(y, D);
  const Heads in(x, D);
  const In table(cos_sin);
  std::vector<double> head(static_cast<size_t>(D));
  for (int64_t t = 0; t < in.tokens(); ++t)
    for (int64_t h = 0; h < in.heads(); ++h) {
      double squares = 0;
      for (int64_t c = 0; c < D; ++c) {
        head[size_t(c)] = in(t, h, c);
        squares += in(t, h, c) * in(t, h, c);
      }
      if (weight.defined()) {
        const double inverse = 1 / std::sqrt(squares / double(D) + eps);
        reference::store(rstd.dtype(), rstd.raw(), t * in.heads() + h, inverse);
        for (int64_t c = 0; c < D; ++c) head[size_t(c)] *= inverse * In(weight)(0, c);
      }
      head = turned(head, table, position_of(positions, t, cos_sin), +1);
      for (int64_t c = 0; c < D; ++c) out.set(t, h, c, head[size_t(c)]);
    }
}

void ReferenceBackend::qk_norm_rope_backward(Tensor& dx, Tensor& dweight, const Tensor& dy,
                                             const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, const Tensor& positions,
                                             const Tensor& cos_sin) {
  const int64_t D = cos_sin.size(1);
  const bool normed = weight.defined();
  const Heads grad(dy, D), in(normed ? x : dy, D);
  const In table(cos_sin);
  std::vector<double> dn(static_cast<size_t>(D));
  for (int64_t t = 0; t < grad.tokens(); ++t)
    for (int64_t h = 0; h < grad.heads(); ++h) {
      for (int64_t c = 0; c < D; ++c) dn[size_t(c)] = grad(t, h, c);
      dn = turned(dn, table, position_of(positions, t, cos_sin), -1);
      const double inverse =
          normed ? reference::load(rstd.dtype(), rstd.raw(), t * grad.heads() + h) : 1;
      if (normed && dweight.defined())
        for (int64_t c = 0; c < D; ++c)
          Out(dweight).add(0, c, dn[size_t(c)] * in(t, h, c) * inverse);
      if (!dx.defined()) continue;
      double mean = 0;  // of n w dn
      for (int64_t c = 0; c < D && normed; ++c)
        mean += in(t, h, c) * inverse * In(weight)(0, c) * dn[size_t(c)] / double(D);
      Heads out(dx, D);
      for (int64_t c = 0; c < D; ++c)
        out.set(t, h, c,
                normed ? inverse * (In(weight)(0, c) * dn[size_t(c)] - in(t, h, c) * inverse * mean)
                       : dn[size_t(c)]);
    }
}

}  // namespace graft
