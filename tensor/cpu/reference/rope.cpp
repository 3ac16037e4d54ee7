// Rotary position embedding: the pair (i, i + D/2) of every head turns by the angle of its
// position.
#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::In;
using reference::Out;

void ReferenceBackend::rope(Tensor& y, const Tensor& x, const Tensor& positions,
                            const Tensor& cos_sin, int direction) {
  const int64_t T = x.size(0), heads = x.size(1), half = x.size(2) / 2;
  Out out(y);
  In in(x), table(cos_sin);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t position = positions.data<int32_t>()[t];
    CHECK(position >= 0 && position < cos_sin.size(0), "rope: position ", position,
          " but the table has ", cos_sin.size(0), " rows");
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < half; ++i) {
        const int64_t row = t * heads + h;
        const double cosine = table(position, i);
        const double sine = direction * table(position, half + i);
        const double first = in(row, i), second = in(row, half + i);
        out.set(row, i, first * cosine - second * sine);
        out.set(row, half + i, second * cosine + first * sine);
      }
  }
}

}  // namespace graft
