// RMSNorm of rows: y = x rstd w, rstd = 1 / sqrt(mean x^2 + eps).
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

// sum over i in [0, n) of f(i, lanes), by four accumulators to hide the latency of the addition.
template <class F>
inline float sum_over(int64_t n, F f) {
  Vec sum[4]{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int part = 0; part < 4; ++part) sum[part] += f(i + part * kLanes, Full{});
  for_each_vector(n - i, [&](int64_t j, auto lanes) { sum[0] += f(i + j, lanes); });
  return horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
void forward_row(T* y, float* rstd, const T* x, const float* weight, int64_t cols, float eps) {
  const float squares = sum_over(cols, [&](int64_t i, auto lanes) {
    const Vec v = load(x + i, lanes);
    return v * v;
  });
  const float scale = 1.0f / __builtin_sqrtf(squares / float(cols) + eps);
  *rstd = scale;
  for_each_vector(cols, [&](int64_t i, auto lanes) {
    store(y + i, load(x + i, lanes) * scale * load(weight + i, lanes), lanes);
  });
}

void rms_norm_forward(void* y, int64_t y_stride, float* rstd, const void* x, int64_t x_stride,
                      DType dtype, const float* weight, int64_t rows, int64_t cols, float eps) {
  with_activation(dtype, [&]<class T>(T) {
    for (int64_t r = 0; r < rows; ++r)
      forward_row(static_cast<T*>(y) + r * y_stride, rstd + r,
                  static_cast<const T*>(x) + r * x_stride, weight, cols, eps);
  });
}

// With n = x rstd:  dx = rstd (dy w - n mean(dy w n)),  dweight += dy n.
template <class T>
void backward_row(T* dx, float* dweight, const T* dy, const T* x, const float* weight, float rstd,
                  int64_t cols) {
  if (dweight)
    for_each_vector(cols, [&](int64_t i, auto lanes) {
      const Vec n = load(x + i, lanes) * rstd;
      store(dweight + i, load(dweight + i, lanes) + load(dy + i, lanes) * n, lanes);
    });
  if (!dx) return;
  const float dot = sum_over(cols, [&](int64_t i, auto lanes) {
    return load(dy + i, lanes) * load(weight + i, lanes) * load(x + i, lanes);
  });
  const float factor = dot * rstd * rstd / float(cols);
  for_each_vector(cols, [&](int64_t i, auto lanes) {
    const Vec d = load(dy + i, lanes) * load(weight + i, lanes);
    store(dx + i, rstd * (d - load(x + i, lanes) * factor), lanes);
  });
}

void rms_norm_backward(void* dx, int64_t dx_stride, float* dweight, const void* dy,
                       int64_t dy_stride, const void* x, int64_t x_stride, DType dtype,
                       const float* weight, const float* rstd, int64_t rows, int64_t cols) {
  with_activation(dtype, [&]<class T>(T) {
    for (int64_t r = 0; r < rows; ++r)
      backward_row(dx ? static_cast<T*>(dx) + r * dx_stride : nullptr, dweight,
                   static_cast<const T*>(dy) + r * dy_stride,
                   static_cast<const T*>(x) + r * x_stride, weight, rstd[r], cols);
  });
}

}  // namespace

void install_rms_norm(CpuKernels& kernels) {
  kernels.rms_norm_forward = rms_norm_forward;
  kernels.rms_norm_backward = rms_norm_backward;
}

}  // namespace graft::GRAFT_ISA
