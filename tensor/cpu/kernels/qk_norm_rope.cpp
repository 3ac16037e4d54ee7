// RMSNorm of every head of one token and then its rotation: x is read from memory once, and what
// the norm gives is never stored.
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

constexpr int64_t kHeadsAtOnce = 32;

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
float rstd_of(const T* x, int64_t half, float eps) {
  Pair squares{};
  for_each_vector(half, [&](int64_t i, auto lanes) {
    const Pair v = load_pair(x + i, half, lanes);
    squares.first += v.first * v.first;
    squares.second += v.second * v.second;
  });
  const float mean = horizontal_sum(squares.first + squares.second) / float(2 * half);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

// All statistics first: a head's sum over lanes waits for nobody then, and in the second loop the
// angles and the weight are loaded once for all heads.
void qk_norm_rope_forward(void* y, int64_t y_stride, float* rstd, const void* x, int64_t x_stride,
                          DType dtype, const float* weight, const float* cos_sin, int64_t heads,
                          int64_t head_dim, float eps) {
  const int64_t half = head_dim / 2;
  with_activation(dtype, [&]<class T>(T) {
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(y);
    for (int64_t h = 0; h < heads; ++h) rstd[h] = rstd_of(from + h * x_stride, half, eps);
    for_each_vector(half, [&](int64_t i, auto lanes) {
      const Pair w = load_pair(weight + i, half, lanes);
      const Pair angle = load_pair(cos_sin + i, half, lanes);
      for (int64_t h = 0; h < heads; ++h) {
        const Pair v = load_pair(from + h * x_stride + i, half, lanes);
        const Pair n{v.first * rstd[h] * w.first, v.second * rstd[h] * w.second};
        store_pair(to + h * y_stride + i, half, turn(n, angle.first, angle.second), lanes);
      }
    });
  });
}

// With dn = dy turned back and n = x rstd:  dx = rstd (dn w - n mean(dn w n)),  dweight += dn n.
inline Pair turn_back(Pair dy, Pair angle) { return turn(dy, angle.first, -angle.second); }

// mean(dn w n) rstd of one head: what multiplies x in dx / rstd.
template <class T>
float mean_of(const T* dy, const T* x, const float* weight, float rstd, const float* cos_sin,
              int64_t half) {
  Pair dot{};
  for_each_vector(half, [&](int64_t i, auto lanes) {
    const Pair dn = turn_back(load_pair(dy + i, half, lanes), load_pair(cos_sin + i, half, lanes));
    const Pair v = load_pair(x + i, half, lanes), w = load_pair(weight + i, half, lanes);
    dot.first += dn.first * v.first * w.first;
    dot.second += dn.second * v.second * w.second;
  });
  return horizontal_sum(dot.first + dot.second) * rstd * rstd / float(2 * half);
}

// As the forward, some heads at a time: first the means, then the rest for all of them.
template <class T>
void backward_heads(T* dx, int64_t dx_stride, float* dweight, const T* dy, int64_t dy_stride,
                    const T* x, int64_t x_stride, const float* weight, const float* rstd,
                    const float* cos_sin, int64_t heads, int64_t half) {
  float mean[kHeadsAtOnce];
  for (int64_t h = 0; dx && h < heads; ++h)
    mean[h] = mean_of(dy + h * dy_stride, x + h * x_stride, weight, rstd[h], cos_sin, half);
  for_each_vector(half, [&](int64_t i, auto lanes) {
    const Pair w = load_pair(weight + i, half, lanes);
    const Pair angle = load_pair(cos_sin + i, half, lanes);
    Pair sum = dweight ? load_pair(dweight + i, half, lanes) : Pair{};
    for (int64_t h = 0; h < heads; ++h) {
      const Pair dn = turn_back(load_pair(dy + h * dy_stride + i, half, lanes), angle);
      const Pair v = load_pair(x + h * x_stride + i, half, lanes);
      sum.first += dn.first * (v.first * rstd[h]);
      sum.second += dn.second * (v.second * rstd[h]);
      if (dx)
        store_pair(dx + h * dx_stride + i, half,
                   {rstd[h] * (dn.first * w.first - v.first * mean[h]),
                    rstd[h] * (dn.second * w.second - v.second * mean[h])},
                   lanes);
    }
    if (dweight) store_pair(dweight + i, half, sum, lanes);
  });
}

void qk_norm_rope_backward(void* dx, int64_t dx_stride, float* dweight, const void* dy,
                           int64_t dy_stride, const void* x, int64_t x_stride, DType dtype,
                           const float* weight, const float* rstd, const float* cos_sin,
                           int64_t heads, int64_t head_dim) {
  with_activation(dtype, [&]<class T>(T) {
    for (int64_t h = 0; h < heads; h += kHeadsAtOnce)
      backward_heads(dx ? static_cast<T*>(dx) + h * dx_stride : nullptr, dx_stride, dweight,
                     static_cast<const T*>(dy) + h * dy_stride, dy_stride,
                     static_cast<const T*>(x) + h * x_stride, x_stride, weight, rstd + h, cos_sin,
                     heads - h < kHeadsAtOnce ? heads - h : kHeadsAtOnce, head_dim / 2);
  });
}

}  // namespace

void install_qk_norm_rope(CpuKernels& kernels) {
  kernels.qk_norm_rope_forward = qk_norm_rope_forward;
  kernels.qk_norm_rope_backward = qk_norm_rope_backward;
}

}  // namespace graft::GRAFT_ISA
