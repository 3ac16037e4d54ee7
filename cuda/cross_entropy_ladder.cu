// The rung of cross-entropy between the backend's two variants. Read before:
// cross_entropy_ladder.h, variant 1 in cross_entropy.cu; read after: variant 2 there.
#include "cuda/cross_entropy_ladder.h"

#include <cmath>

#include "cuda/cross_entropy.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// Every thread gets the result; all threads of the block call. `part` holds kWarps floats that
// nobody else uses.
__device__ inline float block_max(float x, float* part) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();  // every warp's largest is there
  x = part[0];
  for (int w = 1; w < kWarps; ++w) x = fmaxf(x, part[w]);
  return x;
}
__device__ inline float block_sum(float x, float* part) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();  // every warp's sum is there
  x = part[0];
  for (int w = 1; w < kWarps; ++w) x += part[w];
  return x;
}

// cross_entropy, rung 2: one block per row, three passes.   (1: a thread per row, 3: online sum)
//   loss[n] = m + log(s) - z[n,label[n]],  m = max_c z[n,c],  s = sum_c exp(z[n,c] - m)
//   z[n,c] = scale (exp(z[n,c] - m) / s - (c == label[n]))
// Shapes    losses (N) F32; z (N, V) F32 or BF16, rows strided; labels (N) I32.
// Mapping   block n = 512 threads owns row n; thread t owns elements t, t + 512, ...: a warp reads
//           one line, where in rung 1 it reads 32.
// Bytes     three reads and one write of NV elements, the second and the third read from L2 if it
//           holds the rows in flight. N=1024, V=151936, BF16: 311 MB for one read.
// Roofline  130 us at 4.8 TB/s (H200 peak) with one read. Measured: -
// Numerics  F32, per thread and then over lanes and warps; one rounding, at the store. A label
//           outside the row gives NaN: the device cannot throw.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_passes(float* losses, T* logits, int64_t stride, const int32_t* labels,
                         int64_t cols, float scale) {
  SHARED_ARRAY(float, part, 2 * kWarps);
  const int64_t n = blockIdx.x, label = labels[n];
  T* z = logits + n * stride;
  float most = -INFINITY, sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) most = fmaxf(most, as_float(z[c]));
  most = block_max(most, part);
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) sum += expf(as_float(z[c]) - most);
  // Before the barrier in block_sum: then it goes.
  const float of_label = label >= 0 && label < cols ? as_float(z[label]) : nanf("");
  sum = block_sum(sum, part + kWarps);
  if (threadIdx.x == 0) losses[n] = most + logf(sum) - of_label;
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
    const float p = expf(as_float(z[c]) - most) / sum;
    z[c] = round_to<T>(scale * (p - (c == label ? 1.f : 0.f)));
  }
}

}  // namespace

void cross_entropy_rung(int rung, Tensor& losses, Tensor& logits, const Tensor& labels,
                        double scale, cudaStream_t stream) {
  CHECK(rung >= 1 && rung <= kCrossEntropyRungs, "cross_entropy: rung ", rung, ", wanted 1 to ",
        kCrossEntropyRungs);
  if (rung != 2)
    return launch_cross_entropy(rung == 1 ? 1 : 2, losses, logits, labels, scale, true, stream);
  const int64_t rows = logits.num_rows();
  CHECK(rows <= INT32_MAX, "cross_entropy: ", rows, " rows, wanted fewer than 2^31");
  dispatch_activation("cross_entropy", logits.dtype(), [&]<class T>(T) {
    launch(cross_entropy_passes<T>, dim3(unsigned(rows)), dim3(kThreads), 0, stream,
           device_data<float>(losses), device_data<T>(logits), logits.row_stride(),
           device_data<const int32_t>(labels), logits.cols(), float(scale));
  });
}

}  // namespace graft
