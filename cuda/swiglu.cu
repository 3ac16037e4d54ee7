// SwiGLU and its gradient, elementwise (the formulas: cpu/reference/swiglu.cpp).
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

// swiglu_forward.
//   y[t,i] = g s(g) up[t,i],   g = gate[t,i],   s(g) = 1 / (1 + exp(-g))
// Shapes    y, gate, up (T, I) F32 or BF16, rows strided.
// Mapping   a thread owns N neighbours of a row: 16 bytes, or one element where rows do not allow
//           it; blocks do not span rows; dense tensors are one row of T I elements.
// Bytes     2TI elements read, TI written. T=16384, I=14336, BF16: 1.4 GB.
// Roofline  294 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32, one rounding at the store. exp(-g) may overflow to infinity: then s is 0.
template <class T, int N>
__global__ void __launch_bounds__(256)
    swiglu_forward_kernel(Rows<T> y, Rows<T> gate, Rows<T> up, int64_t cols,
                          unsigned blocks_per_row) {
  const auto [row, col] = row_place<N>(blocks_per_row);
  if (col >= cols) return;
  float g[N], u[N];
  load_floats<N>(g, gate.data + row * gate.stride + col);
  load_floats<N>(u, up.data + row * up.stride + col);
  for (int i = 0; i < N; ++i) g[i] = g[i] * sigmoid(g[i]) * u[i];
  store_floats<N>(y.data + row * y.stride + col, g);
}

// swiglu_backward.
//   dgate = dy up s (1 + g (1 - s)),   dup = dy g s
// Shapes    as forward; dgate or dup may be null. They may be gate and up: a thread reads its
//           elements of all three before it writes any, and nobody else reads them.
// Mapping   as forward.
// Bytes     3TI elements read, 2TI written. T=16384, I=14336, BF16: 2.3 GB.
// Roofline  489 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32, one rounding at each store.
template <class T, int N>
__global__ void __launch_bounds__(256)
    swiglu_backward_kernel(Rows<T> dgate, Rows<T> dup, Rows<T> dy, Rows<T> gate, Rows<T> up,
                           int64_t cols, unsigned blocks_per_row) {
  const auto [row, col] = row_place<N>(blocks_per_row);
  if (col >= cols) return;
  float d[N], g[N], u[N], dg[N], du[N];
  load_floats<N>(d, dy.data + row * dy.stride + col);
  load_floats<N>(g, gate.data + row * gate.stride + col);
  load_floats<N>(u, up.data + row * up.stride + col);
  for (int i = 0; i < N; ++i) {
    const float s = sigmoid(g[i]);
    dg[i] = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
    du[i] = d[i] * g[i] * s;
  }
  if (dgate.data) store_floats<N>(dgate.data + row * dgate.stride + col, dg);
  if (dup.data) store_floats<N>(dup.data + row * dup.stride + col, du);
}

// Whether the tensors that are defined are dense: then rows need not be told apart.
template <class... Tensors>
bool all_dense(const Tensors&... tensors) {
  return (... && (!tensors.defined() || tensors.is_contiguous()));
}

}  // namespace

void CudaBackend::swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up) {
  const bool dense = all_dense(y, gate, up);
  const int64_t rows = dense ? 1 : y.num_rows(), cols = dense ? y.num_elements() : y.cols();
  dispatch_activation("swiglu_forward", y.dtype(), [&]<class T>(T) {
    constexpr int kWide = kVectorWidth<T>;
    const auto start = [&](auto kernel, int width) {
      const RowGrid grid = row_grid(rows, cols, width);
      launch(kernel, dim3(grid.blocks), dim3(grid.threads), 0, stream_, rows_of<T>(y),
             rows_of<T>(gate), rows_of<T>(up), cols, grid.blocks_per_row);
    };
    if (vector_rows(kWide, y, gate, up))
      start(swiglu_forward_kernel<T, kWide>, kWide);
    else
      start(swiglu_forward_kernel<T, 1>, 1);
  });
}

void CudaBackend::swiglu_backward(Tensor& dgate, Tensor& dup, const Tensor& dy, const Tensor& gate,
                                  const Tensor& up) {
  const bool dense = all_dense(dgate, dup, dy, gate, up);
  const int64_t rows = dense ? 1 : dy.num_rows(), cols = dense ? dy.num_elements() : dy.cols();
  dispatch_activation("swiglu_backward", dy.dtype(), [&]<class T>(T) {
    constexpr int kWide = kVectorWidth<T>;
    const auto start = [&](auto kernel, int width) {
      const RowGrid grid = row_grid(rows, cols, width);
      launch(kernel, dim3(grid.blocks), dim3(grid.threads), 0, stream_, rows_of<T>(dgate),
             rows_of<T>(dup), rows_of<T>(dy), rows_of<T>(gate), rows_of<T>(up), cols,
             grid.blocks_per_row);
    };
    if (vector_rows(kWide, dy, gate, up) && (!dgate.defined() || vector_rows(kWide, dgate)) &&
        (!dup.defined() || vector_rows(kWide, dup)))
      start(swiglu_backward_kernel<T, kWide>, kWide);
    else
      start(swiglu_backward_kernel<T, 1>, 1);
  });
}

}  // namespace graft
