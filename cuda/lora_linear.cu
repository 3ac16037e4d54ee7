// y = x W^T + s (x A^T) B^T by hand, in three rungs. Read before: lora_linear.h, gemm_tiles.cuh.
// With r 16 the low-rank products are under 1 % of the layer's FLOP, but done plainly they read and
// write as much as the base product does; so the ladder is one of bytes.
#include "cuda/lora_linear.h"

#include <algorithm>

#include "cuda/gemm_by_hand.h"
#include "cuda/gemm_tiles.cuh"

namespace graft {
namespace {

constexpr int kUpCols = 32, kUpRows = 8;  // of a block of lora_1_up

// lora_linear, variants 1 and 2: the low-rank part, by itself.    (3: lora_3_fused)
//   y[m,n] += factor * sum over r of u[m,r] B[n,r]
// Shapes    y (M, N), u (M, r), B (N, r) BF16, rows strided.
// Mapping   block = 32 x 8 threads = 32 columns of 8 rows; one thread per output.
// Bytes     MN elements read and MN written, which the base product has just written, and u, B.
//           M=N=4096: 67 MB, for 0.5 GFLOP.
// Roofline  14 us at 4.8 TB/s (H200 peak): a tenth of the base product's 139 us. Measured: -
// Numerics  F32 sum; y is rounded a second time.
__global__ void __launch_bounds__(kUpCols* kUpRows)
    lora_1_up(bf16* y, int64_t y_stride, const bf16* u, int64_t u_stride, const bf16* b,
              int64_t b_stride, int m, int n, int rank, float factor) {
  const int row = int(blockIdx.y) * kUpRows + int(threadIdx.y);
  const int col = int(blockIdx.x) * kUpCols + int(threadIdx.x);
  if (row >= m || col >= n) return;
  float sum = 0;
  for (int i = 0; i < rank; ++i)
    sum += as_float(u[row * u_stride + i]) * as_float(b[col * b_stride + i]);
  bf16* to = y + row * y_stride + col;
  *to = round_to<bf16>(as_float(*to) + factor * sum);
}

// A block of 4 warps owns 64 rows of x and kN rows of A.
template <int kN>
using SkinnyTile = GemmTile<64, kN, 16, kN, 4>;

// lora_linear, variants 2 and 3: u = x A^T, split over K.                       (1: gemm_7_large)
//   partial[s,m,j] = sum over k of slice s of x[m,k] A[j,k]
// Shapes    x (M, K), A (r, K) BF16, rows strided; partial (slices, M, r) F32.
// Mapping   block (x, y, z) = 4 warps = 64 rows of x, slice y of K, kN rows of A from z kN on;
//           a warp owns 16 rows. Variant 1's tiles, 128 x 256, would be one column of M/128 blocks,
//           most of the GPU idle and 15/16 of each tile empty.
// Bytes     x once: 2MK, and A from L2. M=K=4096: 34 MB.
// Roofline  7 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32 within a slice. The slices follow from M, K and r alone: one order on every device.
template <int kN>
__global__ void __launch_bounds__(SkinnyTile<kN>::kThreads)
    lora_2_down(float* partial, GemmOperands from, int m, int rank, int slice) {
  using Tile = SkinnyTile<kN>;
  DYNAMIC_SHARED(bf16, shared);
  const int row0 = int(blockIdx.x) * Tile::kM, col0 = int(blockIdx.z) * kN;
  const int k0 = int(blockIdx.y) * slice;
  from.a += k0;
  from.b += k0;
  from.k = min(slice, from.k - k0);
  Accumulator<Tile> sum = {};
  multiply_pipelined<Tile, false>(sum, shared, from, from, row0, m, col0, rank);
  float* to = partial + int64_t(blockIdx.y) * m * rank;
  for_each_pair<Tile>(sum, row0, col0, [&](int row, int col, float x0, float x1) {
    if (row < m && col < rank) to[int64_t(row) * rank + col] = x0;
    if (row < m && col + 1 < rank) to[int64_t(row) * rank + col + 1] = x1;
  });
}

// u[m,j] = factor * sum over s, in order, of partial[s,m,j], rounded; zero in columns rank to
// u_cols. One thread per element.
__global__ void __launch_bounds__(256) lora_2_sum(bf16* u, const float* partial, int64_t m,
                                                  int rank, int u_cols, int slices, float factor) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= m * u_cols) return;
  const int64_t row = i / u_cols, col = i % u_cols;
  float sum = 0;
  for (int s = 0; col < rank && s < slices; ++s) sum += partial[(s * m + row) * rank + col];
  u[i] = round_to<bf16>(factor * sum);
}

// lora_linear, variant 3: the low-rank product inside the base product.          (2: lora_1_up)
//   y = x W^T + u B^T, u = s x A^T from lora_2_down
// Shapes    y (M, N), x (M, K), W (N, K), u (M, r), B (N, r) BF16, in 16-byte chunks.
// Mapping   gemm_by_hand's variant 7; after K's last step the pipeline goes on with u and B, as if
//           the operands were [x | u] and [W | B].
// Bytes     y is written once and not read: 2MN elements fewer than variant 2. u, B: 2(M + N)r.
// Roofline  one step of 32 more than K/32: 0.8 % for K=4096. Measured: -
// Numerics  one F32 sum, one rounding at the store; u is rounded to BF16.
__global__ void __launch_bounds__(LargeTile::kThreads)
    lora_3_fused(bf16* y, int64_t y_stride, bool pairs, GemmOperands base, GemmOperands low_rank,
                 int m, int n) {
  using Tile = LargeTile;
  DYNAMIC_SHARED(bf16, shared);
  const TilePlace place =
      banded_place(blockIdx.x, (m + Tile::kM - 1) / Tile::kM, (n + Tile::kN - 1) / Tile::kN);
  const int row0 = place.row * Tile::kM, col0 = place.col * Tile::kN;
  Accumulator<Tile> sum = {};
  multiply_pipelined<Tile, true>(sum, shared, base, low_rank, row0, m, col0, n);
  store_tile<Tile>(y, y_stride, sum, row0, m, col0, n, pairs);
}

GemmOperands operands(const Tensor& a, const Tensor& b) {
  return {device_data<const bf16>(a), a.row_stride(), device_data<const bf16>(b), b.row_stride(),
          int(a.cols())};
}

// factor * x lora_a^T by rung 2: (M, r), r filled up with zeros to 16-byte rows.
Tensor low_rank_rows(const Tensor& x, const Tensor& lora_a, double factor, cudaStream_t stream) {
  constexpr int64_t kWantedBlocks = 512, kLeastSlice = 256;
  const int64_t m = x.num_rows(), rank = lora_a.num_rows(), k = x.cols();
  const bool wide = rank > 16;  // 64 columns a block instead of 16
  const unsigned rows = ceil_div(m, 64), cols = ceil_div(rank, wide ? 64 : 16);
  const int64_t wanted = ceil_div(kWantedBlocks, std::max<int64_t>(1, int64_t(rows) * cols));
  const int64_t slices = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, k / kLeastSlice));
  const int64_t slice = (k + slices * kDepth - 1) / (slices * kDepth) * kDepth;
  const unsigned used = std::max(1u, slice ? ceil_div(k, slice) : 0);  // rounding may save some
  const Tensor partial =
      Tensor::empty({int64_t(used), m, rank}, DType::F32, Device::CUDA, Scope::Scratch);
  const auto start = [&](auto kernel, int threads, size_t shared) {
    launch(kernel, dim3(rows, used, cols), dim3(unsigned(threads)), shared, stream,
           device_data<float>(partial), operands(x, lora_a), int(m), int(rank), int(slice));
  };
  if (wide)
    start(lora_2_down<64>, SkinnyTile<64>::kThreads, SkinnyTile<64>::kSharedBytes);
  else
    start(lora_2_down<16>, SkinnyTile<16>::kThreads, SkinnyTile<16>::kSharedBytes);

  Tensor u = Tensor::empty({m, (rank + 7) / 8 * 8}, DType::BF16, Device::CUDA, Scope::Scratch);
  launch(lora_2_sum, dim3(ceil_div(u.num_elements(), 256)), dim3(256), 0, stream,
         device_data<bf16>(u), device_data<const float>(partial), m, int(rank), int(u.cols()),
         int(used), float(factor));
  return u;
}

void add_low_rank(Tensor& y, const Tensor& u, const Tensor& lora_b, double factor,
                  cudaStream_t stream) {
  launch(lora_1_up, dim3(ceil_div(y.cols(), kUpCols), ceil_div(y.num_rows(), kUpRows)),
         dim3(kUpCols, kUpRows), 0, stream, device_data<bf16>(y), y.row_stride(),
         device_data<const bf16>(u), u.row_stride(), device_data<const bf16>(lora_b),
         lora_b.row_stride(), int(y.num_rows()), int(y.cols()), int(lora_b.cols()), float(factor));
}

void check_arguments(int rung, const Tensor& y, const Tensor& x, const Tensor& weight,
                     const Tensor& lora_a, const Tensor& lora_b) {
  CHECK(rung >= 1 && rung <= kLoraRungs, "lora_linear: variant ", rung, ", wanted 1 to ",
        kLoraRungs);
  CHECK(x.cols() == weight.cols() && x.cols() == lora_a.cols() &&
            lora_a.num_rows() == lora_b.cols() && lora_b.num_rows() == weight.num_rows() &&
            y.num_rows() == x.num_rows() && y.cols() == weight.num_rows(),
        "lora_linear: y ", y.shape(), ", x ", x.shape(), ", weight ", weight.shape(), ", lora_a ",
        lora_a.shape(), ", lora_b ", lora_b.shape(),
        ", wanted (M, N), (M, K), (N, K), (r, K), (N, r)");
  for (const Tensor* t : {&y, &x, &weight, &lora_a, &lora_b}) {
    CHECK(t->dtype() == DType::BF16, "lora_linear: dtype is ", dtype_name(t->dtype()),
          ", wanted BF16");
    CHECK(t->num_rows() <= INT32_MAX && t->cols() <= INT32_MAX, "lora_linear: ", t->shape(),
          ", wanted sizes below 2^31");
  }
  // 65,535 blocks in the grid's second dimension, of lora_1_up's 8 rows.
  CHECK(rung == kLoraRungs || y.num_rows() <= 65535 * 8, "lora_linear: variant ", rung, " of ",
        y.num_rows(), " rows, wanted at most ", 65535 * 8);
  CHECK(vector_rows(8, x, weight, lora_a), "lora_linear: K is ", x.cols(),
        ", wanted K, row strides and addresses of x, weight and lora_a in 16 bytes");
  CHECK(rung <= 2 || vector_rows(8, lora_b), "lora_linear: r is ", lora_b.cols(),
        ", wanted r, row stride and address of lora_b in 16 bytes in variant 3");
}

}  // namespace

void lora_linear(int rung, Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                 const Tensor& lora_b, double scaling, cudaStream_t stream) {
  check_arguments(rung, y, x, weight, lora_a, lora_b);
  if (rung == 1) {
    gemm_by_hand(kGemmRungs, y, x, weight, stream);
    Tensor u =
        Tensor::empty({x.num_rows(), lora_a.num_rows()}, DType::BF16, Device::CUDA, Scope::Scratch);
    gemm_by_hand(kGemmRungs, u, x, lora_a, stream);
    return add_low_rank(y, u, lora_b, scaling, stream);
  }
  const Tensor u = low_rank_rows(x, lora_a, scaling, stream);
  if (rung == 2) {
    gemm_by_hand(kGemmRungs, y, x, weight, stream);
    return add_low_rank(y, u, lora_b, 1, stream);
  }
  const int m = int(y.num_rows()), n = int(y.cols());
  const int64_t blocks = int64_t(ceil_div(m, LargeTile::kM)) * ceil_div(n, LargeTile::kN);
  CHECK(blocks <= INT32_MAX, "lora_linear: ", m, " x ", n, " needs more than 2^31 blocks");
  launch(lora_3_fused, dim3(unsigned(blocks)), dim3(LargeTile::kThreads), LargeTile::kSharedBytes,
         stream, device_data<bf16>(y), y.row_stride(), stores_pairs(y), operands(x, weight),
         operands(u, lora_b), m, n);
}

}  // namespace graft
