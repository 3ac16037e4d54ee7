// AdamW (Loshchilov & Hutter 2019) in the order of torch.optim.AdamW, and the gradient norm
// with its clipping factor, over flat F32 buffers.
#include <cmath>

#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"
#include "cuda/step_scalars.h"

namespace graft {
namespace {

constexpr int kThreads = 256;

// adamw.
//   w *= 1 - lr wd     m += (1 - b1) (g - m)     v = b2 v + (1 - b2) g^2
//   w -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
// Shapes    w, m, v, g (n) F32; g is multiplied by the one F64 at grad_scale, NaN: nothing is done.
// Mapping   a thread owns N neighbours: 16 bytes, or one element where n or a pointer forbid it.
// Bytes     16n read, 12n written. n = 83.9 M (r=32 on all layers of an 8B model): 2.3 GB.
// Roofline  490 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32 throughout; the constants are rounded from F64.
template <int N>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(float* w, float* m, float* v, const float* g, int64_t n, const double* grad_scale,
                 AdamWConstants given, const AdamWConstants* captured, bool decays) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  const float scale = float(*grad_scale);
  if (at >= n || scale != scale) return;  // NaN
  const AdamWConstants k = captured ? *captured : given;
  const float decay = decays ? k.decay : 1.0f;
  float parameter[N], first[N], second[N], gradient[N];
  load_floats<N>(parameter, w + at);
  load_floats<N>(first, m + at);
  load_floats<N>(second, v + at);
  load_floats<N>(gradient, g + at);
  for (int i = 0; i < N; ++i) {
    const float scaled = gradient[i] * scale;
    first[i] += k.one_minus_beta1 * (scaled - first[i]);
    second[i] = k.beta2 * second[i] + k.one_minus_beta2 * scaled * scaled;
    const float denominator = sqrtf(second[i]) / k.root_correction2 + k.epsilon;
    parameter[i] = parameter[i] * decay - k.step_size * (first[i] / denominator);
  }
  store_floats<N>(w + at, parameter);
  store_floats<N>(m + at, first);
  store_floats<N>(v + at, second);
}

// Every thread gets the sum over the block, added in an order that the schedule does not change.
__device__ double block_sum_f64(double x) {
  SHARED_ARRAY(double, partial, kThreads / 32);
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();  // every warp's partial sum is written
  double total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += partial[warp];
  return total;
}

// sum_of_squares, stage 1.
//   partial[b] = sum of x[i]^2 over i = b kThreads + thread, then on by gridDim.x kThreads
// Shapes    x (n) F32; partial (blocks) F64.
// Mapping   block b walks the buffer with the stride of the grid, N neighbours per thread; the
//           number of blocks follows from n alone, so that the same n gives the same bytes.
// Bytes     4n read. n = 83.9 M: 336 MB.
// Roofline  70 us at 4.8 TB/s (H200 peak); n F64 multiply-adds are 5 us. Measured: -
// Numerics  F64 from the square on.
template <int N>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(double* partial, const float* x, int64_t n) {
  double sum = 0;
  const int64_t stride = int64_t(gridDim.x) * kThreads * N;
  for (int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N; at < n; at += stride) {
    float values[N];
    load_floats<N>(values, x + at);
    for (int i = 0; i < N; ++i) sum += double(values[i]) * double(values[i]);
  }
  const double total = block_sum_f64(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// Stage 2, one block: result = sum of partial (blocks).
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(double* result, const double* partial, int blocks) {
  double sum = 0;
  for (int i = int(threadIdx.x); i < blocks; i += kThreads) sum += partial[i];
  const double total = block_sum_f64(sum);
  if (threadIdx.x == 0) *result = total;
}

// clip_factor, one thread: {loss, sum of squares, -} -> {loss, norm, factor}.
__global__ void clip_factor_kernel(double* outcome, double max_norm) {
  const double loss = outcome[0], norm = sqrt(outcome[1]);
  const double factor = max_norm > 0 ? fmin(1.0, max_norm / (norm + 1e-6)) : 1.0;
  outcome[1] = norm;
  const bool finite = loss - loss == 0 && norm - norm == 0;  // inf - inf is NaN
  outcome[2] = finite ? factor : nan("");
}

void check_flat(const char* op, const char* what, const Tensor& t) {
  CHECK(t.dtype() == DType::F32 && t.is_contiguous(), op, ": ", what, " is ", dtype_name(t.dtype()),
        t.is_contiguous() ? "" : " with strided rows", ", wanted dense F32 on the GPU");
}

bool vectors_fit(const Tensor& t) {
  return t.num_elements() % 4 == 0 && reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0;
}

}  // namespace

AdamWConstants adamw_constants(const AdamWStep& step) {
  const double correction1 = 1 - std::pow(step.beta1, double(step.step));
  const double correction2 = 1 - std::pow(step.beta2, double(step.step));
  return {
      .decay = float(1 - step.rate() * step.weight_decay),
      .one_minus_beta1 = float(1 - step.beta1),
      .beta2 = float(step.beta2),
      .one_minus_beta2 = float(1 - step.beta2),
      .step_size = float(step.rate() / correction1),
      .root_correction2 = float(std::sqrt(correction2)),
      .epsilon = float(step.epsilon),
  };
}

void CudaBackend::sum_of_squares(Tensor& total, const Tensor& x) {
  check_flat("sum_of_squares", "x", x);
  const int64_t n = x.num_elements();
  if (n == 0) return fill(total, 0);
  constexpr int64_t kPerBlock = 4096, kMaxBlocks = 1024;
  const int blocks = int(n > kPerBlock * kMaxBlocks ? kMaxBlocks : ceil_div(n, kPerBlock));
  Tensor sums = Tensor::empty({blocks}, DType::F64, Device::CUDA, Scope::Scratch);
  double* partial = device_data<double>(sums);
  launch(vectors_fit(x) ? squares_kernel<4> : squares_kernel<1>, dim3(unsigned(blocks)),
         dim3(kThreads), 0, stream_, partial, device_data<const float>(x), n);
  launch(sum_partials_kernel, dim3(1), dim3(kThreads), 0, stream_, device_data<double>(total),
         static_cast<const double*>(partial), blocks);
}

void CudaBackend::clip_factor(Tensor& outcome, double max_norm) {
  CHECK(outcome.dtype() == DType::F64 && outcome.num_elements() == 3, "clip_factor: outcome is ",
        dtype_name(outcome.dtype()), " ", outcome.shape(), ", wanted three F64 on the GPU");
  launch(clip_factor_kernel, dim3(1), dim3(1), 0, stream_, device_data<double>(outcome), max_norm);
}

void CudaBackend::adamw(Tensor& parameter, Tensor& m, Tensor& v, const Tensor& gradient,
                        const Tensor& grad_scale, const AdamWStep& step) {
  check_flat("adamw", "parameter", parameter);
  check_flat("adamw", "m", m);
  check_flat("adamw", "v", v);
  check_flat("adamw", "gradient", gradient);
  CHECK(grad_scale.dtype() == DType::F64 && grad_scale.num_elements() == 1, "adamw: grad_scale is ",
        dtype_name(grad_scale.dtype()), " ", grad_scale.shape(), ", wanted one F64 on the GPU");
  const bool wide =
      vectors_fit(parameter) && vectors_fit(m) && vectors_fit(v) && vectors_fit(gradient);
  const int64_t n = parameter.num_elements();
  launch(wide ? adamw_kernel<4> : adamw_kernel<1>, dim3(ceil_div(n, kThreads * (wide ? 4 : 1))),
         dim3(kThreads), 0, stream_, device_data<float>(parameter), device_data<float>(m),
         device_data<float>(v), device_data<const float>(gradient), n,
         device_data<const double>(grad_scale), adamw_constants(step), captured_adamw(step),
         step.weight_decay != 0);
}

}  // namespace graft
