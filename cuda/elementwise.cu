// Fills, copies, sums and scalings, element by element; sums over rows and over everything.
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"
#include "cuda/nf4.h"

namespace graft {
namespace {

constexpr int kThreads = 256;

// What an element becomes. kInputs: how many of a and b it looks at.
struct Fill {
  static constexpr int kInputs = 0;
  float value;
  __device__ float operator()(float, float) const { return value; }
};
struct Scale {
  static constexpr int kInputs = 1;
  float alpha;
  __device__ float operator()(float a, float) const { return alpha * a; }
};
struct ScaleBy {
  static constexpr int kInputs = 1;
  const float* factor;  // one element, on the device
  __device__ float operator()(float a, float) const { return *factor * a; }
};
struct AddScaled {
  static constexpr int kInputs = 2;
  float alpha;
  __device__ float operator()(float a, float b) const { return a + alpha * b; }
};

// elementwise: fill, copy, scale, scale_by, add, axpy.
//   y[r,c] = op(a[r,c], b[r,c])
// Shapes    y, a, b (R, C), each F32, BF16 or F16, rows strided; y may be a or b.
// Mapping   a thread owns N neighbours of a row: 16 bytes of the narrowest type where rows allow.
// Bytes     RC elements of y written, and of each input read. T=16384, H=4096, BF16, add: 403 MB.
// Roofline  84 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32, one rounding at the store.
template <class Op, class Y, class X, int N>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(Y* y, int64_t y_stride, const Y* a_same, const X* a, int64_t a_stride,
                       const X* b, int64_t b_stride, int64_t cols, unsigned blocks_per_row, Op op) {
  const auto [row, col] = row_place<N>(blocks_per_row);
  if (col >= cols) return;
  float first[N] = {}, second[N] = {};
  if constexpr (Op::kInputs == 1) load_floats<N>(first, a + row * a_stride + col);
  if constexpr (Op::kInputs == 2) {  // a is of y's type: y itself, or what is added to b
    load_floats<N>(first, a_same + row * a_stride + col);
    load_floats<N>(second, b + row * b_stride + col);
  }
  for (int i = 0; i < N; ++i) first[i] = op(first[i], second[i]);
  store_floats<N>(y + row * y_stride + col, first);
}

// A tensor as rows that a kernel walks; dense ones as a single long row.
struct Rows {
  int64_t rows, cols, stride;
};
Rows rows_of(const Tensor& t, bool flat) {
  if (flat) return {1, t.num_elements(), t.num_elements()};
  return {t.num_rows(), t.cols(), t.row_stride()};
}

// y = op(a, b), where a and b may be undefined; a has y's dtype where there is a b.
template <class Op>
void elementwise(const char* name, Tensor& y, const Tensor& a, const Tensor& b, Op op,
                 cudaStream_t stream) {
  if (y.num_elements() == 0) return;
  const Tensor& first = a.defined() ? a : y;
  const Tensor& second = b.defined() ? b : first;
  const bool flat = y.is_contiguous() && first.is_contiguous() && second.is_contiguous();
  CHECK(flat || (first.cols() == y.cols() && second.cols() == y.cols()), name, ": rows of ",
        y.cols(), " and ", first.cols(), " elements, strided; clone one of them first");
  const Rows to = rows_of(y, flat), from_a = rows_of(first, flat), from_b = rows_of(second, flat);
  dispatch_device(y.dtype(), [&]<class Y>(Y) {
    const auto with_input = [&]<class X>(X) {
      constexpr int kWide = kVectorWidth<Y, X>;
      const auto start = [&](auto kernel, int width) {
        const RowGrid grid = row_grid(to.rows, to.cols, width);
        launch(kernel, dim3(grid.blocks), dim3(grid.threads), 0, stream, device_data<Y>(y),
               to.stride, device_data<const Y>(first), device_data<const X>(first), from_a.stride,
               device_data<const X>(second), from_b.stride, to.cols, grid.blocks_per_row, op);
      };
      const bool fits = flat ? vector_rows(kWide, y.reshape({to.cols}), first.reshape({to.cols}),
                                           second.reshape({to.cols}))
                             : vector_rows(kWide, y, first, second);
      if (fits)
        start(elementwise_kernel<Op, Y, X, kWide>, kWide);
      else
        start(elementwise_kernel<Op, Y, X, 1>, 1);
    };
    if constexpr (Op::kInputs == 0)
      with_input(Y{});
    else
      dispatch_device(second.dtype(), with_input);
  });
}

// narrow.
//   y[i] = x[i]
// Shapes    x (n) F64, y (n) F32; sums, such as the loss, on their way out.
// Mapping   a thread an element.
// Bytes     12n, n a few.
// Numerics  one rounding.
__global__ void narrow_kernel(float* y, const double* x, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) y[i] = float(x[i]);
}

// sum_rows.
//   db[c] = (db[c] +) sum_r dy[r,c]
// Shapes    db (C) F32; dy (R, C) F32 or BF16, rows strided.
// Mapping   block = 32 columns x 8 walkers; walker w adds rows w, w + 8, ..., then walker 0
//           adds the eight sums in order.
// Bytes     RC elements read. T=16384, C=4096, BF16: 134 MB.
// Roofline  28 us at 4.8 TB/s (H200 peak); C = 4096 has 128 blocks, fewer than an H200 has
//           multiprocessors. Measured: -
// Numerics  F32, in an order that follows from R alone.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(float* db, const T* dy, int64_t stride, int64_t rows, int64_t cols,
                    bool accumulate) {
  SHARED_ARRAY(float, partial, 8 * 32);
  const int lane = int(threadIdx.x) % 32, walker = int(threadIdx.x) / 32;
  const int64_t col = int64_t(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (col < cols)
    for (int64_t r = walker; r < rows; r += 8) sum += as_float(dy[r * stride + col]);
  partial[walker * 32 + lane] = sum;
  __syncthreads();  // the sums of all walkers are written
  if (walker != 0 || col >= cols) return;
  float total = accumulate ? db[col] : 0;
  for (int w = 0; w < 8; ++w) total += partial[w * 32 + lane];
  db[col] = total;
}

// add_sum, one block.
//   total += alpha sum_i x[i]
// Shapes    total one F64; x (n) F32.
// Mapping   thread i adds elements i, i + 256, ...; then pairs of threads, pairs of pairs, ...
// Bytes     4n read: a chunk of 2048 losses is 8 KB.
// Roofline  - (launch latency). Measured: -
// Numerics  F64.
__global__ void __launch_bounds__(kThreads)
    add_sum_kernel(double* total, const float* x, int64_t n, double alpha) {
  SHARED_ARRAY(double, partial, kThreads);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += double(x[i]);
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();  // what the last round wrote is read in this one
    if (int(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *total += alpha * partial[0];
}

cudaMemcpyKind direction(const Tensor& dst, const Tensor& src) {
  if (dst.device() == Device::CPU) return cudaMemcpyDeviceToHost;
  return src.device() == Device::CPU ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToDevice;
}

// Bytes alone: dst and src have the same dtype.
void copy_rows(Tensor& dst, const Tensor& src, cudaStream_t stream) {
  if (dst.is_contiguous() && src.is_contiguous()) {
    CUDA_CHECK(cudaMemcpyAsync(dst.raw(), src.raw(), size_t(dst.num_bytes()), direction(dst, src),
                               stream));
    return;
  }
  const size_t size = size_t(dtype_size(dst.dtype()));
  const Tensor& strided = dst.is_contiguous() ? src : dst;
  const size_t cols = size_t(strided.cols());
  const auto pitch = [&](const Tensor& t) {
    return (t.is_contiguous() ? cols : size_t(t.row_stride())) * size;
  };
  CHECK((dst.is_contiguous() || src.is_contiguous()) || dst.cols() == src.cols(),
        "copy: strided rows of ", src.cols(), " into strided rows of ", dst.cols());
  CUDA_CHECK(cudaMemcpy2DAsync(dst.raw(), pitch(dst), src.raw(), pitch(src), cols * size,
                               size_t(strided.num_rows()), direction(dst, src), stream));
}

}  // namespace

void CudaBackend::fill(Tensor& dst, double value) {
  const bool zero = value == 0 && dst.is_contiguous();
  if (dst.num_elements() == 0) return;
  if (zero)  // the bytes of 0 in every dtype
    CUDA_CHECK(cudaMemsetAsync(dst.raw(), 0, size_t(dst.num_bytes()), stream_));
  else
    elementwise("fill", dst, {}, {}, Fill{float(value)}, stream_);
}

void CudaBackend::copy(Tensor& dst, const Tensor& src) {
  CHECK(dst.num_elements() == src.num_elements(), "copy: dst is ", dst.shape(), " but src is ",
        src.shape());
  if (dst.num_elements() == 0) return;
  const bool to_host = dst.device() == Device::CPU, from_host = src.device() == Device::CPU;
  // A graph would read the same memory again in every step, whatever is there by then.
  CHECK(!capturing_ || !(to_host || from_host), "copy: a step that is captured copies ",
        dst.shape(), to_host ? " to" : " from", " the host; copy before or after it");
  const bool dense = dst.is_contiguous() && src.is_contiguous();
  const size_t bytes = size_t(dst.num_bytes());
  if (dst.dtype() == src.dtype()) {
    if (is_nf4(src.dtype()) && !to_host)
      most_nf4_elements_ = std::max(most_nf4_elements_, src.num_elements());
    if (from_host && dense && bytes <= Staging::kLargest)
      return upload(dst.raw(), src.raw(), bytes);
    if (to_host && dense && bytes <= Staging::kLargestDownload)
      return staging_.download(dst.raw(), src.raw(), bytes);
    copy_rows(dst, src, stream_);
  } else if (to_host) {  // converted where it is fast, and before it takes the bus
    Tensor converted = Tensor::empty(dst.shape(), dst.dtype(), Device::CUDA, Scope::Scratch);
    copy(converted, src);
    copy_rows(dst, converted, stream_);
  } else if (from_host) {
    copy(dst, src.to(Device::CUDA, Scope::Scratch));
  } else if (is_nf4(src.dtype())) {
    launch_widen_nf4(kNf4Rungs, dst, src, stream_);
  } else if (src.dtype() == DType::F64) {
    CHECK(dst.dtype() == DType::F32 && dst.is_contiguous() && src.is_contiguous(),
          "copy: F64 into ", dtype_name(dst.dtype()), ", wanted dense F32 on the GPU");
    launch(narrow_kernel, dim3(ceil_div(src.num_elements(), kThreads)), dim3(kThreads), 0, stream_,
           device_data<float>(dst), device_data<const double>(src), src.num_elements());
  } else {
    elementwise("copy", dst, src, {}, Scale{1}, stream_);
  }
  // Whoever asked for bytes on the host is about to read them.
  if (to_host) CUDA_CHECK(cudaStreamSynchronize(stream_));
}

void CudaBackend::add(Tensor& y, const Tensor& a, const Tensor& b) {
  elementwise("add", y, a, b, AddScaled{1}, stream_);
}

void CudaBackend::axpy(Tensor& y, const Tensor& x, double alpha) {
  elementwise("axpy", y, y, x, AddScaled{float(alpha)}, stream_);
}

void CudaBackend::scale(Tensor& y, const Tensor& x, double alpha) {
  elementwise("scale", y, x, {}, Scale{float(alpha)}, stream_);
}

void CudaBackend::scale_by(Tensor& y, const Tensor& x, const Tensor& factor) {
  CHECK(factor.dtype() == DType::F32 && factor.num_elements() == 1, "scale_by: the factor is ",
        dtype_name(factor.dtype()), " ", factor.shape(), ", wanted one F32 on the GPU");
  elementwise("scale_by", y, x, {}, ScaleBy{device_data<const float>(factor)}, stream_);
}

void CudaBackend::add_sum(Tensor& total, const Tensor& x, double alpha) {
  CHECK(total.dtype() == DType::F64 && x.dtype() == DType::F32 && x.is_contiguous(),
        "add_sum: x is ", dtype_name(x.dtype()), " and total ", dtype_name(total.dtype()),
        ", wanted dense F32 and F64 on the GPU");
  launch(add_sum_kernel, dim3(1), dim3(kThreads), 0, stream_, device_data<double>(total),
         device_data<const float>(x), x.num_elements(), alpha);
}

void CudaBackend::sum_rows(Tensor& db, const Tensor& dy, bool accumulate) {
  CHECK(db.dtype() == DType::F32 && db.is_contiguous(), "sum_rows: db is ", dtype_name(db.dtype()),
        ", wanted dense F32 on the GPU");
  dispatch_activation("sum_rows", dy.dtype(), [&]<class T>(T) {
    launch(sum_rows_kernel<T>, dim3(ceil_div(dy.cols(), 32)), dim3(kThreads), 0, stream_,
           device_data<float>(db), device_data<const T>(dy), dy.row_stride(), dy.num_rows(),
           dy.cols(), accumulate);
  });
}

Tensor CudaBackend::on_device(const Tensor& indices) {
  return indices.device() == Device::CUDA ? indices : indices.to(Device::CUDA, Scope::Scratch);
}

// Asked of one kernel, since all are compiled for the same architectures.
bool has_code_for_device() {
  cudaFuncAttributes attributes{};
  const bool has = cudaFuncGetAttributes(&attributes, add_sum_kernel) == cudaSuccess;
  if (!has) cudaGetLastError();  // or the next launch would report it
  return has;
}

}  // namespace graft
