// Rows picked by number, and gradients added back to the rows they came from.
#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::In;
using reference::Out;

namespace {

void pick_rows(const char* op, Tensor& dst, const Tensor& src, const Tensor& indices) {
  Out out(dst);
  In in(src);
  for (int64_t i = 0; i < indices.num_elements(); ++i) {
    const int64_t row = indices.data<int32_t>()[i];
    CHECK(row >= 0 && row < src.num_rows(), op, ": row ", row, " of ", src.num_rows());
    for (int64_t c = 0; c < dst.cols(); ++c) out.set(i, c, in(row, c));
  }
}

void add_rows(const char* op, Tensor& dst, const Tensor& src, const Tensor& indices) {
  Out out(dst);
  In in(src);
  for (int64_t i = 0; i < indices.num_elements(); ++i) {
    const int64_t row = indices.data<int32_t>()[i];
    CHECK(row >= 0 && row < dst.num_rows(), op, ": row ", row, " of ", dst.num_rows());
    for (int64_t c = 0; c < dst.cols(); ++c) out.add(row, c, in(i, c));
  }
}

}  // namespace

void ReferenceBackend::embedding_forward(Tensor& y, const Tensor& ids, const Tensor& weight) {
  pick_rows("embedding", y, weight, ids);
}

void ReferenceBackend::embedding_backward(Tensor& dweight, const Tensor& ids, const Tensor& dy) {
  add_rows("embedding_backward", dweight, dy, ids);
}

void ReferenceBackend::gather_rows(Tensor& dst, const Tensor& src, const Tensor& indices) {
  pick_rows("gather_rows", dst, src, indices);
}

void ReferenceBackend::scatter_add_rows(Tensor& dst, const Tensor& src, const Tensor& indices) {
  add_rows("scatter_add_rows", dst, src, indices);
}

}  // namespace graft
