// c = beta c + alpha op(a) op(b) by hand, for every transpose, stride and edge. Read before:
// own_gemm.h, gemm_tiles.cuh, gemm_registers.cuh. Read next: gemm.cu.
#include "cuda/own_gemm.h"

#include "cuda/gemm_registers.cuh"
#include "cuda/gemm_tiles.cuh"

namespace graft {
namespace {

// A BF16 operand as it lies. kKLines says which way: lines of K elements, one for each row of c (or
// column, for b), or K lines.
struct OwnOperand {
  const bf16* data;
  int64_t stride;  // of lines, in elements
  bool chunks;     // lines are whole 16-byte chunks
};

template <class C>
struct OwnResult {
  C* data;
  int64_t stride;
  bool pairs;  // two neighbours may be stored at once
  float alpha, beta;
};

// From 128 x 256 tiles on, fewer than this leave multiprocessors idle (an H200 has 132).
constexpr int64_t kEnoughTiles = 128;
using SmallOwnTile = GemmTile<64, 64, 32, 32, 4>;

// Starts copying rows [row0, row0 + kRows) and [k0, k0 + kDepth) of K of op(x) (rows, k) to a
// swizzled tile; zeros past the ends. What is not in chunks comes element by element, at once.
template <int kRows, int kThreads, bool kKLines>
__device__ inline void load_own_tile(bf16* tile, const OwnOperand& x, int row0, int rows, int k0,
                                     int k) {
  constexpr int kAcross = kKLines ? kRows / 8 : kChunks;  // chunks of a line
  static_assert(kRows * kChunks % kThreads == 0);
  const int line0 = kKLines ? k0 : row0, lines = kKLines ? k : rows;
  const int col0 = kKLines ? row0 : k0, cols = kKLines ? rows : k;
#pragma unroll
  for (int first = 0; first < kRows * kChunks; first += kThreads) {
    const int i = first + int(threadIdx.x), line = i / kAcross, c = i % kAcross;
    const int col = col0 + c * 8;
    const bool valid = line0 + line < lines && col < cols;
    const bf16* from = valid ? x.data + (line0 + line) * x.stride + col : x.data;
    bf16* to =
        tile + (kKLines ? chunk_place_in_k_lines<kRows>(line, c) : chunk_place<true>(line, c));
    if (x.chunks) {
      ptx::cp_async16(to, from, valid);
    } else {
      Vector<bf16, 8> chunk;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        chunk.v[j] = valid && col + j < cols ? from[j] : round_to<bf16>(0.f);
      *reinterpret_cast<Vector<bf16, 8>*>(to) = chunk;
    }
  }
}

template <class Tile, class C>
__device__ inline void store_own_tile(const OwnResult<C>& c, const Accumulator<Tile>& sum, int row0,
                                      int rows, int col0, int cols) {
  for_each_pair<Tile>(sum, row0, col0, [&](int row, int col, float x0, float x1) {
    if (row >= rows || col >= cols) return;
    C* to = c.data + row * c.stride + col;
    const auto value = [&](float x, int i) {
      return c.alpha * x + (c.beta != 0 ? c.beta * as_float(to[i]) : 0);
    };
    if (c.pairs && col + 1 < cols) {
      store_floats<2>(to, {value(x0, 0), value(x1, 1)});
    } else {
      to[0] = round_to<C>(value(x0, 0));
      if (col + 1 < cols) to[1] = round_to<C>(value(x1, 1));
    }
  });
}

// own_gemm in BF16: gemm_by_hand's variant 7 for operands that lie in any way.
//   c = beta c + alpha op(a) op(b)
// Shapes    op(a) (M, K), op(b) (K, N) BF16, c (M, N) F32 or BF16; rows strided.
// Mapping   as variant 7, with blocks of 4 warps = 64 x 64 outputs where those of 128 x 256 are too
//           few. An operand of K lines goes to a tile of K lines, and ldmatrix.trans turns it.
// Bytes     2MNK / 171 elements from L2, with small tiles 2MNK / 32.
// Roofline  M=N=K=4096: 139 us at 989 TFLOP/s (H200 peak). Measured: -
// Numerics  F32 sums inside the tensor core, 16 of K at a time; one rounding, at the store.
template <class Tile, bool kKLinesA, bool kKLinesB, class C>
__global__ void __launch_bounds__(Tile::kThreads)
    own_gemm_bf16(OwnResult<C> c, OwnOperand a, OwnOperand b, int m, int n, int k) {
  DYNAMIC_SHARED(bf16, shared);
  const TilePlace place =
      banded_place(blockIdx.x, (m + Tile::kM - 1) / Tile::kM, (n + Tile::kN - 1) / Tile::kN);
  const int row0 = place.row * Tile::kM, col0 = place.col * Tile::kN;
  const int steps = (k + kDepth - 1) / kDepth;
  const auto load = [&](int step) {
    if (step < steps) {
      bf16* stage = shared + step % Tile::kStages * Tile::kStageElements;
      load_own_tile<Tile::kM, Tile::kThreads, kKLinesA>(stage, a, row0, m, step * kDepth, k);
      load_own_tile<Tile::kN, Tile::kThreads, kKLinesB>(stage + Tile::kM * kDepth, b, col0, n,
                                                        step * kDepth, k);
    }
    ptx::cp_async_commit();  // an empty group keeps the count of groups that of steps
  };
  Accumulator<Tile> sum = {};
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this step's tiles are complete; nobody reads the stage that is loaded next
    load(step + Tile::kStages - 1);
    const bf16* stage = shared + step % Tile::kStages * Tile::kStageElements;
    multiply_tiles<Tile, true, kKLinesA, kKLinesB>(sum, stage, stage + Tile::kM * kDepth);
  }
  store_own_tile<Tile>(c, sum, row0, m, col0, n);
}

// Rows [row0, row0 + kTile3) and [k0, k0 + kDepth3) of K of op(x) (rows, k) to tile[k][row]; zeros
// past the ends. Neighbouring threads read neighbours. 256 threads.
template <bool kKLines>
__device__ inline void load_own_tile3(float* tile, const float* x, int64_t stride, int row0,
                                      int rows, int k0, int k) {
#pragma unroll
  for (int i = int(threadIdx.x); i < kTile3 * kDepth3; i += 256) {
    const int r = kKLines ? i % kTile3 : i / kDepth3, kk = kKLines ? i / kTile3 : i % kDepth3;
    const bool valid = row0 + r < rows && k0 + kk < k;
    const int64_t at = kKLines ? (k0 + kk) * stride + row0 + r : (row0 + r) * stride + k0 + kk;
    tile[kk * kPitch3 + r] = valid ? x[at] : 0.f;
  }
}

// own_gemm in F32: gemm_by_hand's variant 3 for operands that lie in any way.
//   c = beta c + alpha op(a) op(b)
// Shapes    op(a) (M, K), op(b) (K, N), c (M, N) F32; rows strided.
// Mapping   as variant 3; elements are read one by one, for a row may begin anywhere.
// Bytes     2MNK / 128 elements from L2.
// Roofline  M=N=K=4096: 2.05 ms at 67 TFLOP/s (H200 peak without tensor cores). Measured: -
// Numerics  F32, one after the other.
template <bool kKLinesA, bool kKLinesB>
__global__ void __launch_bounds__(256)
    own_gemm_f32(OwnResult<float> c, const float* a, int64_t a_stride, const float* b,
                 int64_t b_stride, int m, int n, int k) {
  SHARED_ARRAY(float, tile_a, kDepth3* kPitch3);
  SHARED_ARRAY(float, tile_b, kDepth3* kPitch3);
  const TilePlace place =
      banded_place(blockIdx.x, (m + kTile3 - 1) / kTile3, (n + kTile3 - 1) / kTile3);
  const int row0 = place.row * kTile3, col0 = place.col * kTile3;
  float sum[8][8] = {};
  for (int k0 = 0; k0 < k; k0 += kDepth3) {
    load_own_tile3<kKLinesA>(tile_a, a, a_stride, row0, m, k0, k);
    load_own_tile3<kKLinesB>(tile_b, b, b_stride, col0, n, k0, k);
    __syncthreads();  // the tiles are complete
    multiply_tiles3(sum, tile_a, tile_b);
    __syncthreads();  // everybody has read them, before they are overwritten
  }
  for_each_output3(sum, row0, m, col0, n, [&](int row, int col, float value) {
    float* to = c.data + row * c.stride + col;
    *to = c.alpha * value + (c.beta != 0 ? c.beta * *to : 0);
  });
}

// f(a, b): whether each operand lies in lines of K, as std::bool_constant.
template <class F>
void dispatch_lines(const GemmTerm& term, F&& f) {
  const auto with_a = [&](auto a) {
    if (term.transpose_b) return f(a, std::false_type{});
    f(a, std::true_type{});
  };
  if (term.transpose_a) return with_a(std::true_type{});
  with_a(std::false_type{});
}

template <class C>
OwnResult<C> result_of(const Tensor& c, const GemmTerm& term, float beta) {
  const bool pairs = (c.row_stride() % 2 == 0 || c.num_rows() <= 1) &&
                     reinterpret_cast<uintptr_t>(c.raw()) % (2 * sizeof(C)) == 0;
  return {device_data<C>(c), c.row_stride(), pairs, float(term.alpha), beta};
}

unsigned tiles_of(int64_t m, int64_t n, int rows, int cols) {
  const int64_t tiles = int64_t(ceil_div(m, rows)) * ceil_div(n, cols);
  CHECK(tiles <= INT32_MAX, "own_gemm: ", m, " x ", n, " needs more than 2^31 blocks");
  return unsigned(tiles);
}

OwnOperand operand_of(const Tensor& x) {
  return {device_data<const bf16>(x), x.row_stride(), vector_rows(8, x)};
}

template <class Tile, class C>
void multiply_bf16(const OwnResult<C>& c, const GemmTerm& term, int m, int n, int k,
                   cudaStream_t stream) {
  dispatch_lines(term, [&](auto a, auto b) {
    launch(own_gemm_bf16<Tile, a.value, b.value, C>, dim3(tiles_of(m, n, Tile::kM, Tile::kN)),
           dim3(Tile::kThreads), Tile::kSharedBytes, stream, c, operand_of(term.a),
           operand_of(term.b), m, n, k);
  });
}

}  // namespace

void own_gemm(Tensor& c, const GemmTerm& term, float beta, cudaStream_t stream, OwnTiles tiles) {
  const Tensor &a = term.a, &b = term.b;
  for (const Tensor* t : std::initializer_list<const Tensor*>{&a, &b, &c})
    CHECK(t->num_rows() <= INT32_MAX && t->cols() <= INT32_MAX, "gemm: an operand is ", t->shape(),
          ", wanted fewer than 2^31 rows and columns");
  const int m = int(c.num_rows()), n = int(c.cols());
  const int k = int(term.transpose_a ? a.num_rows() : a.cols());
  if (a.dtype() == DType::F32) {
    CHECK(c.dtype() == DType::F32, "own_gemm: F32 into ", dtype_name(c.dtype()), ", wanted F32");
    return dispatch_lines(term, [&](auto of_a, auto of_b) {
      launch(own_gemm_f32<of_a.value, of_b.value>, dim3(tiles_of(m, n, kTile3, kTile3)), dim3(256),
             0, stream, result_of<float>(c, term, beta), device_data<const float>(a),
             a.row_stride(), device_data<const float>(b), b.row_stride(), m, n, k);
    });
  }
  const bool large = tiles == OwnTiles::ByShape
                         ? tiles_of(m, n, LargeTile::kM, LargeTile::kN) >= kEnoughTiles
                         : tiles == OwnTiles::Large;
  dispatch_activation("own_gemm", c.dtype(), [&]<class C>(C) {
    const OwnResult<C> result = result_of<C>(c, term, beta);
    if (large) return multiply_bf16<LargeTile>(result, term, m, n, k, stream);
    multiply_bf16<SmallOwnTile>(result, term, m, n, k, stream);
  });
}

}  // namespace graft
