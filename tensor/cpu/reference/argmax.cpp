// The column of the largest element of each row: what greedy decoding picks.
#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

void ReferenceBackend::argmax_rows(Tensor& indices, const Tensor& x) {
  const reference::In in(x);
  for (int64_t r = 0; r < x.num_rows(); ++r) {
    int32_t best = 0;
    for (int64_t c = 1; c < x.cols(); ++c)
      if (in(r, c) > in(r, best)) best = int32_t(c);
    indices.data<int32_t>()[r] = best;
  }
}

}  // namespace graft
