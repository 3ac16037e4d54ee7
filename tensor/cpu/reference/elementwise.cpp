// Fills, copies, sums and scalings, element by element.
#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::In;
using reference::Out;

namespace {

template <class F>
void for_each(const Tensor& t, F&& f) {
  const int64_t rows = t.num_rows(), cols = t.cols();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) f(r, c);
}

}  // namespace

void ReferenceBackend::fill(Tensor& dst, double value) {
  Out out(dst);
  for_each(dst, [&](int64_t r, int64_t c) { out.set(r, c, value); });
}

void ReferenceBackend::copy(Tensor& dst, const Tensor& src) {
  CHECK(dst.num_elements() == src.num_elements(), "copy: dst is ", dst.shape(), " but src is ",
        src.shape());
  Out out(dst);
  In in(src);
  // The two may be matrices of different widths: walk by element number.
  const int64_t to_cols = dst.cols(), from_cols = src.cols();
  for (int64_t i = 0; i < dst.num_elements(); ++i)
    out.set(i / to_cols, i % to_cols, in(i / from_cols, i % from_cols));
}

void ReferenceBackend::copy_scaled(std::span<const ScaledCopy> copies) {
  for (const ScaledCopy& one : copies) {
    Tensor dst = one.dst;
    scale(dst, one.src, one.alpha);
  }
}

void ReferenceBackend::add(Tensor& y, const Tensor& a, const Tensor& b) {
  Out out(y);
  In in_a(a), in_b(b);
  for_each(y, [&](int64_t r, int64_t c) { out.set(r, c, in_a(r, c) + in_b(r, c)); });
}

void ReferenceBackend::axpy(Tensor& y, const Tensor& x, double alpha) {
  Out out(y);
  In in(x);
  for_each(y, [&](int64_t r, int64_t c) { out.add(r, c, alpha * in(r, c)); });
}

void ReferenceBackend::scale(Tensor& y, const Tensor& x, double alpha) {
  Out out(y);
  In in(x);
  for_each(y, [&](int64_t r, int64_t c) { out.set(r, c, alpha * in(r, c)); });
}

void ReferenceBackend::scale_by(Tensor& y, const Tensor& x, const Tensor& factor) {
  scale(y, x, factor.item());
}

void ReferenceBackend::add_sum(Tensor& total, const Tensor& x, double alpha) {
  double sum = 0;
  In in(x);
  for_each(x, [&](int64_t r, int64_t c) { sum += in(r, c); });
  total.data<double>()[0] += alpha * sum;
}

void ReferenceBackend::sum_rows(Tensor& db, const Tensor& dy, bool accumulate) {
  Out out(db);
  In in(dy);
  for (int64_t c = 0; c < dy.cols(); ++c) {
    double sum = accumulate ? out.get(0, c) : 0;
    for (int64_t r = 0; r < dy.num_rows(); ++r) sum += in(r, c);
    out.set(0, c, sum);
  }
}

}  // namespace graft
