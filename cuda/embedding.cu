// Rows picked by number, and gradients added back to the rows they came from. Numbers on the CPU
// are checked on the host; the device cannot throw, so that there a row out of range is picked as
// NaN and is not added to.
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

// embedding_forward, gather_rows.
//   y[t,c] = weight[ids[t],c]
// Shapes    y (T, H) F32 or BF16; ids (T) I32; weight (V, H) F32, BF16 or F16; rows strided.
// Mapping   a thread owns N neighbours of a row of y (16 bytes of the narrower type, or one
//           element); a block stays within a row.
// Bytes     TH elements read, TH written, 4T. T=16384, H=4096, BF16: 268 MB.
// Roofline  56 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  one rounding, and none where the dtypes are the same.
template <class T, class W, int N>
__global__ void __launch_bounds__(256)
    pick_rows_kernel(T* y, int64_t y_stride, const W* weight, int64_t weight_stride,
                     const int32_t* ids, int64_t num_rows, int64_t cols, unsigned blocks_per_row) {
  const auto [t, col] = row_place<N>(blocks_per_row);
  if (col >= cols) return;
  const int64_t id = ids[t];
  float values[N];
  if (id >= 0 && id < num_rows)
    load_floats<N>(values, weight + id * weight_stride + col);
  else
    for (int i = 0; i < N; ++i) values[i] = nanf("");
  store_floats<N>(y + t * y_stride + col, values);
}

// Adding rows back: tokens repeat, and their sum has to have one order. Atomics have none, and one
// block that walks all T tokens is serial in T. So the occurrences of each id are first linked in
// token order (link_kernel), and then the first occurrence's block adds the whole list
// (add_rows_kernel): as parallel as there are different ids, the longest chain being the count of
// the commonest one.

// Links the occurrences of every id.
//   next[t] = least s > t with ids[s] = ids[t], or -1;   is_first[t] = no s < t has ids[s] = ids[t]
// Shapes    next, is_first, ids (T) I32.
// Mapping   a warp per token; 32 ids at a time, backwards until one is equal, then forwards.
// Bytes     at most 4 T^2 / 32 warp loads of 128 bytes, from L2: T=16384 is 64 KB that all share.
// Roofline  8.4 M warp iterations where every id is different. Measured: -
// Numerics  -
__global__ void __launch_bounds__(256)
    link_kernel(int32_t* next, int32_t* is_first, const int32_t* ids, int tokens) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t t = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
  if (t >= tokens) return;  // a whole warp
  const int32_t id = ids[t];
  bool first = true;
  for (int64_t begin = t - 32; first && begin > -32; begin -= 32) {
    const int64_t s = begin + lane;
    first = __ballot_sync(kAllLanes, s >= 0 && ids[s < 0 ? 0 : s] == id) == 0;
  }
  int64_t following = -1;
  for (int64_t begin = t + 1; following < 0 && begin < tokens; begin += 32) {
    const int64_t s = begin + lane;
    const unsigned equal = __ballot_sync(kAllLanes, s < tokens && ids[s < tokens ? s : t] == id);
    if (equal) following = begin + __ffs(int(equal)) - 1;
  }
  if (lane == 0) {
    next[t] = int32_t(following);
    is_first[t] = first;
  }
}

// embedding_backward, scatter_add_rows.
//   dst[ids[t],c] += src[t,c], for t = 0, 1, ... in this order
// Shapes    dst (V, C) F32 or BF16; src (T, C) F32 or BF16; next, is_first, ids (T); rows strided.
// Mapping   a thread owns N neighbours of the row of a first occurrence and follows `next`.
// Bytes     TC elements of src read, and each row of dst that occurs read and written.
// Roofline  T=16384, C=4096, BF16 into F32, all different: 671 MB, 140 us at 4.8 TB/s (H200 peak).
//           Measured: -
// Numerics  F32, in token order, one rounding at the store.
template <class T, class S, int N>
__global__ void __launch_bounds__(256)
    add_rows_kernel(T* dst, int64_t dst_stride, const S* src, int64_t src_stride,
                    const int32_t* ids, const int32_t* next, const int32_t* is_first,
                    int64_t num_rows, int64_t cols, unsigned blocks_per_row) {
  const auto [t, col] = row_place<N>(blocks_per_row);
  if (col >= cols || !is_first[t]) return;
  const int64_t id = ids[t];
  if (id < 0 || id >= num_rows) return;
  T* to = dst + id * dst_stride + col;
  float sum[N];
  load_floats<N>(sum, to);
  for (int64_t s = t; s >= 0; s = next[s]) {
    float values[N];
    load_floats<N>(values, src + s * src_stride + col);
    for (int i = 0; i < N; ++i) sum[i] += values[i];
  }
  store_floats<N>(to, sum);
}

void check_rows(const char* op, const Tensor& indices, int64_t num_rows) {
  CHECK(indices.num_elements() <= INT32_MAX, op, ": ", indices.num_elements(),
        " indices, wanted fewer than 2^31");
  if (indices.device() != Device::CPU) return;
  for (int64_t i = 0; i < indices.num_elements(); ++i) {
    const int32_t row = indices.data<int32_t>()[i];
    CHECK(row >= 0 && row < num_rows, op, ": row ", row, " of ", num_rows);
  }
}

void pick_rows(const char* op, Tensor& dst, const Tensor& src, const Tensor& ids,
               cudaStream_t stream) {
  dispatch_activation(op, dst.dtype(), [&]<class T>(T) {
    dispatch_device(src.dtype(), [&]<class W>(W) {
      constexpr int kWide = kVectorWidth<T, W>;
      const auto start = [&](auto kernel, int width) {
        const RowGrid grid = row_grid(ids.num_elements(), dst.cols(), width);
        launch(kernel, dim3(grid.blocks), dim3(grid.threads), 0, stream, device_data<T>(dst),
               dst.row_stride(), device_data<const W>(src), src.row_stride(),
               device_data<const int32_t>(ids), src.num_rows(), dst.cols(), grid.blocks_per_row);
      };
      if (vector_rows(kWide, dst, src))
        start(pick_rows_kernel<T, W, kWide>, kWide);
      else
        start(pick_rows_kernel<T, W, 1>, 1);
    });
  });
}

void add_rows(const char* op, Tensor& dst, const Tensor& src, const Tensor& ids,
              cudaStream_t stream) {
  const int64_t tokens = ids.num_elements();
  Tensor links = Tensor::empty({2, tokens}, DType::I32, Device::CUDA, Scope::Scratch);
  int32_t* next = device_data<int32_t>(links);
  int32_t* is_first = next + tokens;
  launch(link_kernel, dim3(ceil_div(tokens, 8)), dim3(256), 0, stream, next, is_first,
         device_data<const int32_t>(ids), int(tokens));
  dispatch_activation(op, dst.dtype(), [&]<class T>(T) {
    dispatch_activation(op, src.dtype(), [&]<class S>(S) {
      constexpr int kWide = kVectorWidth<T, S>;
      const auto start = [&](auto kernel, int width) {
        const RowGrid grid = row_grid(tokens, dst.cols(), width);
        launch(kernel, dim3(grid.blocks), dim3(grid.threads), 0, stream, device_data<T>(dst),
               dst.row_stride(), device_data<const S>(src), src.row_stride(),
               device_data<const int32_t>(ids), static_cast<const int32_t*>(next),
               static_cast<const int32_t*>(is_first), dst.num_rows(), dst.cols(),
               grid.blocks_per_row);
      };
      if (vector_rows(kWide, dst, src))
        start(add_rows_kernel<T, S, kWide>, kWide);
      else
        start(add_rows_kernel<T, S, 1>, 1);
    });
  });
}

}  // namespace

void CudaBackend::embedding_forward(Tensor& y, const Tensor& ids, const Tensor& weight) {
  check_rows("embedding", ids, weight.num_rows());
  if (ids.num_elements() > 0) pick_rows("embedding", y, weight, on_device(ids), stream_);
}

void CudaBackend::embedding_backward(Tensor& dweight, const Tensor& ids, const Tensor& dy) {
  check_rows("embedding_backward", ids, dweight.num_rows());
  if (ids.num_elements() > 0) add_rows("embedding_backward", dweight, dy, on_device(ids), stream_);
}

void CudaBackend::gather_rows(Tensor& dst, const Tensor& src, const Tensor& indices) {
  check_rows("gather_rows", indices, src.num_rows());
  if (indices.num_elements() > 0) pick_rows("gather_rows", dst, src, on_device(indices), stream_);
}

void CudaBackend::scatter_add_rows(Tensor& dst, const Tensor& src, const Tensor& indices) {
  check_rows("scatter_add_rows", indices, dst.num_rows());
  if (indices.num_elements() > 0)
    add_rows("scatter_add_rows", dst, src, on_device(indices), stream_);
}

}  // namespace graft
