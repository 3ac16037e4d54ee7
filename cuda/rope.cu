// Rotary position embedding, halves as in Hugging Face.
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

constexpr int kThreads = 256;

// rope.
//   y[t,h,i]       = x[t,h,i] cos - x[t,h,i+D/2] sin
//   y[t,h,i + D/2] = x[t,h,i+D/2] cos + x[t,h,i] sin,   cos, sin at row positions[t], column i
// Shapes    y, x (T, heads, D) F32 or BF16; positions (T) I32; cos_sin (table_rows, D) F32.
// Mapping   block t owns token t; a thread owns N neighbouring pairs of a head (16 bytes of each
//           half) and goes on by blockDim.x. y may be x: both halves are read before either is
//           written, and a pair has one owner.
// Bytes     2 T heads D elements + 4TD of table. T=16384, 32 heads, D=128, BF16: 277 MB.
// Roofline  58 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32, one rounding at each store. A position outside the table gives NaN: the device
//           cannot throw, and a wrong angle would go unseen.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(T* y,  // (T, heads, D), heads y_stride apart
                int64_t y_stride,
                const T* x,  // (T, heads, D), heads x_stride apart
                int64_t x_stride,
                const int32_t* positions,  // (T)
                const float* cos_sin,      // (table_rows, D), rows table_stride apart
                int64_t table_stride, int64_t table_rows, int heads, int half, float direction) {
  const int64_t t = blockIdx.x;
  const int64_t position = positions[t];
  const bool known = position >= 0 && position < table_rows;
  const float* table = cos_sin + (known ? position : 0) * table_stride;
  const int chunks = half / N;
  for (int item = int(threadIdx.x); item < heads * chunks; item += int(blockDim.x)) {
    const int head = item / chunks, i = (item - head * chunks) * N;
    const T* from = x + (t * heads + head) * x_stride + i;
    T* to = y + (t * heads + head) * y_stride + i;
    float first[N], second[N], cosine[N], sine[N];
    load_floats<N>(first, from);
    load_floats<N>(second, from + half);
    if (known) {
      load_floats<N>(cosine, table + i);
      load_floats<N>(sine, table + half + i);
    }
    for (int j = 0; j < N; ++j) {
      const float c = known ? cosine[j] : nanf(""), s = known ? direction * sine[j] : nanf("");
      const float a = first[j], b = second[j];
      first[j] = a * c - b * s;
      second[j] = b * c + a * s;
    }
    store_floats<N>(to, first);
    store_floats<N>(to + half, second);
  }
}

}  // namespace

void CudaBackend::rope(Tensor& y, const Tensor& x, const Tensor& positions, const Tensor& cos_sin,
                       int direction) {
  const int64_t tokens = x.size(0), heads = x.size(1), half = x.size(2) / 2;
  CHECK(cos_sin.dtype() == DType::F32, "rope: cos_sin is ", dtype_name(cos_sin.dtype()),
        ", wanted F32 on the GPU");
  CHECK(tokens <= INT32_MAX && heads * half <= INT32_MAX, "rope: x is ", x.shape(),
        ", wanted fewer than 2^31 tokens, and pairs of a token");
  if (positions.device() == Device::CPU)
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t position = positions.data<int32_t>()[t];
      CHECK(position >= 0 && position < cos_sin.size(0), "rope: position ", position,
            " but the table has ", cos_sin.size(0), " rows");
    }
  if (tokens == 0 || heads * half == 0) return;
  const Tensor where = on_device(positions);
  dispatch_activation("rope", x.dtype(), [&]<class T>(T) {
    constexpr int kWide = kVectorWidth<T>;
    const auto start = [&](auto kernel, int width) {
      const int64_t items = heads * half / width;
      const unsigned threads = items >= kThreads ? kThreads : 32 * ceil_div(items, 32);
      launch(kernel, dim3(unsigned(tokens)), dim3(threads), 0, stream_, device_data<T>(y),
             y.row_stride(), device_data<const T>(x), x.row_stride(),
             device_data<const int32_t>(where), device_data<const float>(cos_sin),
             cos_sin.row_stride(), cos_sin.size(0), int(heads), int(half), float(direction));
    };
    if (half % kWide == 0 && vector_rows(kWide, y, x, cos_sin))
      start(rope_kernel<T, kWide>, kWide);
    else
      start(rope_kernel<T, 1>, 1);
  });
}

}  // namespace graft
