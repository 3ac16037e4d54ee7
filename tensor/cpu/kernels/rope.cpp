// Rotary position embedding of one token: pairs (i, i + D/2) of each head.
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

void rope(void* y, int64_t y_stride, const void* x, int64_t x_stride, DType dtype,
          const float* cos_sin, int64_t heads, int64_t head_dim, int direction) {
  const int64_t half = head_dim / 2;
  const float sign = float(direction);
  with_activation(dtype, [&]<class T>(T) {
    for_each_vector(half, [&](int64_t i, auto lanes) {
      const Vec c = load(cos_sin + i, lanes);
      const Vec s = load(cos_sin + half + i, lanes) * sign;
      for (int64_t h = 0; h < heads; ++h) {
        const T* from = static_cast<const T*>(x) + h * x_stride + i;
        T* to = static_cast<T*>(y) + h * y_stride + i;
        const Vec a = load(from, lanes), b = load(from + half, lanes);
        store(to, a * c - b * s, lanes);
        store(to + half, b * c + a * s, lanes);
      }
    });
  });
}

}  // namespace

void install_rope(CpuKernels& kernels) { kernels.rope = rope; }

}  // namespace graft::GRAFT_ISA
