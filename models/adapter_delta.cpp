#include "models/adapter_delta.h"

#include <cmath>

#include "tensor/backend.h"
#include "tensor/thread_pool.h"

namespace graft {

void add_delta(Tensor& merged, const Tensor& w, const AdapterModule& module, double weight) {
  CHECK(
      merged.shape() == w.shape() && module.b.size(0) == w.size(0) && module.a.size(1) == w.size(1),
      "merge: ", module.name, ": the weight is ", w.shape(), " but B is ", module.b.shape(),
      " and A ", module.a.shape());
  const GemmTerm delta{.a = module.b, .b = module.a, .alpha = module.scaling};
  if (!module.magnitude.defined()) {
    GemmTerm weighted = delta;
    weighted.alpha *= weight;
    backend_of(merged).gemm(merged, {&weighted, 1}, merged);
    return;
  }
  const Tensor base = w.to(DType::F32, Scope::Scratch);
  Tensor adapted = Tensor::empty(w.shape(), DType::F32, Device::CPU, Scope::Scratch);
  backend_of(adapted).gemm(adapted, {&delta, 1}, base);
  const int64_t in = w.size(1);
  thread_pool().run(w.size(0), [&](int64_t row, int) {
    const float* v = adapted.data<float>() + row * in;
    const float* from = base.data<float>() + row * in;
    float* to = merged.data<float>() + row * in;
    double squares = 0;
    for (int64_t i = 0; i < in; ++i) squares += double(v[i]) * v[i];
    // A row of length 0 stays 0, as in ops::dora_linear.
    const double m = module.magnitude.data<float>()[row],
                 g = squares > 0 ? m / std::sqrt(squares) : 0;
    for (int64_t i = 0; i < in; ++i) to[i] += float(weight * (g * v[i] - from[i]));
  });
}

}  // namespace graft
