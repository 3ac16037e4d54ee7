// The lengths of the rows of W + s B A, for all layers of DoRA at once, between two steps: per
// layer one product that reads W, and three launches for 48 layers.
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

constexpr int kThreads = 256;

struct Piece {
  float* norm;            // (N)
  const float* squares;   // (N)
  const float *a, *b;     // (r, K), (N, r)
  bf16* halves;           // (2 r, K), A as a sum of two, or null
  const float* products;  // (r, N) A W^T, or (2 r, N) of the halves
  float* gram;            // (r, r)
  int64_t N, K;
  int32_t rank;
  float scaling;
};
// They travel as a parameter, as in copy_scaled.cu.
constexpr int kPieces = 48;
struct Pieces {
  Piece piece[kPieces];
};
static_assert(sizeof(Pieces) <= 4096);

// split_factor.
//   halves[j,k] = bf16(a[j,k]),   halves[r + j,k] = bf16(a[j,k] - halves[j,k])   for every piece
// Shapes    a (r, K) F32; halves (2 r, K) BF16: what a product with a BF16 weight can take of A,
//           accurate to 2^-17.
// Mapping   blockIdx.y = piece; its blocks share the elements and go on by the size of the grid.
// Bytes     8 r K. All adapters of 8B at r 16: 168 MB.
// Roofline  35 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  the difference is exact in F32.
__global__ void __launch_bounds__(kThreads) split_factor_kernel(Pieces pieces) {
  const Piece& piece = pieces.piece[blockIdx.y];
  if (!piece.halves) return;
  const int64_t n = piece.rank * piece.K;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * kThreads) {
    const bf16 high = round_to<bf16>(piece.a[i]);
    piece.halves[i] = high;
    piece.halves[n + i] = round_to<bf16>(piece.a[i] - as_float(high));
  }
}

// gram.
//   gram[j,l] = sum_k a[j,k] a[l,k]   for every piece
// Shapes    a (r, K) F32, gram (r, r) F32.
// Mapping   blockIdx.y = piece; a warp owns a pair (j, l), then the next by the size of the grid;
//           lane i adds columns i, i + 32, ...
// Bytes     4 r K, r times from cache. All adapters of 8B at r 16: 84 MB.
// Roofline  17 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32.
__global__ void __launch_bounds__(kThreads) gram_kernel(Pieces pieces) {
  const Piece& piece = pieces.piece[blockIdx.y];
  const int lane = int(threadIdx.x) % 32;
  const int pairs = piece.rank * piece.rank, warps = int(gridDim.x) * (kThreads / 32);
  for (int pair = int(blockIdx.x) * (kThreads / 32) + int(threadIdx.x) / 32; pair < pairs;
       pair += warps) {
    const float* first = piece.a + (pair / piece.rank) * piece.K;
    const float* second = piece.a + (pair % piece.rank) * piece.K;
    float sum = 0;
    for (int64_t k = lane; k < piece.K; k += 32) sum += first[k] * second[k];
    sum = warp_sum(sum);
    if (lane == 0) piece.gram[pair] = sum;
  }
}

// row_norms.
//   norm[n] = sqrt(max(0, squares[n] + sum_j b[n,j] (2 s p[j,n] + s^2 sum_l gram[j,l] b[n,l])))
// Shapes    norm, squares (N) F32; b (N, r), p = A W^T (r, N) or two parts of it, gram (r, r), F32.
// Mapping   blockIdx.y = piece; a thread owns a row, then the next by the size of the grid; kTile
//           of its b are in registers while it walks over all.
// Bytes     4 N (2 r + 2). All adapters of 8B at r 16: 187 MB.
// Roofline  39 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32; the sum may cancel, and is 0 at least.
constexpr int kTile = 8;
__global__ void __launch_bounds__(kThreads) row_norms_kernel(Pieces pieces) {
  const Piece& piece = pieces.piece[blockIdx.y];
  const int r = piece.rank;
  const float s = piece.scaling;
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < piece.N;
       n += int64_t(gridDim.x) * kThreads) {
    const float* b = piece.b + n * r;
    float sum = piece.squares[n];
    for (int first = 0; first < r; first += kTile) {
      const int count = r - first < kTile ? r - first : kTile;
      float t[kTile] = {};
      for (int l = 0; l < r; ++l)
        for (int i = 0; i < count; ++i) t[i] += piece.gram[(first + i) * r + l] * b[l];
      for (int i = 0; i < count; ++i) {
        float p = piece.products[(first + i) * piece.N + n];
        if (piece.halves) p += piece.products[(r + first + i) * piece.N + n];
        sum += b[first + i] * (2 * s * p + s * s * t[i]);
      }
    }
    piece.norm[n] = sqrtf(fmaxf(sum, 0.0f));
  }
}

// row_squares.
//   squares[n] = sum_k w[n,k]^2
// Shapes    w (N, K) F32, BF16 or F16, rows strided; squares (N) F32.
// Mapping   a warp owns a row; lane i adds columns i, i + 32, ...
// Bytes     NK elements read, once for a model.
// Roofline  - (not part of a step). Measured: -
// Numerics  F32.
template <class W>
__global__ void __launch_bounds__(kThreads)
    row_squares_kernel(float* squares, const W* w, int64_t stride, int64_t rows, int64_t cols) {
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;  // whole warps leave together
  const int lane = int(threadIdx.x) % 32;
  float sum = 0;
  for (int64_t k = lane; k < cols; k += 32) {
    const float x = as_float(w[row * stride + k]);
    sum += x * x;
  }
  sum = warp_sum(sum);
  if (lane == 0) squares[row] = sum;
}

void check_layer(const DoraNorm& layer) {
  for (const Tensor* t : {&layer.norm, &layer.squares, &layer.a, &layer.b})
    CHECK(t->dtype() == DType::F32 && t->is_contiguous() && t->device() == Device::CUDA,
          "dora_norms: got ", dtype_name(t->dtype()), " ", t->shape(),
          ", wanted dense F32 on the GPU");
  CHECK(layer.a.size(0) <= 4096, "dora_norms: the rank is ", layer.a.size(0),
        ", wanted up to 4096");
}

// Scratch of the layers of one round of launches.
struct Round {
  std::vector<Tensor> halves, products, grams;
  Pieces pieces{};
  int64_t most_a = 0, most_rows = 0, most_pairs = 0;
};

Round make_round(std::span<const DoraNorm> layers) {
  Round round;
  const auto scratch = [](Shape shape, DType dtype) {
    return Tensor::empty(shape, dtype, Device::CUDA, Scope::Scratch);
  };
  for (size_t i = 0; i < layers.size(); ++i) {
    const DoraNorm& layer = layers[i];
    check_layer(layer);
    const int64_t r = layer.a.size(0), K = layer.a.size(1), N = layer.b.size(0);
    const bool split = layer.weight.dtype() == DType::BF16;
    round.halves.push_back(split ? scratch({2 * r, K}, DType::BF16) : Tensor());
    round.products.push_back(scratch({split ? 2 * r : r, N}, DType::F32));
    round.grams.push_back(scratch({r, r}, DType::F32));
    round.pieces.piece[i] = {device_data<float>(layer.norm),
                             device_data<const float>(layer.squares),
                             device_data<const float>(layer.a),
                             device_data<const float>(layer.b),
                             split ? device_data<bf16>(round.halves[i]) : nullptr,
                             device_data<const float>(round.products[i]),
                             device_data<float>(round.grams[i]),
                             N,
                             K,
                             int32_t(r),
                             float(layer.scaling)};
    round.most_a = std::max(round.most_a, split ? r * K : 0);
    round.most_rows = std::max(round.most_rows, N);
    round.most_pairs = std::max(round.most_pairs, r * r);
  }
  return round;
}

}  // namespace

void CudaBackend::row_squares(Tensor& squares, const Tensor& w) {
  CHECK(squares.dtype() == DType::F32 && squares.is_contiguous(), "row_squares: squares is ",
        dtype_name(squares.dtype()), ", wanted dense F32 on the GPU");
  const Tensor wide = is_nf4(w.dtype()) ? widened(w, DType::F32) : w;
  dispatch_device(wide.dtype(), [&]<class W>(W) {
    launch(row_squares_kernel<W>, dim3(ceil_div(wide.num_rows(), kThreads / 32)), dim3(kThreads), 0,
           stream_, device_data<float>(squares), device_data<const W>(wide), wide.row_stride(),
           wide.num_rows(), wide.cols());
  });
}

void CudaBackend::dora_norms(std::span<const DoraNorm> layers) {
  for (size_t begin = 0; begin < layers.size(); begin += kPieces) {
    const auto here = layers.subspan(begin, std::min(layers.size() - begin, size_t(kPieces)));
    Round round = make_round(here);
    const auto start = [&](auto kernel, int64_t most, int64_t per_block) {
      const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(most, per_block), 1024));
      launch(kernel, dim3(blocks, unsigned(here.size())), dim3(kThreads), 0, stream_, round.pieces);
    };
    start(split_factor_kernel, round.most_a, kThreads * 4);
    start(gram_kernel, round.most_pairs, kThreads / 32);
    for (size_t i = 0; i < here.size(); ++i) {
      const GemmTerm term{.a = round.halves[i].defined() ? round.halves[i] : here[i].a,
                          .b = here[i].weight,
                          .transpose_b = true};
      gemm(round.products[i], {&term, 1}, {}, {});
    }
    start(row_norms_kernel, round.most_rows, kThreads);
  }
}

}  // namespace graft
