// RMSNorm of every head of one token and then its rotation: x is read from memory once, and what
// the norm gives is never stored.
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

// What a vector of pairs (i, i + D/2) of a head holds.
struct Pair {
  Vec first, second;
};

template <class T, class Lanes>
inline Pair load_pair(const T* p, int64_t half, Lanes lanes) {
  return {load(p, lanes), load(p + half, lanes)};
}
template <class T, class Lanes>
inline void store_pair(T* p, int64_t half, Pair x, Lanes lanes) {
  store(p, x.first, lanes);
  store(p + half, x.second, lanes);
}
inline Pair turn(Pair x, Vec cosine, Vec sine) {
  return {x.first * cosine - x.second * sine, x.second * cosine + x.first * sine};
}

template <class T>
void forward_head(T* y, float* rstd, const T* x, const float* weight, const float* cos_sin,
                  int64_t half, float eps) {
  Pair squares{};
  for_each_vector(half, [&](int64_t i, auto lanes) {
    const Pair v = load_pair(x + i, half, lanes);
    squares.first += v.first * v.first;
    squares.second += v.second * v.second;
  });
  const float mean = horizontal_sum(squares.first + squares.second) / float(2 * half);
  const float inverse = 1.0f / __builtin_sqrtf(mean + eps);
  *rstd = inverse;
  for_each_vector(half, [&](int64_t i, auto lanes) {
    const Pair v = load_pair(x + i, half, lanes), w = load_pair(weight + i, half, lanes);
    const Pair n{v.first * inverse * w.first, v.second * inverse * w.second};
    const Pair angle = load_pair(cos_sin + i, half, lanes);
    store_pair(y + i, half, turn(n, angle.first, angle.second), lanes);
  });
}

void qk_norm_rope_forward(void* y, int64_t y_stride, float* rstd, const void* x, int64_t x_stride,
                          DType dtype, const float* weight, const float* cos_sin, int64_t heads,
                          int64_t head_dim, float eps) {
  with_activation(dtype, [&]<class T>(T) {
    for (int64_t h = 0; h < heads; ++h)
      forward_head(static_cast<T*>(y) + h * y_stride, rstd + h,
                   static_cast<const T*>(x) + h * x_stride, weight, cos_sin, head_dim / 2, eps);
  });
}

// With dn = dy turned back and n = x rstd:  dx = rstd (dn w - n mean(dn w n)),  dweight += dn n.
template <class T>
void backward_head(T* dx, float* dweight, const T* dy, const T* x, const float* weight, float rstd,
                   const float* cos_sin, int64_t half) {
  const auto turned_back = [&](int64_t i, auto lanes) {
    const Pair angle = load_pair(cos_sin + i, half, lanes);
    return turn(load_pair(dy + i, half, lanes), angle.first, -angle.second);
  };
  Pair dot{};
  for_each_vector(half, [&](int64_t i, auto lanes) {
    const Pair dn = turned_back(i, lanes), v = load_pair(x + i, half, lanes);
    const Pair w = load_pair(weight + i, half, lanes);
    dot.first += dn.first * v.first * w.first;
    dot.second += dn.second * v.second * w.second;
    if (!dweight) return;
    const Pair sum = load_pair(dweight + i, half, lanes);
    store_pair(
        dweight + i, half,
        {sum.first + dn.first * (v.first * rstd), sum.second + dn.second * (v.second * rstd)},
        lanes);
  });
  if (!dx) return;
  const float factor = horizontal_sum(dot.first + dot.second) * rstd * rstd / float(2 * half);
  for_each_vector(half, [&](int64_t i, auto lanes) {
    const Pair dn = turned_back(i, lanes), v = load_pair(x + i, half, lanes);
    const Pair w = load_pair(weight + i, half, lanes);
    store_pair(dx + i, half,
               {rstd * (dn.first * w.first - v.first * factor),
                rstd * (dn.second * w.second - v.second * factor)},
               lanes);
  });
}

void qk_norm_rope_backward(void* dx, int64_t dx_stride, float* dweight, const void* dy,
                           int64_t dy_stride, const void* x, int64_t x_stride, DType dtype,
                           const float* weight, const float* rstd, const float* cos_sin,
                           int64_t heads, int64_t head_dim) {
  with_activation(dtype, [&]<class T>(T) {
    for (int64_t h = 0; h < heads; ++h)
      backward_head(dx ? static_cast<T*>(dx) + h * dx_stride : nullptr, dweight,
                    static_cast<const T*>(dy) + h * dy_stride,
                    static_cast<const T*>(x) + h * x_stride, weight, rstd[h], cos_sin,
                    head_dim / 2);
  });
}

}  // namespace

void install_qk_norm_rope(CpuKernels& kernels) {
  kernels.qk_norm_rope_forward = qk_norm_rope_forward;
  kernels.qk_norm_rope_backward = qk_norm_rope_backward;
}

}  // namespace graft::GRAFT_ISA
