// SwiGLU: y = silu(gate) * up, silu(g) = g * sigmoid(g), silu'(g) = s + g s (1 - s) with s =
// sigmoid(g).
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

inline Vec sigmoid(Vec g) { return 1.0f / (1.0f + exp(-g)); }

void swiglu_forward(void* y, const void* gate, const void* up, DType dtype, int64_t n) {
  with_activation(dtype, [&]<class T>(T) {
    for_each_vector(n, [&](int64_t i, auto lanes) {
      const Vec g = load(static_cast<const T*>(gate) + i, lanes);
      const Vec u = load(static_cast<const T*>(up) + i, lanes);
      store(static_cast<T*>(y) + i, g * sigmoid(g) * u, lanes);
    });
  });
}

void swiglu_backward(void* dgate, void* dup, const void* dy, const void* gate, const void* up,
                     DType dtype, int64_t n) {
  with_activation(dtype, [&]<class T>(T) {
    for_each_vector(n, [&](int64_t i, auto lanes) {
      const Vec d = load(static_cast<const T*>(dy) + i, lanes);
      const Vec g = load(static_cast<const T*>(gate) + i, lanes);
      const Vec u = load(static_cast<const T*>(up) + i, lanes);
      const Vec s = sigmoid(g);
      if (dgate) store(static_cast<T*>(dgate) + i, d * u * (s + g * s * (1.0f - s)), lanes);
      if (dup) store(static_cast<T*>(dup) + i, d * g * s, lanes);
    });
  });
}

}  // namespace

void install_swiglu(CpuKernels& kernels) {
  kernels.swiglu_forward = swiglu_forward;
  kernels.swiglu_backward = swiglu_backward;
}

}  // namespace graft::GRAFT_ISA
