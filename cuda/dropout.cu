// Dropout by counter: the mask of an element follows from its key, row and column
// (tensor/random.h), so that nothing is stored between forward and backward.
#include <cmath>

#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"
#include "cuda/philox.cuh"
#include "cuda/step_scalars.h"
#include "tensor/random.h"

namespace graft {
namespace {

// The host's words and the device's, at a counter and a key that use every bit.
constexpr bool twins_agree() {
  const auto host =
      philox({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, {0xa4093822u, 0x299f31d0u});
  const PhiloxWords device = philox_words({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
                                          0xa4093822u, 0x299f31d0u);
  for (int i = 0; i < 4; ++i)
    if (host[size_t(i)] != device.word[i]) return false;
  return true;
}
static_assert(twins_agree());

// dropout.
//   y[t,c] = (y[t,c] +) (word(t, c) >= p 2^32 ? x[t,c] / (1 - p) : 0)
// Shapes    y, x (T, C) F32 or BF16, rows strided; y may be x.
// Mapping   a thread owns N neighbours of a row, N a multiple of the 4 columns that share a call of
//           philox; 16 bytes at once where rows allow it (kVector), else element by element.
// Bytes     TC elements read (2TC where accumulating), TC written. T=16384, C=4096, BF16: 268 MB.
// Roofline  56 us at 4.8 TB/s (H200 peak); 10 rounds of two 32 x 32 bit products per 4 elements
//           are about 5 integer operations an element. Measured: -
// Numerics  product and sum in F32, one rounding at the store. The mask does not depend on the
//           launch, nor on how rows are cut into batches.
template <class T, bool kVector, bool kAccumulate>
__global__ void __launch_bounds__(256)
    dropout_kernel(T* y, int64_t y_stride, const T* x, int64_t x_stride, int64_t cols,
                   unsigned blocks_per_row, uint64_t threshold, float scale, DropoutKey key,
                   const StepScalars* captured) {
  constexpr int N = kVectorWidth<T>;
  const auto [t, col] = row_place<N>(blocks_per_row);
  if (col >= cols) return;
  const T* from = x + t * x_stride + col;
  T* to = y + t * y_stride + col;
  const int count = cols - col < N ? int(cols - col) : N;
  float in[N] = {}, sum[N] = {};
  if constexpr (kVector) {
    load_floats<N>(in, from);
    if constexpr (kAccumulate) load_floats<N>(sum, to);
  } else {
    for (int i = 0; i < count; ++i) in[i] = as_float(from[i]);
    if constexpr (kAccumulate)
      for (int i = 0; i < count; ++i) sum[i] = as_float(to[i]);
  }
  const uint64_t row = uint64_t(key.first_row + t);
  const uint32_t step = captured ? captured->dropout_step : key.step;
  for (int group = 0; group < N; group += 4) {
    const PhiloxWords words =
        philox_words({{uint32_t((col + group) / 4), uint32_t(row), key.module, step}},
                     uint32_t(key.seed), uint32_t(key.seed >> 32) ^ uint32_t(row >> 32));
    for (int i = 0; i < 4; ++i)
      if (words.word[i] >= threshold) sum[group + i] += in[group + i] * scale;
  }
  if constexpr (kVector)
    store_floats<N>(to, sum);
  else
    for (int i = 0; i < count; ++i) to[i] = round_to<T>(sum[i]);
}

}  // namespace

void CudaBackend::dropout(Tensor& y, const Tensor& x, double p, const DropoutKey& key,
                          bool accumulate) {
  CHECK(p >= 0 && p < 1, "dropout: p is ", p, ", wanted 0 <= p < 1");
  // A whole word is at least p 2^32 exactly when it is at least that rounded up; 2^32 itself, which
  // no word reaches, needs the 33rd bit.
  const uint64_t threshold = uint64_t(std::ceil(p * 4294967296.0));
  const float scale = float(1 / (1 - p));
  dispatch_activation("dropout", y.dtype(), [&]<class T>(T) {
    const RowGrid grid = row_grid(y.num_rows(), y.cols(), kVectorWidth<T>);
    const auto start = [&](auto kernel) {
      launch(kernel, dim3(grid.blocks), dim3(grid.threads), 0, stream_, device_data<T>(y),
             y.row_stride(), device_data<const T>(x), x.row_stride(), y.cols(), grid.blocks_per_row,
             threshold, scale, key, captured_scalars());
    };
    if (vector_rows(kVectorWidth<T>, y, x))
      start(accumulate ? dropout_kernel<T, true, true> : dropout_kernel<T, true, false>);
    else
      start(accumulate ? dropout_kernel<T, false, true> : dropout_kernel<T, false, false>);
  });
}

}  // namespace graft
