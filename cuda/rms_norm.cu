// RMSNorm (Zhang & Sennrich 2019) and its gradient, in two variants: 1, a thread per row, is the
// formula; 2, a warp per row, is what the backend runs. With n = x rstd:
//   y = n w      dx = rstd (w dy - n mean(n w dy))      dw = sum over rows of dy n
#include "cuda/rms_norm.h"

#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / 32;  // variant 2

// rms_norm_forward, variant 1: one thread per row.                            (2: one warp per row)
//   y[r,c] = x[r,c] rstd[r] w[c],   rstd[r] = 1 / sqrt(mean over c of x[r,c]^2 + eps)
// Shapes    y, x (R, H) F32 or BF16, rows strided; w (H) F32, BF16 or F16; rstd (R) F32.
// Mapping   thread r owns row r: neighbours read H elements apart, so every load of a warp touches
//           32 lines. That is what variant 2 mends.
// Bytes     as variant 2 if caches held 32 rows per warp; they do not.
// Roofline  as variant 2. Measured: -
// Numerics  squares summed in F32, one after the other; one rounding, at the store.
template <class T, class W>
__global__ void __launch_bounds__(kThreads)
    forward_1_thread(T* y, int64_t y_stride, float* rstd, const T* x, int64_t x_stride, const W* w,
                     int64_t rows, int64_t cols, float eps) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  const T* from = x + row * x_stride;
  float squares = 0;
  for (int64_t c = 0; c < cols; ++c) squares += as_float(from[c]) * as_float(from[c]);
  const float inverse = 1.0f / sqrtf(squares / float(cols) + eps);
  rstd[row] = inverse;
  for (int64_t c = 0; c < cols; ++c)
    y[row * y_stride + c] = round_to<T>(as_float(from[c]) * inverse * as_float(w[c]));
}

// rms_norm_forward, variant 2: one warp per row, 16-byte loads.             (1: one thread per row)
//   as variant 1
// Shapes    as variant 1.
// Mapping   warp k of block b owns row 8b + k; lane l owns the N neighbours from N l on, then on by
//           32 N. N is 16 bytes, or one element where H, a stride or a pointer forbid it.
// Bytes     RH elements read, RH written, 4R. R=16384, H=4096, BF16: 268 MB. The second read of x,
//           8 KB after the first, is expected from cache.
// Roofline  56 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  squares summed in F32, per lane and then over lanes; one rounding, at the store.
template <class T, class W, int N>
__global__ void __launch_bounds__(kThreads)
    forward_2_warp(T* y, int64_t y_stride, float* rstd, const T* x, int64_t x_stride, const W* w,
                   int64_t rows, int64_t cols, float eps) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp, so the sum below stays legal
  const T* from = x + row * x_stride;
  float squares = 0, in[N], scale[N];
  for (int64_t c = lane * N; c < cols; c += 32 * N) {
    load_floats<N>(in, from + c);
    for (int i = 0; i < N; ++i) squares += in[i] * in[i];
  }
  const float inverse = 1.0f / sqrtf(warp_sum(squares) / float(cols) + eps);
  if (lane == 0) rstd[row] = inverse;
  for (int64_t c = lane * N; c < cols; c += 32 * N) {
    load_floats<N>(in, from + c);
    load_floats<N>(scale, w + c);
    for (int i = 0; i < N; ++i) in[i] = in[i] * inverse * scale[i];
    store_floats<N>(y + row * y_stride + c, in);
  }
}

// rms_norm_backward (dx), variant 1: one thread per row.                      (2: one warp per row)
//   dx[r,c] = rstd (w dy - n m),   n = x rstd,   m = mean over c of n w dy
// Shapes    dx, dy, x (R, H) F32 or BF16, rows strided; w (H); rstd (R) F32. dx may be dy or x.
// Mapping   thread r owns row r.
// Bytes     as variant 2 if caches held 32 rows per warp; they do not.
// Roofline  as variant 2. Measured: -
// Numerics  F32, one rounding, at the store.
template <class T, class W>
__global__ void __launch_bounds__(kThreads)
    dx_1_thread(T* dx, int64_t dx_stride, const T* dy, int64_t dy_stride, const T* x,
                int64_t x_stride, const W* w, const float* rstd, int64_t rows, int64_t cols) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  const T *gradient = dy + row * dy_stride, *from = x + row * x_stride;
  const float inverse = rstd[row];
  float dot = 0;
  for (int64_t c = 0; c < cols; ++c)
    dot += as_float(from[c]) * inverse * as_float(w[c]) * as_float(gradient[c]);
  const float mean = dot / float(cols);
  for (int64_t c = 0; c < cols; ++c)
    dx[row * dx_stride + c] = round_to<T>(
        inverse * (as_float(w[c]) * as_float(gradient[c]) - as_float(from[c]) * inverse * mean));
}

// rms_norm_backward (dx), variant 2: one warp per row, 16-byte loads.       (1: one thread per row)
//   as variant 1
// Shapes    as variant 1. dx may be dy or x: a lane reads what it overwrites just before, and the
//           sum over the row comes earlier.
// Mapping   as the forward's variant 2.
// Bytes     2RH elements read, RH written, 4R. R=16384, H=4096, BF16: 403 MB; the second reads of x
//           and dy are expected from cache.
// Roofline  84 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32, the mean summed per lane and then over lanes; one rounding, at the store.
template <class T, class W, int N>
__global__ void __launch_bounds__(kThreads)
    dx_2_warp(T* dx, int64_t dx_stride, const T* dy, int64_t dy_stride, const T* x,
              int64_t x_stride, const W* w, const float* rstd, int64_t rows, int64_t cols) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp
  const T *gradient = dy + row * dy_stride, *from = x + row * x_stride;
  const float inverse = rstd[row];
  float dot = 0, in[N], grad[N], scale[N];
  for (int64_t c = lane * N; c < cols; c += 32 * N) {
    load_floats<N>(in, from + c);
    load_floats<N>(grad, gradient + c);
    load_floats<N>(scale, w + c);
    for (int i = 0; i < N; ++i) dot += in[i] * inverse * scale[i] * grad[i];
  }
  const float mean = warp_sum(dot) / float(cols);
  for (int64_t c = lane * N; c < cols; c += 32 * N) {
    load_floats<N>(in, from + c);
    load_floats<N>(grad, gradient + c);
    load_floats<N>(scale, w + c);
    for (int i = 0; i < N; ++i) in[i] = inverse * (scale[i] * grad[i] - in[i] * inverse * mean);
    store_floats<N>(dx + row * dx_stride + c, in);
  }
}

// rms_norm_backward (dweight), stage 1.
//   partial[k,c] = sum over the rows r of chunk k, in order, of dy[r,c] x[r,c] rstd[r]
// Shapes    dy, x (R, H) F32 or BF16, rows strided; rstd (R); partial (chunks, H) F32.
// Mapping   a thread owns a column of a chunk: neighbours read neighbours. The number of chunks
//           follows from R alone, so that the order of the sum is one, on every device.
// Bytes     2RH elements read, 4 chunks H written. R=16384, H=4096, BF16: 272 MB.
// Roofline  57 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32; chunks of R / 256 rows keep the error of long sums small.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dweight_partial(float* partial, const T* dy, int64_t dy_stride, const T* x, int64_t x_stride,
                    const float* rstd, int64_t rows, int64_t cols, int64_t rows_per_chunk) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= cols) return;
  const int64_t begin = blockIdx.y * rows_per_chunk;
  const int64_t end = begin + rows_per_chunk < rows ? begin + rows_per_chunk : rows;
  float sum = 0;
  for (int64_t r = begin; r < end; ++r)
    sum += as_float(dy[r * dy_stride + c]) * as_float(x[r * x_stride + c]) * rstd[r];
  partial[blockIdx.y * cols + c] = sum;
}

// Stage 2: dweight[c] += sum over k, in order, of partial[k,c]. A thread per column.
__global__ void __launch_bounds__(kThreads)
    dweight_sum(float* dweight, const float* partial, int64_t cols, int chunks) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= cols) return;
  float sum = 0;
  for (int k = 0; k < chunks; ++k) sum += partial[k * cols + c];
  dweight[c] += sum;
}

void launch_dweight(Tensor& dweight, const Tensor& dy, const Tensor& x, const Tensor& rstd,
                    cudaStream_t stream) {
  constexpr int64_t kMinRows = 32, kMaxChunks = 256;
  const int64_t rows = x.num_rows(), cols = x.cols();
  if (rows == 0 || cols == 0) return;
  CHECK(dweight.dtype() == DType::F32, "rms_norm_backward: dweight is ",
        dtype_name(dweight.dtype()), ", wanted F32 on the GPU");
  const int64_t wanted = rows / kMaxChunks + (rows % kMaxChunks != 0);
  const int64_t rows_per_chunk = wanted > kMinRows ? wanted : kMinRows;
  const unsigned chunks = ceil_div(rows, rows_per_chunk);
  Tensor partial = Tensor::empty({int64_t(chunks), cols}, DType::F32, Device::CUDA, Scope::Scratch);
  const unsigned threads = cols >= kThreads ? kThreads : 32 * ceil_div(cols, 32);
  const unsigned blocks = ceil_div(cols, threads);
  dispatch_activation("rms_norm_backward", x.dtype(), [&]<class T>(T) {
    launch(dweight_partial<T>, dim3(blocks, chunks), dim3(threads), 0, stream,
           device_data<float>(partial), device_data<const T>(dy), dy.row_stride(),
           device_data<const T>(x), x.row_stride(), device_data<const float>(rstd), rows, cols,
           rows_per_chunk);
  });
  launch(dweight_sum, dim3(blocks), dim3(threads), 0, stream, device_data<float>(dweight),
         device_data<const float>(partial), cols, int(chunks));
}

void check_variant(const char* op, int variant) {
  CHECK(variant == 1 || variant == 2, op, ": variant ", variant, ", wanted 1 or 2");
}

}  // namespace

void launch_rms_norm_forward(int variant, Tensor& y, Tensor& rstd, const Tensor& x,
                             const Tensor& weight, double eps, cudaStream_t stream) {
  check_variant("rms_norm_forward", variant);
  const int64_t rows = x.num_rows();
  dispatch_activation("rms_norm_forward", x.dtype(), [&]<class T>(T) {
    dispatch_device(weight.dtype(), [&]<class W>(W) {
      constexpr int kWide = kVectorWidth<T>;
      const auto start = [&](auto kernel, int rows_per_block) {
        launch(kernel, dim3(ceil_div(rows, rows_per_block)), dim3(kThreads), 0, stream,
               device_data<T>(y), y.row_stride(), device_data<float>(rstd), device_data<const T>(x),
               x.row_stride(), device_data<const W>(weight), rows, x.cols(), float(eps));
      };
      if (variant == 1)
        start(forward_1_thread<T, W>, kThreads);
      else if (vector_rows(kWide, y, x, weight))
        start(forward_2_warp<T, W, kWide>, kRowsPerBlock);
      else
        start(forward_2_warp<T, W, 1>, kRowsPerBlock);
    });
  });
}

void launch_rms_norm_dx(int variant, Tensor& dx, const Tensor& dy, const Tensor& x,
                        const Tensor& weight, const Tensor& rstd, cudaStream_t stream) {
  check_variant("rms_norm_backward", variant);
  const int64_t rows = x.num_rows();
  dispatch_activation("rms_norm_backward", x.dtype(), [&]<class T>(T) {
    dispatch_device(weight.dtype(), [&]<class W>(W) {
      constexpr int kWide = kVectorWidth<T>;
      const auto start = [&](auto kernel, int rows_per_block) {
        launch(kernel, dim3(ceil_div(rows, rows_per_block)), dim3(kThreads), 0, stream,
               device_data<T>(dx), dx.row_stride(), device_data<const T>(dy), dy.row_stride(),
               device_data<const T>(x), x.row_stride(), device_data<const W>(weight),
               device_data<const float>(rstd), rows, x.cols());
      };
      if (variant == 1)
        start(dx_1_thread<T, W>, kThreads);
      else if (vector_rows(kWide, dx, dy, x, weight))
        start(dx_2_warp<T, W, kWide>, kRowsPerBlock);
      else
        start(dx_2_warp<T, W, 1>, kRowsPerBlock);
    });
  });
}

void CudaBackend::rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                                   double eps) {
  launch_rms_norm_forward(2, y, rstd, x, weight, eps, stream_);
}

void CudaBackend::rms_norm_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                                    const Tensor& weight, const Tensor& rstd) {
  // First: dx may take the place of dy or of x.
  if (dweight.defined()) launch_dweight(dweight, dy, x, rstd, stream_);
  if (dx.defined()) launch_rms_norm_dx(2, dx, dy, x, weight, rstd, stream_);
}

}  // namespace graft
