// DoRA: columns scaled by magnitude / norm, alone and inside SwiGLU, with the sums over rows that
// the gradient of the magnitude is. The norms themselves: dora_norms.cu. The formulas without
// kernels around them: cpu/reference/dora.cpp.
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

constexpr int kThreads = 256;
constexpr int kWalkers = 16;  // threads that share the sum of a column

// magnitude and norm of every column; null: the factor is 1.
struct Factors {
  const float *magnitude, *norm;
};
Factors factors_of(const DoraScale& dora) {
  if (!dora.norm.defined()) return {nullptr, nullptr};
  return {device_data<const float>(dora.magnitude), device_data<const float>(dora.norm)};
}
template <int N>
__device__ void load_factors(float (&g)[N], Factors factors, int64_t col) {
  for (int i = 0; i < N; ++i) {
    g[i] = 1;
    if (!factors.norm) continue;
    const float norm = factors.norm[col + i];
    g[i] = norm == 0 ? 0.0f : factors.magnitude[col + i] / norm;
  }
}

// Where a matrix is cut: a thread owns `width` neighbouring columns of a chunk of rows, so that it
// looks up their factors once. blockIdx.x is a block of columns, blockIdx.y a chunk.
struct Cut {
  dim3 grid, block;
  int64_t chunk_rows;
};
Cut cut(int64_t rows, int64_t cols, int width, int64_t least_rows, int64_t most_chunks) {
  Cut c;
  const int64_t across = (cols + width - 1) / width;
  c.block = dim3(across >= kThreads ? unsigned(kThreads) : 32 * ceil_div(across, 32));
  c.chunk_rows = std::max(least_rows, (rows + most_chunks - 1) / most_chunks);
  c.grid = dim3(ceil_div(across, c.block.x), ceil_div(rows, c.chunk_rows));
  return c;
}
struct Place {
  int64_t col, begin, end;  // the first column, the rows
};
template <int N>
__device__ Place place_of(int64_t rows, int64_t chunk_rows) {
  const int64_t begin = int64_t(blockIdx.y) * chunk_rows;
  const int64_t end = begin + chunk_rows < rows ? begin + chunk_rows : rows;
  return {(int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N, begin, end};
}

// dora_scale.
//   y[t,n] = (y[t,n] +) g[n] h[t,n] + bias[n],   g[n] = magnitude[n] / norm[n] or 0
// Shapes    y, h (T, N) F32 or BF16, rows strided, y may be h; magnitude, norm (N) F32; bias (N).
// Mapping   a thread owns 16 bytes of neighbours, or one element, of a chunk of 16 rows or more.
// Bytes     TN elements read (2TN where it adds), TN written. T=16384, N=4096, BF16: 268 MB.
// Roofline  56 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32, one rounding at the store.
template <class T, class W, int N>
__global__ void __launch_bounds__(kThreads)
    dora_scale_kernel(Rows<T> y, Rows<T> h, Factors factors, const W* bias, int64_t rows,
                      int64_t cols, int64_t chunk_rows, bool accumulate) {
  const auto [col, begin, end] = place_of<N>(rows, chunk_rows);
  if (col >= cols) return;
  float g[N], added[N] = {};
  load_factors<N>(g, factors, col);
  if (bias)
    for (int i = 0; i < N; ++i) added[i] = as_float(bias[col + i]);
  for (int64_t t = begin; t < end; ++t) {
    float x[N], before[N] = {};
    load_floats<N>(x, h.data + t * h.stride + col);
    if (accumulate) load_floats<N>(before, y.data + t * y.stride + col);
    for (int i = 0; i < N; ++i) x[i] = before[i] + g[i] * x[i] + added[i];
    store_floats<N>(y.data + t * y.stride + col, x);
  }
}

// dora_scale_backward, first of two.
//   dh[t,n] = g[n] dy[t,n],   partial[chunk,n] = sum_t dy[t,n] h[t,n] over the rows of a chunk
// Shapes    dh, dy, h (T, N) F32 or BF16, rows strided, dh may be dy or null; partial (chunks, N)
//           F32 or null, and then h is not read.
// Mapping   a thread owns 16 bytes of neighbours, or one element, of a chunk of rows: 32 rows,
//           or so many that there are 256 chunks.
// Bytes     2TN elements read, TN written. T=16384, N=4096, BF16: 403 MB.
// Roofline  84 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32, in an order that follows from T alone; one rounding at the store of dh.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    dora_scale_backward_kernel(Rows<T> dh, float* partial, Rows<T> dy, Rows<T> h, Factors factors,
                               int64_t rows, int64_t cols, int64_t chunk_rows) {
  const auto [col, begin, end] = place_of<N>(rows, chunk_rows);
  if (col >= cols) return;
  float g[N], sum[N] = {};
  load_factors<N>(g, factors, col);
  for (int64_t t = begin; t < end; ++t) {
    float d[N], x[N] = {};
    load_floats<N>(d, dy.data + t * dy.stride + col);
    if (partial) load_floats<N>(x, h.data + t * h.stride + col);
    for (int i = 0; i < N; ++i) {
      sum[i] += d[i] * x[i];
      d[i] *= g[i];
    }
    if (dh.data) store_floats<N>(dh.data + t * dh.stride + col, d);
  }
  if (partial)
    for (int i = 0; i < N; ++i) partial[blockIdx.y * cols + col + i] = sum[i];
}

// dora_swiglu_forward.
//   y[t,n] = silu(g1[n] gate[t,n]) g2[n] up[t,n],   g = magnitude / norm of each, or 1
// Shapes    y, gate, up (T, N) F32 or BF16, rows strided.
// Mapping   as dora_scale.
// Bytes     2TN elements read, TN written: those of swiglu_forward.
// Roofline  294 us at 4.8 TB/s (H200 peak), T=16384, N=14336, BF16. Measured: -
// Numerics  F32, one rounding at the store.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    dora_swiglu_forward_kernel(Rows<T> y, Rows<T> gate, Rows<T> up, Factors of_gate, Factors of_up,
                               int64_t rows, int64_t cols, int64_t chunk_rows) {
  const auto [col, begin, end] = place_of<N>(rows, chunk_rows);
  if (col >= cols) return;
  float g1[N], g2[N];
  load_factors<N>(g1, of_gate, col);
  load_factors<N>(g2, of_up, col);
  for (int64_t t = begin; t < end; ++t) {
    float g[N], u[N];
    load_floats<N>(g, gate.data + t * gate.stride + col);
    load_floats<N>(u, up.data + t * up.stride + col);
    for (int i = 0; i < N; ++i) {
      const float x = g1[i] * g[i];
      g[i] = x * sigmoid(x) * (g2[i] * u[i]);
    }
    store_floats<N>(y.data + t * y.stride + col, g);
  }
}

// dora_swiglu_backward, first of two. With x = g1 gate, s = sigmoid(x):
//   d1 = dy g2 up s (1 + x (1 - s)), d2 = dy x s;   dgate = g1 d1, dup = g2 d2, and the sums over a
//   chunk of rows of d1 gate and d2 up
// Shapes    all (T, N) F32 or BF16, rows strided; dgate, dup may be gate, up, or null; partials
//           (chunks, N) F32 or null.
// Mapping   as dora_scale_backward; a thread reads its elements of a row before it writes them.
// Bytes     3TN elements read, 2TN written: those of swiglu_backward.
// Roofline  489 us at 4.8 TB/s (H200 peak), T=16384, N=14336, BF16. Measured: -
// Numerics  F32, sums in an order that follows from T alone; one rounding at each store.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    dora_swiglu_backward_kernel(Rows<T> dgate, Rows<T> dup, float* gate_partial, float* up_partial,
                                Rows<T> dy, Rows<T> gate, Rows<T> up, Factors of_gate,
                                Factors of_up, int64_t rows, int64_t cols, int64_t chunk_rows) {
  const auto [col, begin, end] = place_of<N>(rows, chunk_rows);
  if (col >= cols) return;
  float g1[N], g2[N], gate_sum[N] = {}, up_sum[N] = {};
  load_factors<N>(g1, of_gate, col);
  load_factors<N>(g2, of_up, col);
  for (int64_t t = begin; t < end; ++t) {
    float d[N], g[N], u[N];
    load_floats<N>(d, dy.data + t * dy.stride + col);
    load_floats<N>(g, gate.data + t * gate.stride + col);
    load_floats<N>(u, up.data + t * up.stride + col);
    for (int i = 0; i < N; ++i) {
      const float x = g1[i] * g[i], s = sigmoid(x);
      const float d1 = d[i] * g2[i] * u[i] * s * (1 + x * (1 - s)), d2 = d[i] * x * s;
      gate_sum[i] += d1 * g[i];
      up_sum[i] += d2 * u[i];
      g[i] = g1[i] * d1;
      u[i] = g2[i] * d2;
    }
    if (dgate.data) store_floats<N>(dgate.data + t * dgate.stride + col, g);
    if (dup.data) store_floats<N>(dup.data + t * dup.stride + col, u);
  }
  for (int i = 0; i < N; ++i) {
    if (gate_partial) gate_partial[blockIdx.y * cols + col + i] = gate_sum[i];
    if (up_partial) up_partial[blockIdx.y * cols + col + i] = up_sum[i];
  }
}

// dora_magnitude_grad, second of two.
//   dmagnitude[n] = sum_chunk partial[chunk,n] / divisor[n], or 0 where the divisor is 0
// Shapes    partial (chunks, N) F32; dmagnitude, divisor (N) F32.
// Mapping   block = 32 columns x 16 walkers; walker w adds chunks w, w + 16, ..., then walker 0
// adds
//           the sums of all in order.
// Bytes     4 chunks N read: 1 / 16 of what the first kernel reads at most.
// Roofline  - (launch latency). Measured: -
// Numerics  F32, in an order that follows from the number of chunks.
__global__ void __launch_bounds__(32 * kWalkers)
    dora_magnitude_grad_kernel(float* dmagnitude, const float* partial, const float* divisor,
                               int64_t chunks, int64_t cols) {
  SHARED_ARRAY(float, sums, kWalkers * 32);
  const int lane = int(threadIdx.x) % 32, walker = int(threadIdx.x) / 32;
  const int64_t col = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (col < cols)
    for (int64_t c = walker; c < chunks; c += kWalkers) sum += partial[c * cols + col];
  sums[walker * 32 + lane] = sum;
  __syncthreads();  // the sums of all walkers are written
  if (walker != 0 || col >= cols) return;
  float total = 0;
  for (int w = 0; w < kWalkers; ++w) total += sums[w * 32 + lane];
  dmagnitude[col] = divisor[col] == 0 ? 0.0f : total / divisor[col];
}

Cut cut_for_sums(const Tensor& dy, int width) {
  return cut(dy.num_rows(), dy.cols(), width, 32, 256);
}
Tensor partial_sums(const Tensor& dmagnitude, const Cut& c) {
  if (!dmagnitude.defined()) return {};
  return Tensor::empty({int64_t(c.grid.y), dmagnitude.num_elements()}, DType::F32, Device::CUDA,
                       Scope::Scratch);
}
float* data_or_null(const Tensor& t) { return t.defined() ? device_data<float>(t) : nullptr; }

void finish_sums(Tensor& dmagnitude, const Tensor& partial, const Tensor& divisor,
                 cudaStream_t stream) {
  if (!dmagnitude.defined()) return;
  const int64_t cols = dmagnitude.num_elements();
  launch(dora_magnitude_grad_kernel, dim3(ceil_div(cols, 32)), dim3(32 * kWalkers), 0, stream,
         device_data<float>(dmagnitude), device_data<const float>(partial),
         device_data<const float>(divisor), partial.size(0), cols);
}

// start(kernel width as a constant): 16 bytes where the rows of all tensors allow it, else 1.
template <class T, class Start>
void with_width(std::initializer_list<Tensor> tensors, const Start& start) {
  constexpr int kWide = kVectorWidth<T>;
  bool wide = true;
  for (const Tensor& t : tensors) wide = wide && (!t.defined() || vector_rows(kWide, t));
  if (wide)
    start(std::integral_constant<int, kWide>{});
  else
    start(std::integral_constant<int, 1>{});
}

}  // namespace

void CudaBackend::dora_scale(Tensor& y, const Tensor& h, const DoraScale& dora, const Tensor& bias,
                             bool accumulate) {
  const DType bias_dtype = bias.defined() ? bias.dtype() : DType::F32;
  dispatch_activation("dora_scale", y.dtype(), [&]<class T>(T) {
    dispatch_device(bias_dtype, [&]<class W>(W) {
      with_width<T>({y, h}, [&]<class Width>(Width) {
        const Cut c = cut(y.num_rows(), y.cols(), Width::value, 16, 4096);
        launch(dora_scale_kernel<T, W, Width::value>, c.grid, c.block, 0, stream_, rows_of<T>(y),
               rows_of<T>(h), factors_of(dora),
               bias.defined() ? device_data<const W>(bias) : nullptr, y.num_rows(), y.cols(),
               c.chunk_rows, accumulate);
      });
    });
  });
}

void CudaBackend::dora_scale_backward(Tensor& dh, Tensor& dmagnitude, const Tensor& dy,
                                      const Tensor& h, const DoraScale& dora, bool of_scaled) {
  dispatch_activation("dora_scale_backward", dy.dtype(), [&]<class T>(T) {
    with_width<T>({dh, dy, h}, [&]<class Width>(Width) {
      const Cut c = cut_for_sums(dy, Width::value);
      const Tensor partial = partial_sums(dmagnitude, c);
      launch(dora_scale_backward_kernel<T, Width::value>, c.grid, c.block, 0, stream_,
             rows_of<T>(dh), data_or_null(partial), rows_of<T>(dy), rows_of<T>(h), factors_of(dora),
             dy.num_rows(), dy.cols(), c.chunk_rows);
      finish_sums(dmagnitude, partial, of_scaled ? dora.magnitude : dora.norm, stream_);
    });
  });
}

void CudaBackend::dora_swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up,
                                      const DoraScale& of_gate, const DoraScale& of_up) {
  dispatch_activation("dora_swiglu", y.dtype(), [&]<class T>(T) {
    with_width<T>({y, gate, up}, [&]<class Width>(Width) {
      const Cut c = cut(y.num_rows(), y.cols(), Width::value, 16, 4096);
      launch(dora_swiglu_forward_kernel<T, Width::value>, c.grid, c.block, 0, stream_,
             rows_of<T>(y), rows_of<T>(gate), rows_of<T>(up), factors_of(of_gate),
             factors_of(of_up), y.num_rows(), y.cols(), c.chunk_rows);
    });
  });
}

void CudaBackend::dora_swiglu_backward(Tensor& dgate, Tensor& dup, Tensor& dgate_magnitude,
                                       Tensor& dup_magnitude, const Tensor& dy, const Tensor& gate,
                                       const Tensor& up, const DoraScale& of_gate,
                                       const DoraScale& of_up) {
  dispatch_activation("dora_swiglu_backward", dy.dtype(), [&]<class T>(T) {
    with_width<T>({dgate, dup, dy, gate, up}, [&]<class Width>(Width) {
      const Cut c = cut_for_sums(dy, Width::value);
      const Tensor gate_partial = partial_sums(dgate_magnitude, c);
      const Tensor up_partial = partial_sums(dup_magnitude, c);
      launch(dora_swiglu_backward_kernel<T, Width::value>, c.grid, c.block, 0, stream_,
             rows_of<T>(dgate), rows_of<T>(dup), data_or_null(gate_partial),
             data_or_null(up_partial), rows_of<T>(dy), rows_of<T>(gate), rows_of<T>(up),
             factors_of(of_gate), factors_of(of_up), dy.num_rows(), dy.cols(), c.chunk_rows);
      finish_sums(dgate_magnitude, gate_partial, of_gate.norm, stream_);
      finish_sums(dup_magnitude, up_partial, of_up.norm, stream_);
    });
  });
}

}  // namespace graft
