// The column of the largest element of each row: what greedy decoding picks, so that one number and
// not a row of logits goes to the host.
#include <climits>

#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

constexpr int kThreads = 1024;

struct Best {
  float value;
  int32_t column;
};

// The larger, or of equal ones the first.
__device__ inline Best better(Best a, Best b) {
  const bool take_b = b.value > a.value || (b.value == a.value && b.column < a.column);
  return take_b ? b : a;
}

// Lane 0 gets the best of the warp.
__device__ inline Best warp_best_lane0(Best best) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const Best other = {__shfl_down_sync(kAllLanes, best.value, distance),
                        __shfl_down_sync(kAllLanes, best.column, distance)};
    best = better(best, other);
  }
  return best;
}

// argmax_rows.
//   indices[r] = the first c at which x[r,c] is largest
// Shapes    x (R, C) F32, rows strided; indices (R) I32.
// Mapping   block r owns row r; a thread owns columns thread, thread + 1024, ...; then the best of
//           each warp, by shuffles, and of the 32 warps.
// Bytes     4RC read. R=1, C=151936: 0.6 MB.
// Roofline  0.1 us at 4.8 TB/s (H200 peak), but one row is one multiprocessor's: some 10 us, where
//           the copy of the row to the host, which it saves, takes some 50. Measured: -
// Numerics  comparisons alone.
__global__ void __launch_bounds__(kThreads)
    argmax_kernel(int32_t* indices, const float* x, int64_t x_stride, int cols) {
  SHARED_ARRAY(Best, of_warps, kThreads / 32);
  const float* row = x + blockIdx.x * x_stride;
  const int thread = int(threadIdx.x);
  Best best = {-INFINITY, INT_MAX};
  for (int c = thread; c < cols; c += kThreads) best = better(best, {row[c], c});
  best = warp_best_lane0(best);
  if (thread % 32 == 0) of_warps[thread / 32] = best;
  __syncthreads();  // every warp's best is there
  if (thread >= 32) return;
  best = warp_best_lane0(of_warps[thread]);
  // A row of nothing but NaN has no best.
  if (thread == 0) indices[blockIdx.x] = best.column == INT_MAX ? 0 : best.column;
}

}  // namespace

void CudaBackend::argmax_rows(Tensor& indices, const Tensor& x) {
  CHECK(x.dtype() == DType::F32, "argmax_rows: x is ", dtype_name(x.dtype()), ", wanted F32");
  CHECK(x.num_rows() <= INT32_MAX && x.cols() <= INT32_MAX - kThreads, "argmax_rows: x is ",
        x.shape(), ", wanted fewer than 2^31 rows and columns");
  launch(argmax_kernel, dim3(unsigned(x.num_rows())), dim3(kThreads), 0, stream_,
         device_data<int32_t>(indices), device_data<const float>(x), x.row_stride(), int(x.cols()));
}

}  // namespace graft
