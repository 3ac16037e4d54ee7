// Causal attention within packed documents: which rung runs, the list of tiles, and rungs 1 and 2.
// Both directions have no atomics: every output element is summed by one thread or one warp in a
// fixed order. Read before: attention.h, tensor/cpu/reference/attention.cpp (the meaning).
//
// Forward (online softmax, Milakov & Gimelshein 2018): a row keeps the largest score so far, m, the
// sum of exp(score - m) and the weighted sum of values; a larger score rescales both.
// Backward (FlashAttention-2, Dao 2023): the scores are computed again, p = exp(s - lse), and
//   ds = p * (dout v^T - delta),   dq = scale * ds k,   dk = scale * ds^T q,   dv = p^T dout
// The kernel for dq and that for dk and dv are one template: a block *owns* rows (a, b), in
// registers or shared memory, and *walks* over rows (x, y) of the other side, with s = scale * a.x
// and dp = b.y in both. Owned queries: (q, dout) and (k, v). Owned keys: (k, v) and (q, dout).
#include "cuda/attention.h"

#include <cmath>

#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int kLaneDims = kMaxHeadDim / 32;  // elements of a row that a lane of rung 1 holds

// --- rung 1 --------------------------------------------------------------------------------------

constexpr int kWarps1 = 8;  // rows of a tile, one warp each

template <class T>
__device__ inline void load_row(float (&row)[kLaneDims], const T* x, int head_dim) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i)
    row[i] = lane + 32 * i < head_dim ? as_float(x[lane + 32 * i]) : 0.f;
}
template <class T>
__device__ inline void store_row(T* x, const float (&row)[kLaneDims], float factor, int head_dim) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i)
    if (lane + 32 * i < head_dim) x[lane + 32 * i] = round_to<T>(row[i] * factor);
}
__device__ inline float dot_rows(const float (&a)[kLaneDims], const float (&b)[kLaneDims]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) sum += a[i] * b[i];
  return warp_sum(sum);
}

// attention_forward, variant 1: one warp per query row.
//   out = softmax(scale q k^T + causal mask) v,   lse = log sum exp
// Shapes    out, q (Tq, heads, D); k, v (Tk, kv_heads, D) F32 or BF16, D <= 256; lse (heads, Tq).
// Mapping   block = 8 warps = 8 query rows of one head; lane l owns dimensions l, l+32, ...
// Bytes     every query reads all of its keys and values: l^2/2 * 2D elements per head, from L2.
// Roofline  far from it: 5 shuffles per key. Measured: -
// Numerics  scores, statistics and sums in F32; one rounding, at the store.
template <class T>
__global__ void __launch_bounds__(kWarps1 * 32)
    attention_forward_1_naive(T* out, float* lse, const T* q, const T* k, const T* v,
                              const AttentionTile* tiles, AttentionSizes n) {
  const AttentionTile tile = tiles[blockIdx.x / unsigned(n.heads)];
  const int head = int(blockIdx.x % unsigned(n.heads)), kv_head = head / (n.heads / n.kv_heads);
  const int row = tile.first + int(threadIdx.x) / 32, D = n.head_dim;
  if (row >= tile.queries) return;  // whole warps leave; the block has no barrier
  const int64_t token = tile.q_begin + row;
  float query[kLaneDims], other[kLaneDims], sum[kLaneDims] = {};
  load_row(query, q + (token * n.heads + head) * D, D);

  float most = -INFINITY, total = 0;
  const int seen = row + tile.keys - tile.queries + 1;
  for (int j = 0; j < seen; ++j) {
    const int64_t key = (int64_t(tile.k_begin + j) * n.kv_heads + kv_head) * D;
    load_row(other, k + key, D);
    const float score = n.scale * dot_rows(query, other);
    const float higher = fmaxf(most, score);
    const float rescale = expf(most - higher), p = expf(score - higher);
    most = higher;
    total = total * rescale + p;
    load_row(other, v + key, D);
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) sum[i] = sum[i] * rescale + p * other[i];
  }
  store_row(out + (token * n.heads + head) * D, sum, total != 0 ? 1 / total : 0.f, D);
  if (threadIdx.x % 32 == 0) lse[head * n.tokens + token] = most + (total != 0 ? logf(total) : 0.f);
}

// attention_backward, variant 1: one warp per row of dq, or per row of dk and dv.
//   the equations at the top of this file; d1 is dq or dk, d2 is dv (owned keys only)
// Shapes    as the forward; lse, delta (heads, T).
// Mapping   block = 8 warps = 8 owned rows of one head (of q, or of k); lane l owns l, l+32, ...
// Bytes     every owned row reads all rows of the other side that it meets, mostly from L2.
// Roofline  far from it: 10 shuffles per pair. Measured: -
// Numerics  all sums in F32, over heads of the group and then rows in ascending order.
template <class T, bool kOwnsKeys>
__global__ void __launch_bounds__(kWarps1 * 32)
    attention_backward_1_naive(T* d1, T* d2, const T* dout, const T* q, const T* k, const T* v,
                               const float* lse, const float* delta, const AttentionTile* tiles,
                               AttentionSizes n) {
  const int own_heads = kOwnsKeys ? n.kv_heads : n.heads, group = n.heads / n.kv_heads;
  const AttentionTile tile = tiles[blockIdx.x / unsigned(own_heads)];
  const int own_head = int(blockIdx.x % unsigned(own_heads));
  const int row = tile.first + int(threadIdx.x) / 32, D = n.head_dim;
  if (row >= tile.queries) return;  // whole warps leave; self-attention: queries is keys
  const int64_t own = (int64_t(tile.q_begin + row) * own_heads + own_head) * D;
  float a[kLaneDims], b[kLaneDims], x[kLaneDims], y[kLaneDims];
  float sum1[kLaneDims] = {}, sum2[kLaneDims] = {};
  load_row(a, (kOwnsKeys ? k : q) + own, D);
  load_row(b, (kOwnsKeys ? v : dout) + own, D);

  const int begin = kOwnsKeys ? row : 0, end = kOwnsKeys ? tile.queries : row + 1;
  for (int g = 0; g < (kOwnsKeys ? group : 1); ++g) {
    const int head = kOwnsKeys ? own_head * group + g : own_head;  // of the queries
    for (int i = begin; i < end; ++i) {
      const int64_t token = tile.q_begin + i;
      const int64_t other =
          kOwnsKeys ? token * n.heads + head : token * n.kv_heads + own_head / group;
      load_row(x, (kOwnsKeys ? q : k) + other * D, D);
      load_row(y, (kOwnsKeys ? dout : v) + other * D, D);
      const int64_t statistic = head * n.tokens + tile.q_begin + (kOwnsKeys ? i : row);
      const float p = expf(n.scale * dot_rows(a, x) - lse[statistic]);
      const float ds = p * (dot_rows(b, y) - delta[statistic]);
#pragma unroll
      for (int c = 0; c < kLaneDims; ++c) {
        sum1[c] += ds * x[c];
        if (kOwnsKeys) sum2[c] += p * y[c];
      }
    }
  }
  store_row(d1 + own, sum1, n.scale, D);
  if (kOwnsKeys) store_row(d2 + own, sum2, 1.f, D);
}

// attention_delta.
//   delta[h,t] = sum_c dout[t,h,c] out[t,h,c]
// Shapes    dout, out (T, heads, D) F32 or BF16, dense; delta (heads, T) F32.
// Mapping   a warp owns a token's head; lane i multiplies columns i, i + 32, ...
// Bytes     2 T heads D elements read. T=16384, 32 heads of 128, BF16: 268 MB.
// Roofline  56 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32.
template <class T>
__global__ void __launch_bounds__(256)
    attention_delta_kernel(float* delta, const T* dout, const T* out, int64_t tokens, int heads,
                           int head_dim) {
  const int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;  // token * heads + head
  if (row >= tokens * heads) return;
  float a[kLaneDims], b[kLaneDims];
  load_row(a, dout + row * head_dim, head_dim);
  load_row(b, out + row * head_dim, head_dim);
  const float sum = dot_rows(a, b);
  if (threadIdx.x % 32 == 0) delta[row % heads * tokens + row / heads] = sum;
}

// --- rung 2 --------------------------------------------------------------------------------------

constexpr int kWarps2 = 4;
constexpr int kWalk = 32;  // rows of a walked tile: one per lane while scores are computed

// kRows rows of one head to tile[r * row_pitch + c * column_pitch], zeros past the end. A block's
// own rows are transposed (1, kRows), so that a warp reads its rows of one dimension as a broadcast
// vector; walked rows have an odd pitch: no bank conflicts by rows (scores) nor columns (sums).
template <int kRows, class T>
__device__ inline void load_tile(float* tile, int row_pitch, int column_pitch, const T* x,
                                 int64_t begin, int valid, int heads, int head, int head_dim) {
  for (int i = int(threadIdx.x); i < kRows * head_dim; i += kWarps2 * 32) {
    const int r = i / head_dim, c = i % head_dim;
    tile[r * row_pitch + c * column_pitch] =
        r < valid ? as_float(x[((begin + r) * heads + head) * head_dim + c]) : 0.f;
  }
}

// sum[r][i] += sum over j of weight[j][r] * tile[j][lane + 32 i].
template <int kRows, int kSlots>
__device__ inline void add_weighted(float (&sum)[kRows][kSlots], const float* weight,
                                    const float* tile, int head_dim, int pitch) {
  const int lane = int(threadIdx.x) % 32;
  for (int j = 0; j < kWalk; ++j) {
    const auto w = *reinterpret_cast<const Vector<float, 4>*>(weight + j * kRows);
    const auto w2 = *reinterpret_cast<const Vector<float, 4>*>(weight + j * kRows + kRows - 4);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const float value = lane + 32 * i < head_dim ? tile[j * pitch + lane + 32 * i] : 0.f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r][i] += (r < 4 ? w.v[r] : w2.v[r - kRows + 4]) * value;
    }
  }
}

// s[r] = owned row r . walked row `lane`.
template <int kRows>
__device__ inline void dot_products(float (&s)[kRows], const float* owned, const float* tile,
                                    int head_dim, int pitch) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) s[r] = 0;
  for (int c = 0; c < head_dim; ++c) {
    const float value = tile[lane * pitch + c];
    const float* a = owned + (c * kWarps2 + warp) * kRows;
#pragma unroll
    for (int half = 0; half < kRows; half += 4) {
      const auto w = *reinterpret_cast<const Vector<float, 4>*>(a + half);
#pragma unroll
      for (int r = 0; r < 4; ++r) s[half + r] += w.v[r] * value;
    }
  }
}

template <int kRows>
__device__ inline void store_weights(float* weight, const float (&p)[kRows]) {
#pragma unroll
  for (int half = 0; half < kRows; half += 4) {
    Vector<float, 4> w;
#pragma unroll
    for (int r = 0; r < 4; ++r) w.v[r] = p[half + r];
    *reinterpret_cast<Vector<float, 4>*>(weight + threadIdx.x % 32 * kRows + half) = w;
  }
}

// attention_forward, variant 2: tiles of keys in shared memory.                 (1: warp per row)
//   out = softmax(scale q k^T + causal mask) v,   lse = log sum exp
// Shapes    as variant 1.
// Mapping   block = 4 warps x kRows query rows of one head, walking over tiles of 32 keys. For
//           scores lane l owns key l of the tile; for sums, dimensions l, l+32, ...
// Bytes     l^2/2 * 2D elements per head and per 4 kRows queries: 1/32 of variant 1 (kRows 8).
// Roofline  F32 cores: 3 shared reads per 8 multiply-adds. Measured: -
// Numerics  scores, statistics and sums in F32; one rounding, at the store.
template <class T, int kSlots, int kRows>
__global__ void __launch_bounds__(kWarps2 * 32)
    attention_forward_2_tiled(T* out, float* lse, const T* q, const T* k, const T* v,
                              const AttentionTile* tiles, AttentionSizes n) {
  constexpr int kOwned = kWarps2 * kRows;
  const AttentionTile tile = tiles[blockIdx.x / unsigned(n.heads)];
  const int head = int(blockIdx.x % unsigned(n.heads)), kv_head = head / (n.heads / n.kv_heads);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int D = n.head_dim, pitch = D | 1, shift = tile.keys - tile.queries;
  DYNAMIC_SHARED(float, shared);
  float* owned = shared;                                      // (D, kOwned)
  float* weight = owned + D * kOwned + warp * kWalk * kRows;  // (kWalk, kRows) of this warp
  float* tile_k = owned + D * kOwned + kOwned * kWalk;        // (kWalk, pitch)
  float* tile_v = tile_k + kWalk * pitch;

  load_tile<kOwned>(owned, 1, kOwned, q, int64_t(tile.q_begin) + tile.first,
                    tile.queries - tile.first, n.heads, head, D);
  float sum[kRows][kSlots] = {}, most[kRows], total[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) most[r] = -INFINITY, total[r] = 0;
  const int first_row = tile.first + warp * kRows;
  const int seen = min(tile.first + kOwned, tile.queries) + shift;

  for (int j0 = 0; j0 < seen; j0 += kWalk) {
    __syncthreads();  // nobody reads the previous tile any more
    const int64_t begin = int64_t(tile.k_begin) + j0;
    load_tile<kWalk>(tile_k, pitch, 1, k, begin, tile.keys - j0, n.kv_heads, kv_head, D);
    load_tile<kWalk>(tile_v, pitch, 1, v, begin, tile.keys - j0, n.kv_heads, kv_head, D);
    __syncthreads();  // the tile, and at first the queries, are there
    float s[kRows];
    dot_products<kRows>(s, owned, tile_k, D, pitch);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      s[r] = j0 + lane > first_row + r + shift ? -INFINITY : s[r] * n.scale;
      const float higher = fmaxf(most[r], warp_max(s[r]));
      const float base = higher == -INFINITY ? 0.f : higher;  // no key seen yet
      const float rescale = expf(most[r] - base);
      s[r] = expf(s[r] - base);
      most[r] = higher;
      total[r] = total[r] * rescale + s[r];  // this lane's keys only
#pragma unroll
      for (int i = 0; i < kSlots; ++i) sum[r][i] *= rescale;
    }
    store_weights<kRows>(weight, s);
    __syncwarp();  // every lane's weights are written, and read below by all lanes
    add_weighted<kRows, kSlots>(sum, weight, tile_v, D, pitch);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float all = warp_sum(total[r]);  // every lane takes part, also for rows past the end
    if (first_row + r >= tile.queries) continue;
    const int64_t token = int64_t(tile.q_begin) + first_row + r;
    if (lane == 0) lse[head * n.tokens + token] = most[r] + (all != 0 ? logf(all) : 0.f);
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (lane + 32 * i < D)
        out[(token * n.heads + head) * D + lane + 32 * i] =
            round_to<T>(all != 0 ? sum[r][i] / all : 0.f);
  }
}

// attention_backward, variant 2: tiles of the walked side in shared memory.     (1: warp per row)
//   the equations at the top of this file; d1 is dq or dk, d2 is dv (owned keys only)
// Shapes    as variant 1.
// Mapping   block = 4 warps x kRows owned rows of one head (of q, or of k), walking over tiles of
//           32 rows; with owned keys, over the query heads of the group in turn.
// Bytes     as the forward, with x and y read for dq and once more for dk, dv.
// Roofline  F32 cores. Measured: -
// Numerics  all sums in F32, over heads of the group and then rows in ascending order.
template <class T, int kSlots, int kRows, bool kOwnsKeys>
__global__ void __launch_bounds__(kWarps2 * 32)
    attention_backward_2_tiled(T* d1, T* d2, const T* dout, const T* q, const T* k, const T* v,
                               const float* lse, const float* delta, const AttentionTile* tiles,
                               AttentionSizes n) {
  constexpr int kOwned = kWarps2 * kRows;
  const int own_heads = kOwnsKeys ? n.kv_heads : n.heads, group = n.heads / n.kv_heads;
  const int walk_heads = kOwnsKeys ? n.heads : n.kv_heads;
  const AttentionTile tile = tiles[blockIdx.x / unsigned(own_heads)];
  const int own_head = int(blockIdx.x % unsigned(own_heads));
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int D = n.head_dim, pitch = D | 1, length = tile.queries;
  DYNAMIC_SHARED(float, shared);
  float* own_a = shared;              // (D, kOwned)
  float* own_b = own_a + D * kOwned;  // (D, kOwned)
  float* weight_ds = own_b + D * kOwned + warp * kWalk * kRows;
  float* weight_p = weight_ds + kOwned * kWalk;
  float* tile_x = own_b + D * kOwned + 2 * kOwned * kWalk;  // (kWalk, pitch)
  float* tile_y = tile_x + kWalk * pitch;

  const int64_t own = int64_t(tile.q_begin) + tile.first;
  const int first_row = tile.first + warp * kRows;
  load_tile<kOwned>(own_a, 1, kOwned, kOwnsKeys ? k : q, own, length - tile.first, own_heads,
                    own_head, D);
  load_tile<kOwned>(own_b, 1, kOwned, kOwnsKeys ? v : dout, own, length - tile.first, own_heads,
                    own_head, D);
  float sum1[kRows][kSlots] = {}, sum2[kOwnsKeys ? kRows : 1][kSlots] = {};
  const int begin = kOwnsKeys ? tile.first / kWalk * kWalk : 0;
  const int end = kOwnsKeys ? length : min(tile.first + kOwned, length);

  for (int g = 0; g < (kOwnsKeys ? group : 1); ++g) {
    const int head = kOwnsKeys ? own_head * group + g : own_head;  // of the queries
    const int walk_head = kOwnsKeys ? head : own_head / group;
    const float* lse_row = lse + head * n.tokens + tile.q_begin;
    const float* delta_row = delta + head * n.tokens + tile.q_begin;
    for (int j0 = begin; j0 < end; j0 += kWalk) {
      __syncthreads();  // nobody reads the previous tile any more
      const int64_t walked = int64_t(tile.q_begin) + j0;
      load_tile<kWalk>(tile_x, pitch, 1, kOwnsKeys ? q : k, walked, length - j0, walk_heads,
                       walk_head, D);
      load_tile<kWalk>(tile_y, pitch, 1, kOwnsKeys ? dout : v, walked, length - j0, walk_heads,
                       walk_head, D);
      __syncthreads();  // the tile, and at first the owned rows, are there
      float p[kRows], ds[kRows];
      dot_products<kRows>(p, own_a, tile_x, D, pitch);
      dot_products<kRows>(ds, own_b, tile_y, D, pitch);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int query = kOwnsKeys ? j0 + lane : first_row + r;
        const int key = kOwnsKeys ? first_row + r : j0 + lane;
        const bool seen = key <= query && query < length;
        p[r] = seen ? expf(n.scale * p[r] - lse_row[query]) : 0.f;
        ds[r] = seen ? p[r] * (ds[r] - delta_row[query]) : 0.f;
      }
      store_weights<kRows>(weight_ds, ds);
      if (kOwnsKeys) store_weights<kRows>(weight_p, p);
      __syncwarp();  // every lane's weights are written, and read below by all lanes
      add_weighted<kRows, kSlots>(sum1, weight_ds, tile_x, D, pitch);
      if constexpr (kOwnsKeys) add_weighted<kRows, kSlots>(sum2, weight_p, tile_y, D, pitch);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (first_row + r >= length || lane + 32 * i >= D) continue;
      const int64_t at = ((own + warp * kRows + r) * own_heads + own_head) * D + lane + 32 * i;
      d1[at] = round_to<T>(sum1[r][i] * n.scale);
      if constexpr (kOwnsKeys) d2[at] = round_to<T>(sum2[r][i]);
    }
}

// --- host ----------------------------------------------------------------------------------------

// Calls f with the template arguments of rung 2 for a head_dim: f(slots, rows).
template <class F>
void dispatch_slots(int head_dim, F&& f) {
  using std::integral_constant;
  if (head_dim <= 32) return f(integral_constant<int, 1>{}, integral_constant<int, 8>{});
  if (head_dim <= 64) return f(integral_constant<int, 2>{}, integral_constant<int, 8>{});
  if (head_dim <= 128) return f(integral_constant<int, 4>{}, integral_constant<int, 8>{});
  return f(integral_constant<int, 8>{}, integral_constant<int, 4>{});
}

// Either half of the backward: dk and dv, or dq.
template <class T, bool kOwnsKeys>
void backward(int rung, const AttentionBackward& b, cudaStream_t stream) {
  const AttentionSizes n = attention_sizes(b.q, b.k, b.scale);
  auto start = [&](auto kernel, int rows, int warps, size_t shared) {
    const Tensor tiles = attention_tiles(b.cu, b.cu, rows, kOwnsKeys);
    const int64_t blocks = tiles.size(0) * (kOwnsKeys ? n.kv_heads : n.heads);
    launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(warps * 32)), shared, stream,
           device_data<T>(kOwnsKeys ? b.dk : b.dq), device_data<T>(b.dv),
           device_data<const T>(b.dout), device_data<const T>(b.q), device_data<const T>(b.k),
           device_data<const T>(b.v), device_data<const float>(b.lse),
           device_data<const float>(b.delta), device_data<const AttentionTile>(tiles), n);
  };
  if (rung == 1) return start(attention_backward_1_naive<T, kOwnsKeys>, kWarps1, kWarps1, 0);
  dispatch_slots(n.head_dim, [&](auto slots, auto rows) {
    constexpr int kSlots = decltype(slots)::value, kRows = decltype(rows)::value;
    constexpr int kOwned = kWarps2 * kRows;
    start(
        attention_backward_2_tiled<T, kSlots, kRows, kOwnsKeys>, kOwned, kWarps2,
        sizeof(float) * size_t(2 * n.head_dim * (kOwned + kWalk) + 2 * kOwned * kWalk + 2 * kWalk));
  });
}

void check_supported(int rung, const Tensor& q) {
  CHECK(attention_rung_supports(rung, q), "attention: head_dim is ", q.size(2), " in ",
        dtype_name(q.dtype()), ", ",
        rung == 3 ? "rung 3 has 64 and 128 in BF16" : concat("at most ", kMaxHeadDim));
}

}  // namespace

void attention_delta(Tensor& delta, const Tensor& dout, const Tensor& out, cudaStream_t stream) {
  const int64_t tokens = out.size(0), heads = out.size(1);
  dispatch_activation("attention", out.dtype(), [&]<class T>(T) {
    launch(attention_delta_kernel<T>, dim3(ceil_div(tokens * heads, 8)), dim3(256), 0, stream,
           device_data<float>(delta), device_data<const T>(dout), device_data<const T>(out), tokens,
           int(heads), int(out.size(2)));
  });
}

bool attention_rung_supports(int rung, const Tensor& q) {
  if (rung == 3) return q.dtype() == DType::BF16 && (q.size(2) == 64 || q.size(2) == 128);
  return q.size(2) <= kMaxHeadDim;
}

int attention_rung(const Tensor& q) { return attention_rung_supports(3, q) ? 3 : 2; }

void attention_forward_rung(int rung, const AttentionForward& f, cudaStream_t stream) {
  check_supported(rung, f.q);
  if (rung == 3) return attention_forward_3_mma(f, stream);
  const AttentionSizes n = attention_sizes(f.q, f.k, f.scale);
  dispatch_activation("attention", f.q.dtype(), [&]<class T>(T) {
    auto start = [&](auto kernel, int rows, int warps, size_t shared) {
      const Tensor tiles = attention_tiles(f.cu_q, f.cu_k, rows, false);
      launch(kernel, dim3(unsigned(tiles.size(0) * n.heads)), dim3(unsigned(warps * 32)), shared,
             stream, device_data<T>(f.out), device_data<float>(f.lse), device_data<const T>(f.q),
             device_data<const T>(f.k), device_data<const T>(f.v),
             device_data<const AttentionTile>(tiles), n);
    };
    if (rung == 1) return start(attention_forward_1_naive<T>, kWarps1, kWarps1, 0);
    dispatch_slots(n.head_dim, [&](auto slots, auto rows) {
      constexpr int kSlots = decltype(slots)::value, kRows = decltype(rows)::value;
      constexpr int kOwned = kWarps2 * kRows;
      start(attention_forward_2_tiled<T, kSlots, kRows>, kOwned, kWarps2,
            sizeof(float) * size_t(n.head_dim * (kOwned + 2 * kWalk) + kOwned * kWalk + 2 * kWalk));
    });
  });
}

void attention_backward_rung(int rung, const AttentionBackward& b, cudaStream_t stream) {
  check_supported(rung, b.q);
  if (rung == 3) return attention_backward_3_mma(b, stream);
  dispatch_activation("attention", b.q.dtype(), [&]<class T>(T) {
    backward<T, true>(rung, b, stream);
    backward<T, false>(rung, b, stream);
  });
}

void CudaBackend::attention_forward(Tensor& out, Tensor& lse, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                                    double scale) {
  const AttentionForward args{out, lse, q, k, v, cu_q, cu_k, scale};
  if (attention_is_decoding(args)) return attention_decode(args, stream_);
  attention_forward_rung(attention_rung(q), args, stream_);
}

void CudaBackend::attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& dout,
                                     const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
                                     double scale) {
  Tensor delta = Tensor::empty(lse.shape(), DType::F32, Device::CUDA, Scope::Scratch);
  attention_delta(delta, dout, out, stream_);
  attention_backward_rung(attention_rung(q),
                          {dq, dk, dv, dout, q, k, v, lse, delta, cu_seqlens, scale}, stream_);
}

}  // namespace graft
