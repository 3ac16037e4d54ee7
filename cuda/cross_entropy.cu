// Cross-entropy of the softmax of each row of logits, and its gradient over the logits themselves.
#include "cuda/cross_entropy.h"

#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

// cross_entropy, variant 1: one thread per row, three passes.
//   loss[n] = m + log(s) - z[n,label[n]],  m = max_c z[n,c],  s = sum_c exp(z[n,c] - m)
//   z[n,c] = scale (exp(z[n,c] - m) / s - (c == label[n]))
// Shapes    z (N, V) F32 or BF16, rows strided; losses (N) F32; labels (N) I32.
// Mapping   thread n owns row n: neighbours read addresses a whole row apart.
// Bytes     three reads and one write of NV elements. N=2048, V=151936, BF16: 2.5 GB.
// Roofline  519 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32. A label outside the row gives NaN: the device cannot throw.
template <class T>
__global__ void __launch_bounds__(128)
    cross_entropy_1_thread(float* losses, T* logits, int64_t stride, const int32_t* labels,
                           int64_t rows, int64_t cols, float scale, bool with_gradient) {
  const int64_t n = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (n >= rows) return;
  T* z = logits + n * stride;
  const int64_t label = labels[n];
  const bool known = label >= 0 && label < cols;
  float most = -INFINITY;
  for (int64_t c = 0; c < cols; ++c) most = fmaxf(most, as_float(z[c]));
  float sum = 0;
  for (int64_t c = 0; c < cols; ++c) sum += expf(as_float(z[c]) - most);
  losses[n] = known ? most + logf(sum) - as_float(z[label]) : nanf("");
  if (!with_gradient) return;
  for (int64_t c = 0; c < cols; ++c) {
    const float p = expf(as_float(z[c]) - most) / sum;
    z[c] = round_to<T>(scale * (p - (c == label ? 1.0f : 0.0f)));
  }
}

// The largest value so far, and the sum of exponentials relative to it (Milakov & Gimelshein 2018).
struct Softmax {
  float most, sum;
};
__device__ Softmax merge(Softmax a, Softmax b) {
  const float most = fmaxf(a.most, b.most);
  // Two empty parts would be inf - inf. A sum that is NaN stays NaN.
  const float from_a = a.sum != 0 ? a.sum * expf(a.most - most) : 0;
  const float from_b = b.sum != 0 ? b.sum * expf(b.most - most) : 0;
  return {most, from_a + from_b};
}

constexpr int kThreads = 512;

// Every thread gets the merged statistics of the block, in an order that the schedule cannot
// change.
__device__ Softmax block_merge(Softmax mine) {
  SHARED_ARRAY(Softmax, partial, kThreads / 32);
  for (int bits = 16; bits > 0; bits /= 2)
    mine = merge(mine, {__shfl_xor_sync(kAllLanes, mine.most, bits),
                        __shfl_xor_sync(kAllLanes, mine.sum, bits)});
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();  // every warp's statistics are written
  Softmax all = partial[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) all = merge(all, partial[warp]);
  return all;
}

// cross_entropy, rung 3: one block per row, online softmax, 16-byte loads.
//   the equations of rung 1, above; rung 2 is in cross_entropy_ladder.cu
// Shapes    as rung 1; N elements at once where rows allow it, else one.
// Mapping   block n owns row n; thread i owns chunks i, i + 512, ...
// Bytes     two reads and one write of NV elements. N=2048, V=151936, BF16: 1.87 GB; the second
//           read is expected from L2: 132 rows in flight are 40 MB.
// Roofline  259 us at 4.8 TB/s (H200 peak) with one read. Measured: -
// Numerics  F32; one rounding of the gradient at the store. A label outside the row gives NaN.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_2_block(float* losses, T* logits, int64_t stride, const int32_t* labels,
                          int64_t cols, float scale, bool with_gradient) {
  const int64_t n = blockIdx.x;
  T* z = logits + n * stride;
  const int64_t label = labels[n];
  Softmax mine{-INFINITY, 0};
  for (int64_t c = int64_t(threadIdx.x) * N; c < cols; c += kThreads * N) {
    float values[N];
    load_floats<N>(values, z + c);
    float most = values[0];
    for (int i = 1; i < N; ++i) most = fmaxf(most, values[i]);
    float sum = 0;
    for (int i = 0; i < N; ++i) sum += expf(values[i] - most);
    mine = merge(mine, {most, sum});
  }
  const Softmax row = block_merge(mine);
  if (threadIdx.x == 0)
    losses[n] =
        label >= 0 && label < cols ? row.most + logf(row.sum) - as_float(z[label]) : nanf("");
  if (!with_gradient) return;
  __syncthreads();  // the label's logit has been read, and may be overwritten
  const float factor = scale / row.sum;
  for (int64_t c = int64_t(threadIdx.x) * N; c < cols; c += kThreads * N) {
    float values[N];
    load_floats<N>(values, z + c);
    for (int i = 0; i < N; ++i)
      values[i] = expf(values[i] - row.most) * factor - (c + i == label ? scale : 0.0f);
    store_floats<N>(z + c, values);
  }
}

}  // namespace

void launch_cross_entropy(int variant, Tensor& losses, Tensor& logits, const Tensor& labels,
                          double scale, bool with_gradient, cudaStream_t stream) {
  const int64_t rows = logits.num_rows(), cols = logits.cols();
  if (rows == 0) return;
  CHECK(rows <= INT32_MAX, "cross_entropy: ", rows, " rows, wanted fewer than 2^31");
  CHECK(losses.dtype() == DType::F32, "cross_entropy: losses are ", dtype_name(losses.dtype()),
        ", wanted F32 on the GPU");
  dispatch_activation("cross_entropy", logits.dtype(), [&]<class T>(T) {
    if (variant == 1) {
      launch(cross_entropy_1_thread<T>, dim3(ceil_div(rows, 128)), dim3(128), 0, stream,
             device_data<float>(losses), device_data<T>(logits), logits.row_stride(),
             device_data<const int32_t>(labels), rows, cols, float(scale), with_gradient);
      return;
    }
    constexpr int kWide = kVectorWidth<T>;
    launch(
        vector_rows(kWide, logits) ? cross_entropy_2_block<T, kWide> : cross_entropy_2_block<T, 1>,
        dim3(unsigned(rows)), dim3(kThreads), 0, stream, device_data<float>(losses),
        device_data<T>(logits), logits.row_stride(), device_data<const int32_t>(labels), cols,
        float(scale), with_gradient);
  });
}

void CudaBackend::cross_entropy(Tensor& losses, Tensor& logits, const Tensor& labels, double scale,
                                bool with_gradient) {
  if (labels.device() == Device::CPU)
    for (int64_t n = 0; n < logits.num_rows(); ++n) {
      const int32_t label = labels.data<int32_t>()[n];
      CHECK(label >= 0 && label < logits.cols(), "cross_entropy: label ", label, " of ",
            logits.cols());
    }
  launch_cross_entropy(2, losses, logits, on_device(labels), scale, with_gradient, stream_);
}

}  // namespace graft
