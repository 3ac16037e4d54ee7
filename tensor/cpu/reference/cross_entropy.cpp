// Cross-entropy of the softmax of each row of logits against one label, and its gradient in place:
//   loss = logsumexp(z) - z[label]      dz = scale (softmax(z) - onehot(label))
#include <algorithm>
#include <cmath>

#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::Out;

void ReferenceBackend::cross_entropy(Tensor& losses, Tensor& logits, const Tensor& labels,
                                     double scale, bool with_gradient) {
  const int64_t V = logits.cols();
  Out z(logits), loss(losses);
  for (int64_t n = 0; n < logits.num_rows(); ++n) {
    const int64_t label = labels.data<int32_t>()[n];
    CHECK(label >= 0 && label < V, "cross_entropy: label ", label, " but there are ", V,
          " columns");
    double most = z.get(n, 0);
    for (int64_t c = 1; c < V; ++c) most = std::max(most, z.get(n, c));
    double total = 0;
    for (int64_t c = 0; c < V; ++c) total += std::exp(z.get(n, c) - most);
    loss.set(0, n, most + std::log(total) - z.get(n, label));
    if (!with_gradient) continue;
    for (int64_t c = 0; c < V; ++c) {
      const double p = std::exp(z.get(n, c) - most) / total;
      z.set(n, c, scale * (p - (c == label ? 1 : 0)));
    }
  }
}

}  // namespace graft
