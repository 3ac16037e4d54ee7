// The matrix product by hand, rungs 1 to 3: without tensor cores. Read before: gemm_by_hand.h.
// Read next: gemm_by_hand_mma.cu.
//   c[i,j] = sum over k of a[i,k] b[j,k]
// Peaks for the rooflines: H200, 989 TFLOP/s BF16 on tensor cores, 67 TFLOP/s F32 without.
#include "cuda/gemm_by_hand.h"

#include "cuda/gemm_registers.cuh"

namespace graft {
namespace {

constexpr int kNaiveRows = 8;  // of a block of rung 1, each 32 columns

// gemm_by_hand, variant 1: one thread per output.                     (2: tiles in shared memory)
//   c = a b^T
// Shapes    c (M, N), a (M, K), b (N, K), all F32 or all BF16, rows strided.
// Mapping   block = 32 x 8 threads = 32 columns of 8 rows; thread (x, y) owns one output. The lanes
//           of a warp read one address of a, and 32 rows of b: 32 cache lines a load.
// Bytes     2MNK elements read, one multiply-add for two loads; caches make good a part.
// Roofline  M=N=K=4096, BF16: 139 us at 989 TFLOP/s (H200 peak). Measured: -
// Numerics  F32, one after the other; one rounding, at the store.
template <class T>
__global__ void __launch_bounds__(256)
    gemm_1_naive(T* c, int64_t c_stride, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                 int m, int n, int k) {
  const int row = int(blockIdx.y) * kNaiveRows + int(threadIdx.y);
  const int col = int(blockIdx.x) * 32 + int(threadIdx.x);
  if (row >= m || col >= n) return;
  const T *from_a = a + row * a_stride, *from_b = b + col * b_stride;
  float sum = 0;
  for (int i = 0; i < k; ++i) sum += as_float(from_a[i]) * as_float(from_b[i]);
  c[row * c_stride + col] = round_to<T>(sum);
}

constexpr int kTile2 = 32;

// gemm_by_hand, variant 2: tiles in shared memory.        (1: one thread per output, 3: registers)
//   as variant 1
// Shapes    as variant 1.
// Mapping   block = 32 x 32 threads = 32 x 32 outputs; per step thread (x, y) loads element x of
//           row y of both tiles, so that a warp reads one line, and then all read 64 elements each.
// Bytes     2MNK / 32 elements from L2: every element is used 32 times. Shared memory gives two
//           floats per multiply-add, and that is the limit now.
// Roofline  as variant 1. Measured: -
// Numerics  as variant 1.
template <class T>
__global__ void __launch_bounds__(kTile2* kTile2)
    gemm_2_shared(T* c, int64_t c_stride, const T* a, int64_t a_stride, const T* b,
                  int64_t b_stride, int m, int n, int k) {
  constexpr int kPitch = kTile2 + 1;  // odd: the lanes below read 32 rows of one column of tile_b
  SHARED_ARRAY(float, tile_a, kTile2* kPitch);
  SHARED_ARRAY(float, tile_b, kTile2* kPitch);
  const int x = int(threadIdx.x), y = int(threadIdx.y);
  const int row0 = int(blockIdx.y) * kTile2, col0 = int(blockIdx.x) * kTile2;
  float sum = 0;
  for (int k0 = 0; k0 < k; k0 += kTile2) {
    const bool inside = k0 + x < k;
    tile_a[y * kPitch + x] =
        inside && row0 + y < m ? as_float(a[(row0 + y) * a_stride + k0 + x]) : 0.f;
    tile_b[y * kPitch + x] =
        inside && col0 + y < n ? as_float(b[(col0 + y) * b_stride + k0 + x]) : 0.f;
    __syncthreads();  // the tiles are complete
    for (int i = 0; i < kTile2; ++i) sum += tile_a[y * kPitch + i] * tile_b[x * kPitch + i];
    __syncthreads();  // everybody has read them, before they are overwritten
  }
  if (row0 + y < m && col0 + x < n) c[(row0 + y) * c_stride + col0 + x] = round_to<T>(sum);
}

// Rows [row0, row0 + kTile3) and columns [k0, k0 + kDepth3) of x (rows, k) to tile[column][row];
// zeros past the ends. 256 threads.
template <class T>
__device__ inline void load_transposed(float* tile, const T* x, int64_t stride, int row0, int rows,
                                       int k0, int k) {
  constexpr int kWide = kVectorWidth<T>, kLoads = kDepth3 / kWide;  // of a row
#pragma unroll
  for (int i = int(threadIdx.x); i < kTile3 * kLoads; i += 256) {
    const int r = i % kTile3, column = i / kTile3 * kWide;
    float values[kWide] = {};
    if (row0 + r < rows && k0 + column < k)
      load_floats<kWide>(values, x + (row0 + r) * stride + k0 + column);
#pragma unroll
    for (int j = 0; j < kWide; ++j) tile[(column + j) * kPitch3 + r] = values[j];
  }
}

// gemm_by_hand, variant 3: 8 x 8 outputs a thread, 16-byte loads.  (2: shared tiles, 4: mma.sync)
//   as variant 1
// Shapes    as variant 1; K, strides and addresses multiples of 16 bytes.
// Mapping   block = 256 threads = 128 x 128 outputs; thread (ty, tx) of 16 x 16 owns rows 4 ty + i
//           and 64 + 4 ty + i, columns likewise: 16 floats from shared memory, in 4 vectors, for 64
//           multiply-adds. Tiles are kept transposed, so that a vector is 4 rows of one k.
// Bytes     2MNK / 128 elements from L2.
// Roofline  as variant 1, but 2.05 ms at 67 TFLOP/s without tensor cores. Measured: -
// Numerics  as variant 1.
template <class T>
__global__ void __launch_bounds__(256)
    gemm_3_registers(T* c, int64_t c_stride, const T* a, int64_t a_stride, const T* b,
                     int64_t b_stride, int m, int n, int k) {
  SHARED_ARRAY(float, tile_a, kDepth3* kPitch3);
  SHARED_ARRAY(float, tile_b, kDepth3* kPitch3);
  const int row0 = int(blockIdx.y) * kTile3, col0 = int(blockIdx.x) * kTile3;
  float sum[8][8] = {};
  for (int k0 = 0; k0 < k; k0 += kDepth3) {
    load_transposed(tile_a, a, a_stride, row0, m, k0, k);
    load_transposed(tile_b, b, b_stride, col0, n, k0, k);
    __syncthreads();  // the tiles are complete
    multiply_tiles3(sum, tile_a, tile_b);
    __syncthreads();  // everybody has read them, before they are overwritten
  }
  for_each_output3(sum, row0, m, col0, n, [&](int row, int col, float value) {
    c[row * c_stride + col] = round_to<T>(value);
  });
}

void check_arguments(int rung, const Tensor& c, const Tensor& a, const Tensor& b) {
  CHECK(rung >= 1 && rung <= kGemmRungs, "gemm_by_hand: variant ", rung, ", wanted 1 to ",
        kGemmRungs);
  CHECK(a.rank() == 2 && b.rank() == 2 && c.rank() == 2 && a.cols() == b.cols() &&
            c.num_rows() == a.num_rows() && c.cols() == b.num_rows(),
        "gemm_by_hand: c ", c.shape(), ", a ", a.shape(), ", b ", b.shape(),
        ", wanted (M, N), (M, K), (N, K)");
  CHECK(a.dtype() == b.dtype() && a.dtype() == c.dtype(), "gemm_by_hand: c ", dtype_name(c.dtype()),
        ", a ", dtype_name(a.dtype()), ", b ", dtype_name(b.dtype()), ", wanted one dtype");
  CHECK(rung <= 3 || a.dtype() == DType::BF16, "gemm_by_hand: variant ", rung, " with ",
        dtype_name(a.dtype()), ", wanted BF16");
  CHECK(a.num_rows() <= INT32_MAX && b.num_rows() <= INT32_MAX && a.cols() <= INT32_MAX,
        "gemm_by_hand: a ", a.shape(), ", b ", b.shape(), ", wanted sizes below 2^31");
  // 65,535 blocks in the grid's second dimension, of rung 1's rows.
  CHECK(rung == kGemmRungs || a.num_rows() <= 65535 * kNaiveRows, "gemm_by_hand: variant ", rung,
        " of ", a.num_rows(), " rows, wanted at most ", 65535 * kNaiveRows);
  const int width = a.dtype() == DType::BF16 ? 8 : 4;
  CHECK(rung <= 2 || vector_rows(width, a, b), "gemm_by_hand: K is ", a.cols(), " and rows are ",
        a.row_stride(), " and ", b.row_stride(), " elements apart, wanted multiples of ", width,
        " and 16-byte aligned addresses in variant ", rung);
}

}  // namespace

void gemm_by_hand(int rung, Tensor& c, const Tensor& a, const Tensor& b, cudaStream_t stream) {
  check_arguments(rung, c, a, b);
  if (rung >= 4) return gemm_by_hand_mma(rung, c, a, b, stream);
  const int m = int(a.num_rows()), n = int(b.num_rows()), k = int(a.cols());
  dispatch_activation("gemm_by_hand", a.dtype(), [&]<class T>(T) {
    const auto start = [&](auto kernel, int rows, int cols, dim3 threads) {
      launch(kernel, dim3(ceil_div(n, cols), ceil_div(m, rows)), threads, 0, stream,
             device_data<T>(c), c.row_stride(), device_data<const T>(a), a.row_stride(),
             device_data<const T>(b), b.row_stride(), m, n, k);
    };
    if (rung == 1) return start(gemm_1_naive<T>, kNaiveRows, 32, dim3(32, kNaiveRows));
    if (rung == 2) return start(gemm_2_shared<T>, kTile2, kTile2, dim3(kTile2, kTile2));
    start(gemm_3_registers<T>, kTile3, kTile3, dim3(256));
  });
}

}  // namespace graft
