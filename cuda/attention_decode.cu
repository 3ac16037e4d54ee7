// Attention of a few queries over many keys: a step of decoding with a KV cache. The rungs of
// attention.cu give a block to some queries, and would leave all but a handful of the GPU idle
// here; so the keys are split as well (Flash-Decoding, Dao et al. 2023): each block takes a slice
// of the keys of one key head, with all the query heads that share it, and a second kernel merges
// the slices in their order. Read before: attention.h, attention.cu.
//
// Nothing is copied to the device for a call: what the kernels must know of the documents travels
// with their arguments.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cuda/attention.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

constexpr int kMaxQueries = 8;  // of a document; with more the rungs have enough blocks
constexpr int kMaxHeadDim = 256;
constexpr int kThreads = 128;
constexpr int kMinSlice = 64, kMaxSlices = 64;  // keys of a slice; slices of a document
constexpr int kDocuments = 32;                  // of one launch

struct DecodeDocument {
  int32_t q_begin, queries;  // rows [q_begin, q_begin + queries) of q
  int32_t k_begin, keys;
  int32_t slice;  // keys of a slice

  __host__ __device__ int slices() const { return (keys + slice - 1) / slice; }
};
struct DecodeDocuments {  // a kernel argument: 640 bytes
  DecodeDocument at[kDocuments];
};

// Slices follow from the number of keys alone, so a document's bytes depend on nothing else.
int32_t slice_of(int32_t keys) {
  const int32_t shortest = (keys + kMaxSlices - 1) / kMaxSlices;
  return std::max(kMinSlice, (shortest + 31) / 32 * 32);
}

// A stream's share of a row: the N neighbours from N l on, then on by N lanes; zeros past its end,
// and where there is no row.
template <int N, int kSlots, class T>
__device__ inline void load_share(float (&out)[N * kSlots], const T* row, bool exists, int lane,
                                  int lanes, int head_dim) {
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int c = (slot * lanes + lane) * N;
    float part[N] = {};
    if (exists && c < head_dim) load_floats<N>(part, row + c);
#pragma unroll
    for (int i = 0; i < N; ++i) out[slot * N + i] = part[i];
  }
}

// The block's streams as one: for every stream and row, shared memory holds sums (D), the largest
// score and the total. Writes partial[row] and statistics[row], rows `row_stride` slices apart;
// streams are added in their order.
template <int kRows>
__device__ inline void merge_streams(float* partial, float* statistics, const float* sums,
                                     float* largest, const float* totals, int streams, int rows,
                                     int64_t row_stride, int head_dim) {
  const int thread = int(threadIdx.x);
  if (thread < rows) {
    float most = -INFINITY, total = 0;
    for (int s = 0; s < streams; ++s) most = fmaxf(most, largest[s * kRows + thread]);
    const float base = most == -INFINITY ? 0.f : most;  // no key seen
    for (int s = 0; s < streams; ++s) {
      const float weight = expf(largest[s * kRows + thread] - base);
      largest[s * kRows + thread] = weight;
      total += totals[s * kRows + thread] * weight;
    }
    statistics[2 * thread * row_stride] = most;
    statistics[2 * thread * row_stride + 1] = total;
  }
  __syncthreads();  // largest has become the streams' weights
  for (int i = thread; i < rows * head_dim; i += kThreads) {
    const int row = i / head_dim, c = i - row * head_dim;
    float sum = 0;
    for (int s = 0; s < streams; ++s)
      sum += sums[(s * kRows + row) * head_dim + c] * largest[s * kRows + row];
    partial[row * row_stride * head_dim + c] = sum;
  }
}

// attention_decode, stage 1: one slice of the keys of one key head.
//   partial = sum over the slice of exp(s - m) v,   statistics = m = max s, sum of exp(s - m),
//   s = scale q k^T where the query sees the key
// Shapes    q (Tq, heads, D); k, v (Tk, kv_heads, D) F32 or BF16, D <= 256; partial (Tq heads,
//           slices, D), statistics (Tq heads, slices, 2) F32: the rows of a document by key head,
//           query, and head of the group.
// Mapping   block = 128 threads = kRows rows (query, head) of one key head. `lanes` of the threads
//           are a stream and hold one row of keys, 16 bytes each; the streams take keys in turn,
//           kBatch at a time so that several loads are under way. blockIdx.x = ((slice * kv_heads +
//           kv_head) * row tiles + row tile), blockIdx.y = document.
// Bytes     2 Tk kv_heads D elements, once for a group of up to 8. Tk=32768, 8 kv_heads, D=128 in
//           BF16: 134 MB; the partial sums, 64 rows of D floats per query head, are 1 MB.
// Roofline  28 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  scores, statistics and sums in F32; online softmax per stream, then over streams.
template <class T, int N, int kSlots, int kRows, int kBatch>
__global__ void __launch_bounds__(kThreads)
    decode_slices(float* partial, float* statistics, const T* q, const T* k, const T* v,
                  DecodeDocuments documents, AttentionSizes n, int slices, int row_tiles,
                  int lanes) {
  const DecodeDocument document = documents.at[blockIdx.y];
  const int tile = int(blockIdx.x) % row_tiles, rest = int(blockIdx.x) / row_tiles;
  const int kv_head = rest % n.kv_heads, slice = rest / n.kv_heads;
  const int group = n.heads / n.kv_heads, D = n.head_dim, streams = kThreads / lanes;
  const int rows = min(kRows, document.queries * group - tile * kRows);
  if (slice >= document.slices() || rows <= 0) return;  // the whole block
  const int lane = int(threadIdx.x) % lanes, stream = int(threadIdx.x) / lanes;
  constexpr int kShare = N * kSlots;
  float query[kRows][kShare], sum[kRows][kShare] = {}, most[kRows], total[kRows];
  int last[kRows];  // the last key that the row sees

  const int first_row = tile * kRows;  // among the document's rows of this key head
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r, query_row = document.q_begin + row / group;
    const int64_t at = int64_t(query_row) * n.heads + kv_head * group + row % group;
    load_share<N, kSlots>(query[r], q + at * D, r < rows, lane, lanes, D);
#pragma unroll
    for (int i = 0; i < kShare; ++i) query[r][i] *= n.scale;
    last[r] = row / group + document.keys - document.queries;
    most[r] = -INFINITY, total[r] = 0;
  }

  const int begin = slice * document.slice, end = min(begin + document.slice, document.keys);
  for (int first = begin; first < end; first += streams * kBatch) {  // the same for every lane
    float keys[kBatch][kShare], values[kBatch][kShare], score[kBatch][kRows];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int key = first + b * streams + stream;
      const int64_t row = (int64_t(document.k_begin + key) * n.kv_heads + kv_head) * D;
      load_share<N, kSlots>(keys[b], k + row, key < end, lane, lanes, D);
      load_share<N, kSlots>(values[b], v + row, key < end, lane, lanes, D);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        score[b][r] = 0;
#pragma unroll
        for (int i = 0; i < kShare; ++i) score[b][r] += query[r][i] * keys[b][i];
      }
    for (int bits = lanes / 2; bits > 0; bits /= 2)
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          score[b][r] += __shfl_xor_sync(kAllLanes, score[b][r], bits);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float higher = most[r];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int key = first + b * streams + stream;
        if (key >= end || key > last[r]) score[b][r] = -INFINITY;
        higher = fmaxf(higher, score[b][r]);
      }
      const float base = higher == -INFINITY ? 0.f : higher;  // no key seen yet
      const float rescale = expf(most[r] - base);
      most[r] = higher;
      total[r] *= rescale;
#pragma unroll
      for (int i = 0; i < kShare; ++i) sum[r][i] *= rescale;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float p = expf(score[b][r] - base);
        total[r] += p;
#pragma unroll
        for (int i = 0; i < kShare; ++i) sum[r][i] += p * values[b][i];
      }
    }
  }

  DYNAMIC_SHARED(float, shared);
  float* largest = shared + streams * kRows * D;  // (streams, kRows), behind the sums
  float* totals = largest + streams * kRows;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int at = stream * kRows + r;
    if (lane == 0) largest[at] = most[r], totals[at] = total[r];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int c = (i / N * lanes + lane) * N + i % N;
      if (c < D) shared[at * D + c] = sum[r][i];
    }
  }
  __syncthreads();  // every stream has left its sums
  const int64_t out_row =
      int64_t(document.q_begin) * n.heads + kv_head * document.queries * group + first_row;
  merge_streams<kRows>(partial + (out_row * slices + slice) * D,
                       statistics + (out_row * slices + slice) * 2, shared, largest, totals,
                       streams, rows, slices, D);
}

// attention_decode, stage 2: the slices of each row, in their order.
//   out = sum over slices of exp(m - M) partial / total,   lse = M + log total,   M = max m
// Shapes    out (Tq, heads, D) F32 or BF16; lse (heads, Tq) F32; the rest as in stage 1.
// Mapping   block = 8 warps = 8 rows (key head, query, head of the group) of a document; lane l
//           owns dimensions l, l+32, ... blockIdx.y = document.
// Bytes     Tq heads slices D floats read, from L2: 1 MB as above.
// Roofline  the latency of 64 loads one after the other, some 20 us; far less HBM. Measured: -
// Numerics  F32; one rounding, at the store. A query that sees no key gives 0 and -inf.
template <class T>
__global__ void __launch_bounds__(256)
    merge_slices(T* out, float* lse, const float* partial, const float* statistics,
                 DecodeDocuments documents, AttentionSizes n, int slices) {
  const DecodeDocument document = documents.at[blockIdx.y];
  const int row = int(blockIdx.x) * 8 + int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (row >= document.queries * n.heads) return;  // whole warps; no barrier below
  const int group = n.heads / n.kv_heads, per_kv_head = document.queries * group;
  const int head = row / per_kv_head * group + row % group;
  const int64_t token = document.q_begin + row % per_kv_head / group;
  const int64_t from = (int64_t(document.q_begin) * n.heads + row) * slices;
  const float* statistic = statistics + 2 * from;

  float most = -INFINITY, total = 0, sum[kMaxHeadDim / 32] = {};
  for (int s = 0; s < document.slices(); ++s) most = fmaxf(most, statistic[2 * s]);
  const float base = most == -INFINITY ? 0.f : most;
  for (int s = 0; s < document.slices(); ++s) {
    const float weight = expf(statistic[2 * s] - base);
    total += statistic[2 * s + 1] * weight;
#pragma unroll
    for (int i = 0; i < kMaxHeadDim / 32; ++i)
      if (lane + 32 * i < n.head_dim)
        sum[i] += weight * partial[(from + s) * n.head_dim + lane + 32 * i];
  }
  if (lane == 0) lse[head * n.tokens + token] = most + (total != 0 ? logf(total) : 0.f);
#pragma unroll
  for (int i = 0; i < kMaxHeadDim / 32; ++i)
    if (lane + 32 * i < n.head_dim)
      out[(token * n.heads + head) * n.head_dim + lane + 32 * i] =
          round_to<T>(total != 0 ? sum[i] / total : 0.f);
}

// f(N, slots, lanes) for rows of head_dim elements of T, read 16 bytes at a time where `wide`.
template <class T, class F>
void dispatch_share(bool wide, int head_dim, F&& f) {
  constexpr int kWide = kVectorWidth<T>;
  const auto lanes_for = [&](int width) {
    int lanes = 1;
    while (lanes < 32 && lanes * width < head_dim) lanes *= 2;
    return lanes;
  };
  using std::integral_constant;
  if (!wide)
    f(integral_constant<int, 1>{}, integral_constant<int, 8>{}, lanes_for(1));
  else if (head_dim <= 32 * kWide)
    f(integral_constant<int, kWide>{}, integral_constant<int, 1>{}, lanes_for(kWide));
  else if constexpr (kWide == 4)  // F32 with more than 128 dimensions
    f(integral_constant<int, 4>{}, integral_constant<int, 2>{}, 32);
}

// One launch of each stage, for at most kDocuments documents.
template <class T>
void decode(const AttentionForward& f, Tensor& partial, Tensor& statistics,
            const DecodeDocuments& documents, int count, cudaStream_t stream) {
  const AttentionSizes n = attention_sizes(f.q, f.k, f.scale);
  const int group = n.heads / n.kv_heads, slices = int(partial.size(1));
  int queries = 0;
  for (int d = 0; d < count; ++d) queries = std::max(queries, documents.at[d].queries);
  const bool wide = vector_rows(kVectorWidth<T>, f.q, f.k, f.v);
  dispatch_share<T>(wide, n.head_dim, [&](auto width, auto slots, int lanes) {
    constexpr int N = decltype(width)::value, kSlots = decltype(slots)::value;
    const auto start = [&](auto kernel, int rows) {
      const int row_tiles = (queries * group + rows - 1) / rows;
      const size_t shared = sizeof(float) * size_t(kThreads / lanes * rows * (n.head_dim + 2));
      launch(kernel, dim3(unsigned(slices * n.kv_heads * row_tiles), unsigned(count)),
             dim3(kThreads), shared, stream, device_data<float>(partial),
             device_data<float>(statistics), device_data<const T>(f.q), device_data<const T>(f.k),
             device_data<const T>(f.v), documents, n, slices, row_tiles, lanes);
    };
    // By the group, not by the number of rows: a query's bytes do not depend on its neighbours.
    if (group <= 4)
      start(decode_slices<T, N, kSlots, 4, 4>, 4);
    else
      start(decode_slices<T, N, kSlots, 8, 2>, 8);
  });
  launch(merge_slices<T>, dim3(ceil_div(queries * n.heads, 8), unsigned(count)), dim3(256), 0,
         stream, device_data<T>(f.out), device_data<float>(f.lse),
         device_data<const float>(partial), device_data<const float>(statistics), documents, n,
         slices);
}

}  // namespace

bool attention_is_decoding(const AttentionForward& f) {
  const int32_t* q = f.cu_q.data<const int32_t>();
  for (int64_t d = 0; d + 1 < f.cu_q.num_elements(); ++d)
    if (q[d + 1] - q[d] > kMaxQueries) return false;
  return f.q.size(2) <= kMaxHeadDim;
}

void attention_decode(const AttentionForward& f, cudaStream_t stream) {
  const int32_t *q = f.cu_q.data<const int32_t>(), *k = f.cu_k.data<const int32_t>();
  const int64_t count = f.cu_q.num_elements() - 1, heads = f.q.size(1);
  if (f.q.size(0) == 0) return;
  std::vector<DecodeDocument> all;
  int slices = 1;
  for (int64_t d = 0; d < count; ++d) {
    const int32_t keys = k[d + 1] - k[d];
    all.push_back({q[d], q[d + 1] - q[d], k[d], keys, slice_of(keys)});
    slices = std::max(slices, all.back().slices());
  }
  const int64_t rows = f.q.size(0) * heads;
  Tensor partial =
      Tensor::empty({rows, slices, f.q.size(2)}, DType::F32, Device::CUDA, Scope::Scratch);
  Tensor statistics = Tensor::empty({rows, slices, 2}, DType::F32, Device::CUDA, Scope::Scratch);
  for (int64_t first = 0; first < count; first += kDocuments) {
    DecodeDocuments some{};
    const int n = int(std::min<int64_t>(kDocuments, count - first));
    std::copy_n(all.begin() + first, n, some.at);
    dispatch_activation("attention", f.q.dtype(),
                        [&]<class T>(T) { decode<T>(f, partial, statistics, some, n, stream); });
  }
}

}  // namespace graft
