// Rung 3 of attention: FlashAttention-2 (Dao 2023) on BF16 tensor cores by mma.sync m16n8k16, for
// head_dim 64 and 128. Read before: attention.h, attention.cu (the equations, and what a block of
// the backward owns and walks over).
//
// A tile is rows of one head in shared memory, kDim elements each, as chunks of 8 (16 bytes); chunk
// c of row r lies at c ^ (r % 8), so that the 8 rows of one ldmatrix are in 8 different bank
// groups. A warp owns 16 rows of the block's 64. In an accumulator of 16 rows, lane l holds rows
// l/4 and l/4 + 8, columns 2 (l%4) and one more of every 8: element e of [j][e] is row
// l/4 + 8 (e/2), column 8j + 2 (l%4) + e%2. Two neighbouring column groups, packed to BF16, are the
// left operand of the next product, so scores never leave the registers.
#include "cuda/attention.h"
#include "cuda/device_utils.cuh"
#include "cuda/mma.cuh"

namespace graft {
namespace {

constexpr int kThreads = 128;
constexpr int kOwned = 64;  // rows of a block: 4 warps x 16
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Where chunk c of row r of a tile is, in elements.
template <int kDim>
__device__ inline int swizzled(int r, int c) {
  return r * kDim + (c ^ (r % 8)) * 8;
}

// Starts copying rows [first, first + kRows) of a document that begins at row `begin` of x (T,
// heads, kDim); zeros past its `length`.
template <int kDim, int kRows>
__device__ inline void load_tile(bf16* tile, const bf16* x, int64_t begin, int first, int length,
                                 int heads, int head) {
  constexpr int kChunks = kDim / 8;
#pragma unroll
  for (int i = int(threadIdx.x); i < kRows * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks;
    const bool valid = first + r < length;
    const bf16* row = valid ? x + ((begin + first + r) * heads + head) * kDim + c * 8 : x;
    ptx::cp_async16(tile + swizzled<kDim>(r, c), row, valid);
  }
}

// The left operand: rows [row, row + 16) of a tile, columns [16 kk, 16 kk + 16).
template <int kDim>
__device__ inline void load_left(uint32_t (&a)[4], const bf16* tile, int row, int kk) {
  const int lane = int(threadIdx.x) % 32;
  ptx::ldmatrix_x4(a, tile + swizzled<kDim>(row + lane % 16, kk * 2 + lane / 16));
}

// s (16, kRows) += a (16, 16) * tile[:, 16 kk : 16 kk + 16]^T, tile (kRows, kDim).
template <int kDim, int kRows>
__device__ inline void add_product_transposed(float (&s)[kRows / 8][4], const uint32_t (&a)[4],
                                              const bf16* tile, int kk) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < kRows / 16; ++j) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, tile + swizzled<kDim>(j * 16 + lane % 16, kk * 2 + lane / 16));
    ptx::mma_m16n8k16(s[j * 2], a, b[0], b[2]);
    ptx::mma_m16n8k16(s[j * 2 + 1], a, b[1], b[3]);
  }
}

// sum (16, kDim) += p (16, kRows), rounded to BF16, * tile (kRows, kDim).
template <int kDim, int kRows>
__device__ inline void add_product(float (&sum)[kDim / 8][4], const float (&p)[kRows / 8][4],
                                   const bf16* tile) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int kk = 0; kk < kRows / 16; ++kk) {
    const float(&left)[4] = p[kk * 2], (&right)[4] = p[kk * 2 + 1];
    const uint32_t a[4] = {ptx::pack_bf16(left[0], left[1]), ptx::pack_bf16(left[2], left[3]),
                           ptx::pack_bf16(right[0], right[1]), ptx::pack_bf16(right[2], right[3])};
#pragma unroll
    for (int j = 0; j < kDim / 16; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, tile + swizzled<kDim>(kk * 16 + lane % 16, j * 2 + lane / 16));
      ptx::mma_m16n8k16(sum[j * 2], a, b[0], b[1]);
      ptx::mma_m16n8k16(sum[j * 2 + 1], a, b[2], b[3]);
    }
  }
}

// Rows l/4 and l/4 + 8 of an accumulator, times factor[0] and factor[1], to rows [row, row + 16) of
// the document that begins at `begin`; rows past its length are dropped.
template <int kDim>
__device__ inline void store_rows(bf16* x, const float (&sum)[kDim / 8][4],
                                  const float (&factor)[2], int64_t begin, int row, int length,
                                  int heads, int head) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane / 4 + half * 8;
    if (r >= length) continue;
    bf16* to = x + ((begin + r) * heads + head) * kDim + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
      *reinterpret_cast<bf162*>(to + j * 8) = __floats2bfloat162_rn(
          sum[j][half * 2] * factor[half], sum[j][half * 2 + 1] * factor[half]);
  }
}

// Over the four lanes that share the rows of an accumulator; all of them get the result.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// One step of the online softmax for rows l/4 and l/4 + 8: scores become weights, exp2 of what they
// are below the largest score so far; sums so far are rescaled to it.
template <int kDim, int kKeys>
__device__ inline void softmax_step(float (&s)[kKeys / 8][4], float (&sum)[kDim / 8][4],
                                    float (&most)[2], float (&total)[2], float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float higher = most[half];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
      higher = fmaxf(higher, fmaxf(s[j][half * 2], s[j][half * 2 + 1]));
    higher = quad_max(higher);
    const float base = higher == -INFINITY ? 0.f : higher;  // no key seen yet
    const float rescale = exp2f((most[half] - base) * scale_log2);
    most[half] = higher;
    float part = 0;  // of this lane's columns; the quad's are added at the end
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = half * 2; e < half * 2 + 2; ++e)
        part += s[j][e] = exp2f((s[j][e] - base) * scale_log2);
    total[half] = total[half] * rescale + part;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) sum[j][half * 2] *= rescale, sum[j][half * 2 + 1] *= rescale;
  }
}

constexpr int kKeys = 64;  // keys of a tile of the forward

template <int kDim>
constexpr size_t kForwardBytes = sizeof(bf16) * kDim*(kOwned + 2 * 2 * kKeys);

// attention_forward, variant 3: tensor cores.                      (2: F32 tiles in shared memory)
//   out = softmax(scale q k^T + causal mask) v,   lse = log sum exp
// Shapes    out, q (Tq, heads, D); k, v (Tk, kv_heads, D) BF16, D 64 or 128; lse (heads, Tq) F32.
// Mapping   block = 4 warps x 16 query rows of one head, walking over tiles of 64 keys; the next
//           tile is copied by cp.async while this one is multiplied.
// Bytes     l^2/128 * 4D of k and v per head and document of l tokens, mostly from L2: the heads
//           of a group run side by side to share it.
// Roofline  2 l^2 D FLOP per head at 990 TFLOP/s (H200 peak). Measured: -
// Numerics  scores, statistics and sums in F32; weights rounded to BF16 for the second product.
template <int kDim>
__global__ void __launch_bounds__(kThreads)
    attention_forward_3_kernel(bf16* out, float* lse, const bf16* q, const bf16* k, const bf16* v,
                               const AttentionTile* tiles, AttentionSizes n) {
  DYNAMIC_SHARED(bf16, shared);
  bf16* tile_q = shared;
  auto tile_k = [&](int t) { return shared + (kOwned + t % 2 * 2 * kKeys) * kDim; };
  auto tile_v = [&](int t) { return tile_k(t) + kKeys * kDim; };
  const AttentionTile tile = tiles[blockIdx.x / unsigned(n.heads)];
  const int head = int(blockIdx.x % unsigned(n.heads)), kv_head = head / (n.heads / n.kv_heads);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int shift = tile.keys - tile.queries;
  const int row = tile.first + warp * 16;
  const int seen = max(0, min(tile.first + kOwned, tile.queries) + shift);  // keys, by any row
  const int steps = (seen + kKeys - 1) / kKeys;

  auto load = [&](int t) {
    load_tile<kDim, kKeys>(tile_k(t), k, tile.k_begin, t * kKeys, tile.keys, n.kv_heads, kv_head);
    load_tile<kDim, kKeys>(tile_v(t), v, tile.k_begin, t * kKeys, tile.keys, n.kv_heads, kv_head);
    ptx::cp_async_commit();
  };
  load_tile<kDim, kOwned>(tile_q, q, tile.q_begin, tile.first, tile.queries, n.heads, head);
  load(0);

  // The queries stay in registers where there are enough of them.
  constexpr int kKept = kDim == 64 ? kDim / 16 : 1;
  uint32_t query[kKept][4];
  float sum[kDim / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  const float scale_log2 = n.scale * kLog2e;
  for (int t = 0; t < steps; ++t) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // tile t is there, and everybody is done with tile t - 1
    if (t + 1 < steps) load(t + 1);
    float s[kKeys / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < kDim / 16; ++kk) {
      if (t == 0 || kKept == 1) load_left<kDim>(query[kk % kKept], tile_q, warp * 16, kk);
      add_product_transposed<kDim, kKeys>(s, query[kk % kKept], tile_k(t), kk);
    }
    if (t * kKeys + kKeys - 1 > tile.first + shift) {  // the diagonal crosses this tile
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (t * kKeys + j * 8 + lane % 4 * 2 + e % 2 > row + lane / 4 + e / 2 * 8 + shift)
            s[j][e] = -INFINITY;
    }
    softmax_step<kDim, kKeys>(s, sum, most, total, scale_log2);
    add_product<kDim, kKeys>(sum, s, tile_v(t));
  }
  ptx::cp_async_wait<0>();  // where there was no step

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float all = quad_sum(total[half]);  // every lane takes part, also for rows past the end
    const int r = row + lane / 4 + half * 8;
    factor[half] = all != 0 ? 1 / all : 0.f;
    if (lane % 4 == 0 && r < tile.queries)
      lse[head * n.tokens + tile.q_begin + r] =
          all != 0 ? most[half] * n.scale + log2f(all) * kLn2 : -INFINITY;
  }
  store_rows<kDim>(out, sum, factor, tile.q_begin, row, tile.queries, n.heads, head);
}

// Rows of a walked tile of the backward: what the registers allow.
template <int kDim>
constexpr int kWalkedRows = kDim == 64 ? 64 : 32;
template <int kDim, bool kOwnsKeys>
constexpr size_t backward_bytes() {
  constexpr size_t kWalk = kWalkedRows<kDim>, kStatistics = kOwnsKeys ? kWalk : kOwned;
  return sizeof(bf16) * kDim * (2 * kOwned + 2 * 2 * kWalk) + sizeof(float) * 2 * 2 * kStatistics;
}

// attention_backward, variant 3: tensor cores.                     (2: F32 tiles in shared memory)
//   the equations of attention.cu; d1 is dq or dk, d2 is dv (owned keys only)
// Shapes    dout, q (T, heads, D); k, v (T, kv_heads, D) BF16, D 64 or 128; lse, delta (heads, T).
// Mapping   block = 4 warps x 16 owned rows of one head (of q, or of k), walking over tiles of 64
//           (32) rows; with owned keys, over the query heads of the group in turn. Two stages of
//           cp.async. Without atomics: scores are computed twice, once for dq, once for dk and dv.
// Bytes     l^2/128 * 8D per head and document of l tokens, mostly from L2.
// Roofline  7 l^2 D FLOP per head (5 with atomics) at 990 TFLOP/s (H200 peak). Measured: -
// Numerics  p and ds rounded to BF16 for the products, everything else F32; heads of the group,
//           then rows, in ascending order.
template <int kDim, bool kOwnsKeys>
__global__ void __launch_bounds__(kThreads)
    attention_backward_3_kernel(bf16* d1, bf16* d2, const bf16* dout, const bf16* q, const bf16* k,
                                const bf16* v, const float* lse, const float* delta,
                                const AttentionTile* tiles, AttentionSizes n) {
  constexpr int kWalk = kWalkedRows<kDim>;
  constexpr int kStatistics = kOwnsKeys ? kWalk : kOwned;  // queries of a tile
  DYNAMIC_SHARED(bf16, shared);
  bf16 *own_a = shared, *own_b = own_a + kOwned * kDim;
  auto tile_x = [&](int t) { return own_b + (kOwned + t % 2 * 2 * kWalk) * kDim; };
  auto tile_y = [&](int t) { return tile_x(t) + kWalk * kDim; };
  float* statistics = reinterpret_cast<float*>(own_b + (kOwned + 4 * kWalk) * kDim);
  auto tile_lse = [&](int t) { return statistics + t % 2 * 2 * kStatistics; };
  auto tile_delta = [&](int t) { return tile_lse(t) + kStatistics; };

  const int own_heads = kOwnsKeys ? n.kv_heads : n.heads, group = n.heads / n.kv_heads;
  const int walk_heads = kOwnsKeys ? n.heads : n.kv_heads;
  const AttentionTile tile = tiles[blockIdx.x / unsigned(own_heads)];
  const int own_head = int(blockIdx.x % unsigned(own_heads));
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int row = tile.first + warp * 16, length = tile.queries;
  const int begin = kOwnsKeys ? tile.first : 0;  // kWalk divides kOwned
  const int end = kOwnsKeys ? length : min(tile.first + kOwned, length);
  const int head_steps = (end - begin + kWalk - 1) / kWalk;  // at least 1
  const int steps = head_steps * (kOwnsKeys ? group : 1);
  auto walked = [&](int t) { return begin + t % head_steps * kWalk; };  // first row of step t

  auto load = [&](int t) {
    const int head = kOwnsKeys ? own_head * group + t / head_steps : own_head / group;
    load_tile<kDim, kWalk>(tile_x(t), kOwnsKeys ? q : k, tile.q_begin, walked(t), length,
                           walk_heads, head);
    load_tile<kDim, kWalk>(tile_y(t), kOwnsKeys ? dout : v, tile.q_begin, walked(t), length,
                           walk_heads, head);
    ptx::cp_async_commit();
  };
  // lse = infinity makes p = 0 of a query past the end.
  auto load_statistics = [&](int t) {
    const int i = int(threadIdx.x), head = kOwnsKeys ? own_head * group + t / head_steps : own_head;
    const int query = (kOwnsKeys ? walked(t) : tile.first) + i;
    if (i >= kStatistics) return;
    const int64_t at = head * n.tokens + tile.q_begin + query;
    tile_lse(t)[i] = query < length ? lse[at] * kLog2e : INFINITY;
    tile_delta(t)[i] = query < length ? delta[at] : 0.f;
  };
  load_tile<kDim, kOwned>(own_a, kOwnsKeys ? k : q, tile.q_begin, tile.first, length, own_heads,
                          own_head);
  load_tile<kDim, kOwned>(own_b, kOwnsKeys ? v : dout, tile.q_begin, tile.first, length, own_heads,
                          own_head);
  load(0);
  load_statistics(0);

  float sum1[kDim / 8][4] = {}, sum2[kOwnsKeys ? kDim / 8 : 1][4] = {};
  const float scale_log2 = n.scale * kLog2e;
  for (int t = 0; t < steps; ++t) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // step t's tiles are there, and everybody is done with step t - 1's
    if (t + 1 < steps) load(t + 1);
    if (kOwnsKeys && t + 1 < steps) load_statistics(t + 1);
    float p[kWalk / 8][4] = {}, ds[kWalk / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < kDim / 16; ++kk) {
      uint32_t left[4];
      load_left<kDim>(left, own_a, warp * 16, kk);
      add_product_transposed<kDim, kWalk>(p, left, tile_x(t), kk);
      load_left<kDim>(left, own_b, warp * 16, kk);
      add_product_transposed<kDim, kWalk>(ds, left, tile_y(t), kk);
    }
    const float* lse_log2 = tile_lse(kOwnsKeys ? t : 0);
    const float* deltas = tile_delta(kOwnsKeys ? t : 0);
#pragma unroll
    for (int j = 0; j < kWalk / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int own = lane / 4 + e / 2 * 8, other = j * 8 + lane % 4 * 2 + e % 2;
        const int i = kOwnsKeys ? other : warp * 16 + own;  // the query's place in its tile
        const int query = kOwnsKeys ? walked(t) + other : row + own;
        const int key = kOwnsKeys ? row + own : walked(t) + other;
        p[j][e] = key > query ? 0.f : exp2f(p[j][e] * scale_log2 - lse_log2[i]);
        ds[j][e] = p[j][e] * (ds[j][e] - deltas[i]);
      }
    add_product<kDim, kWalk>(sum1, ds, tile_x(t));
    if constexpr (kOwnsKeys) add_product<kDim, kWalk>(sum2, p, tile_y(t));
  }
  const float scale[2] = {n.scale, n.scale}, one[2] = {1, 1};
  store_rows<kDim>(d1, sum1, scale, tile.q_begin, row, length, own_heads, own_head);
  if constexpr (kOwnsKeys)
    store_rows<kDim>(d2, sum2, one, tile.q_begin, row, length, own_heads, own_head);
}

template <int kDim>
void forward(const AttentionForward& f, cudaStream_t stream) {
  const AttentionSizes n = attention_sizes(f.q, f.k, f.scale);
  const Tensor tiles = attention_tiles(f.cu_q, f.cu_k, kOwned, false);
  launch(attention_forward_3_kernel<kDim>, dim3(unsigned(tiles.size(0) * n.heads)), dim3(kThreads),
         kForwardBytes<kDim>, stream, device_data<bf16>(f.out), device_data<float>(f.lse),
         device_data<const bf16>(f.q), device_data<const bf16>(f.k), device_data<const bf16>(f.v),
         device_data<const AttentionTile>(tiles), n);
}

template <int kDim, bool kOwnsKeys>
void backward(const AttentionBackward& b, cudaStream_t stream) {
  const AttentionSizes n = attention_sizes(b.q, b.k, b.scale);
  const Tensor tiles = attention_tiles(b.cu, b.cu, kOwned, kOwnsKeys);
  launch(attention_backward_3_kernel<kDim, kOwnsKeys>,
         dim3(unsigned(tiles.size(0) * (kOwnsKeys ? n.kv_heads : n.heads))), dim3(kThreads),
         backward_bytes<kDim, kOwnsKeys>(), stream, device_data<bf16>(kOwnsKeys ? b.dk : b.dq),
         device_data<bf16>(b.dv), device_data<const bf16>(b.dout), device_data<const bf16>(b.q),
         device_data<const bf16>(b.k), device_data<const bf16>(b.v),
         device_data<const float>(b.lse), device_data<const float>(b.delta),
         device_data<const AttentionTile>(tiles), n);
}

}  // namespace

void attention_forward_3_mma(const AttentionForward& args, cudaStream_t stream) {
  args.q.size(2) == 64 ? forward<64>(args, stream) : forward<128>(args, stream);
}

void attention_backward_3_mma(const AttentionBackward& args, cudaStream_t stream) {
  const bool is_64 = args.q.size(2) == 64;
  is_64 ? backward<64, true>(args, stream) : backward<128, true>(args, stream);
  is_64 ? backward<64, false>(args, stream) : backward<128, false>(args, stream);
}

}  // namespace graft
