// Dropout by the rule of tensor/random.h: the mask of an element follows from its key, row and
// column.
#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"
#include "tensor/random.h"

namespace graft {

using reference::In;
using reference::Out;

void ReferenceBackend::dropout(Tensor& y, const Tensor& x, double p, const DropoutKey& key,
                               bool accumulate) {
  CHECK(p >= 0 && p < 1, "dropout: p is ", p, ", wanted 0 <= p < 1");
  Out out(y);
  In in(x);
  for (int64_t r = 0; r < y.num_rows(); ++r) {
    const uint64_t row = uint64_t(key.first_row + r);
    for (int64_t c = 0; c < y.cols(); ++c) {
      const auto words =
          philox({uint32_t(c / 4), uint32_t(row), key.module, key.step},
                 {uint32_t(key.seed), uint32_t(key.seed >> 32) ^ uint32_t(row >> 32)});
      const bool keep = words[c % 4] >= p * 4294967296.0;
      const double value = keep ? in(r, c) / (1 - p) : 0;
      out.set(r, c, accumulate ? out.get(r, c) + value : value);
    }
  }
}

}  // namespace graft
