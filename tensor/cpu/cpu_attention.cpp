// How attention is cut into pieces. Keys and values are packed once per call: in F32, transposed
// into panels and as rows, by document and key head. Then
//   forward   a piece is a tile of queries of one head;
//   backward  a piece is a head of a document, all tiles of queries in order: dQ is finished tile
//   by
//             tile, dK and dV of the query head gather in scratch, and are summed over the heads of
//             a group, in order, afterwards;
//   decoding  (few queries in every document) a piece is a query, a key head and a chunk of keys.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tensor/cpu/cpu_backend.h"
#include "tensor/cpu/kernels/table.h"
#include "tensor/thread_pool.h"

namespace graft {

namespace {

constexpr int64_t kDecodeQueries = 4;    // documents with no more are decoded
constexpr int64_t kBackwardPieces = 16;  // heads of documents are cut into segments up to so many

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Document {
  int64_t q_begin, queries, k_begin, keys;
  int64_t packed_begin;  // first key in the packed buffers, where documents begin on a panel
  int64_t first_piece;   // of tiles of queries, of one head
};

struct Batch {
  std::vector<Document> documents;
  int64_t packed_keys = 0, query_tiles = 0, most_queries = 0, most_keys = 0;

  Batch(const Tensor& cu_q, const Tensor& cu_k, int64_t panel) {
    const int32_t *q = cu_q.data<int32_t>(), *k = cu_k.data<int32_t>();
    for (int64_t d = 0; d + 1 < cu_q.num_elements(); ++d) {
      const Document document{q[d],        q[d + 1] - q[d], k[d], k[d + 1] - k[d],
                              packed_keys, query_tiles};
      documents.push_back(document);
      packed_keys += round_up(document.keys, panel);
      query_tiles += round_up(document.queries, kAttentionTile) / kAttentionTile;
      most_queries = std::max(most_queries, document.queries);
      most_keys = std::max(most_keys, document.keys);
    }
  }
  const Document& of_tile(int64_t tile) const {
    const auto after =
        std::upper_bound(documents.begin(), documents.end(), tile,
                         [](int64_t t, const Document& d) { return t < d.first_piece; });
    return *(after - 1);
  }
};

char* head_at(const Tensor& t, int64_t token, int64_t head) {
  const int64_t row = token * t.size(1) + head;
  return static_cast<char*>(t.raw()) + row * t.row_stride() * dtype_size(t.dtype());
}
int64_t token_stride(const Tensor& t) { return t.size(1) * t.row_stride(); }

Tensor scratch(int64_t rows, int64_t cols) {
  return Tensor::empty({rows, cols}, DType::F32, Device::CPU, Scope::Scratch);
}

// Packs x (Tk, kv_heads, D) into panels and rows, either of which may be undefined.
void pack(const CpuKernels& kernels, Tensor& panels, Tensor& rows, const Tensor& x,
          const Batch& batch) {
  constexpr int64_t kKeys = 384;  // of one piece: a multiple of every panel
  const int64_t kv_heads = x.size(1), head_dim = x.size(2), padded = kernels.padded_dim(head_dim);
  const int64_t chunks = round_up(batch.most_keys, kKeys) / kKeys;
  const int64_t documents = int64_t(batch.documents.size());
  thread_pool().run(documents * kv_heads * chunks, [&](int64_t piece, int) {
    const int64_t begin = piece % chunks * kKeys, head = piece / chunks % kv_heads;
    const Document& d = batch.documents[size_t(piece / chunks / kv_heads)];
    if (begin >= d.keys) return;
    const int64_t at = head * batch.packed_keys + d.packed_begin + begin;
    kernels.attention_pack(panels.defined() ? panels.data<float>() + at * head_dim : nullptr,
                           rows.defined() ? rows.data<float>() + at * padded : nullptr,
                           head_at(x, d.k_begin + begin, head), token_stride(x), x.dtype(),
                           std::min(kKeys, d.keys - begin), head_dim);
  });
}

// How many segments of queries the backward cuts a head of a document into: by the shapes alone.
int64_t backward_segments(int64_t documents, int64_t heads, int64_t most_queries) {
  const int64_t tiles = round_up(most_queries, kAttentionTile) / kAttentionTile;
  return std::max<int64_t>(
      1, std::min(tiles, kBackwardPieces / std::max<int64_t>(1, documents * heads)));
}

// First tile of a segment. Work grows with the square of the queries, so the borders lie at roots.
int64_t segment_begin(int64_t tiles, int64_t segment, int64_t segments) {
  return std::llround(double(tiles) * std::sqrt(double(segment) / double(segments)));
}

// dx (Tk, kv_heads, D) = the sum over segments and over the heads of a group, in this order, of
// parts (segments * heads * Tk, padded), whose first part serves as the accumulator.
void sum_heads(const CpuKernels& kernels, Tensor& dx, const Tensor& parts, int64_t segments,
               int64_t heads) {
  constexpr int64_t kTokens = 32;
  const int64_t tokens = dx.size(0), kv_heads = dx.size(1), head_dim = dx.size(2);
  const int64_t group = heads / kv_heads, padded = parts.cols();
  thread_pool().run(kv_heads * round_up(tokens, kTokens) / kTokens, [&](int64_t piece, int) {
    const int64_t kv_head = piece % kv_heads, begin = piece / kv_heads * kTokens;
    for (int64_t t = begin; t < std::min(tokens, begin + kTokens); ++t) {
      float* sum = parts.data<float>() + (kv_head * group * tokens + t) * padded;
      for (int64_t s = 0; s < segments; ++s)
        for (int64_t g = s == 0 ? 1 : 0; g < group; ++g)
          kernels.axpy(sum, DType::F32, sum + (s * heads + g) * tokens * padded, DType::F32, 1.0f,
                       head_dim);
      kernels.copy(head_at(dx, t, kv_head), dx.dtype(), sum, DType::F32, head_dim);
    }
  });
}

void check_inputs(const char* op, const Tensor& q, const Tensor& k) {
  CHECK(q.dtype() == DType::F32 || q.dtype() == DType::BF16, op,
        ": the CPU kernel takes F32 or BF16, got ", dtype_name(q.dtype()));
  CHECK(q.size(2) <= kMaxHeadDim, op, ": head_dim is ", q.size(2), ", at most ", kMaxHeadDim,
        " is supported");
  CHECK(q.size(1) % k.size(1) == 0, op, ": ", q.size(1), " heads do not divide by ", k.size(1),
        " key heads");
}

void decode(const CpuKernels& kernels, Tensor& out, Tensor& lse, const Tensor& q, const Tensor& k,
            const Tensor& v, const Batch& batch, double scale) {
  const int64_t heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2);
  const int64_t group = heads / kv_heads, tokens = q.size(0);
  const int64_t chunks =
      std::max<int64_t>(1, round_up(batch.most_keys, kDecodeChunk) / kDecodeChunk);
  const int64_t stride = kernels.padded_dim(head_dim) + 2;
  // (tokens, kv_heads, chunks, group, stride)
  Tensor partial = scratch(tokens * kv_heads * chunks * group, stride);
  const auto visible = [&](const Document& d, int64_t query) {
    return std::max<int64_t>(0, d.keys - d.queries + (query - d.q_begin) + 1);
  };
  for (const Document& d : batch.documents)
    thread_pool().run(d.queries * kv_heads * chunks, [&](int64_t piece, int) {
      const int64_t chunk = piece % chunks, kv_head = piece / chunks % kv_heads;
      const int64_t query = d.q_begin + piece / chunks / kv_heads, begin = chunk * kDecodeChunk;
      const int64_t end = std::min(visible(d, query), begin + kDecodeChunk);
      if (begin >= end) return;
      const int64_t slot = ((query * kv_heads + kv_head) * chunks + chunk) * group;
      kernels.attention_decode(
          {partial.data<float>() + slot * stride, head_at(q, query, kv_head * group),
           head_at(k, d.k_begin + begin, kv_head), head_at(v, d.k_begin + begin, kv_head),
           q.row_stride(), token_stride(k), token_stride(v), group, end - begin, head_dim,
           q.dtype(), float(scale)});
    });
  for (const Document& d : batch.documents)
    for (int64_t query = d.q_begin; query < d.q_begin + d.queries; ++query)
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t slot = (query * kv_heads + head / group) * chunks * group + head % group;
        const int64_t used = round_up(visible(d, query), kDecodeChunk) / kDecodeChunk;
        kernels.attention_combine(
            head_at(out, query, head), lse.data<float>() + head * tokens + query,
            partial.data<float>() + slot * stride, used, group * stride, head_dim, q.dtype());
      }
}

}  // namespace

void CpuBackend::attention_forward(Tensor& out, Tensor& lse, const Tensor& q, const Tensor& k,
                                   const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                                   double scale) {
  check_inputs("attention", q, k);
  const Batch batch(cu_q, cu_k, kernels_.panel());
  if (batch.most_queries <= kDecodeQueries) {
    decode(kernels_, out, lse, q, k, v, batch, scale);
    return;
  }
  const int64_t heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2), tokens = q.size(0);
  const int64_t padded = kernels_.padded_dim(head_dim);
  Tensor none, k_panels = scratch(kv_heads * batch.packed_keys, head_dim);
  Tensor v_rows = scratch(kv_heads * batch.packed_keys, padded);
  pack(kernels_, k_panels, none, k, batch);
  pack(kernels_, none, v_rows, v, batch);
  // The last tiles see most keys: they go first, so that no thread is left with a long one at the
  // end.
  thread_pool().run(batch.query_tiles * heads, [&](int64_t piece, int) {
    const int64_t tile_number = batch.query_tiles - 1 - piece / heads, head = piece % heads;
    const Document& d = batch.of_tile(tile_number);
    const int64_t begin = (tile_number - d.first_piece) * kAttentionTile;
    const int64_t at = head / (heads / kv_heads) * batch.packed_keys + d.packed_begin;
    AttentionTile tile{};
    tile.q = head_at(q, d.q_begin + begin, head);
    tile.out = head_at(out, d.q_begin + begin, head);
    tile.q_stride = token_stride(q);
    tile.out_stride = token_stride(out);
    tile.lse = lse.data<float>() + head * tokens + d.q_begin + begin;
    tile.k_panels = k_panels.data<float>() + at * head_dim;
    tile.v_rows = v_rows.data<float>() + at * padded;
    tile.rows = std::min(kAttentionTile, d.queries - begin);
    tile.visible = d.keys - d.queries + begin + 1;
    tile.keys = d.keys;
    tile.head_dim = head_dim;
    tile.dtype = q.dtype();
    tile.scale = float(scale);
    kernels_.attention_forward(tile);
  });
}

void CpuBackend::attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& dout,
                                    const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
                                    double scale) {
  check_inputs("attention_backward", q, k);
  const Batch batch(cu_seqlens, cu_seqlens, kernels_.panel());
  const int64_t heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2), tokens = q.size(0);
  const int64_t group = heads / kv_heads, padded = kernels_.padded_dim(head_dim);
  const int64_t documents = int64_t(batch.documents.size());
  Tensor k_panels = scratch(kv_heads * batch.packed_keys, head_dim);
  Tensor v_panels = scratch(kv_heads * batch.packed_keys, head_dim);
  Tensor none, k_rows = scratch(kv_heads * batch.packed_keys, padded);
  pack(kernels_, k_panels, k_rows, k, batch);
  pack(kernels_, v_panels, none, v, batch);
  const int64_t segments = backward_segments(documents, heads, batch.most_queries);
  Tensor head_dk = scratch(segments * heads * tokens, padded);
  Tensor head_dv = scratch(segments * heads * tokens, padded);

  thread_pool().run(documents * heads * segments, [&](int64_t piece, int) {
    const Document& d = batch.documents[size_t(piece / segments / heads)];
    const int64_t head = piece / segments % heads, segment = piece % segments;
    const int64_t tiles = round_up(d.queries, kAttentionTile) / kAttentionTile;
    const int64_t at = head / group * batch.packed_keys + d.packed_begin;
    AttentionTile tile{};
    tile.k_panels = k_panels.data<float>() + at * head_dim;
    tile.v_panels = v_panels.data<float>() + at * head_dim;
    tile.k_rows = k_rows.data<float>() + at * padded;
    const int64_t sums = ((segment * heads + head) * tokens + d.k_begin) * padded;
    tile.dk = head_dk.data<float>() + sums;
    tile.dv = head_dv.data<float>() + sums;
    tile.q_stride = token_stride(q);
    tile.dout_stride = token_stride(dout);
    tile.out_saved_stride = token_stride(out);
    tile.out_stride = token_stride(dq);
    tile.keys = d.keys;
    tile.head_dim = head_dim;
    tile.dtype = q.dtype();
    tile.scale = float(scale);
    std::memset(tile.dk, 0, size_t(d.keys * padded) * sizeof(float));
    std::memset(tile.dv, 0, size_t(d.keys * padded) * sizeof(float));
    const int64_t last_tile = segment_begin(tiles, segment + 1, segments);
    for (int64_t t = segment_begin(tiles, segment, segments); t < last_tile; ++t) {
      const int64_t begin = t * kAttentionTile, token = d.q_begin + begin;
      tile.q = head_at(q, token, head);
      tile.dout = head_at(dout, token, head);
      tile.out_saved = head_at(out, token, head);
      tile.out = head_at(dq, token, head);
      tile.lse = lse.data<float>() + head * tokens + token;
      tile.rows = std::min(kAttentionTile, d.queries - begin);
      tile.visible = begin + 1;
      kernels_.attention_backward(tile);
    }
  });
  sum_heads(kernels_, dk, head_dk, segments, heads);
  sum_heads(kernels_, dv, head_dv, segments, heads);
}

int64_t cpu_kernel_scratch_bytes(int64_t num_tokens, int64_t heads, int64_t kv_heads,
                                 int64_t head_dim, bool backward) {
  const int64_t packed = num_tokens * kv_heads * head_dim * (backward ? 3 : 2);
  const int64_t sums = backward_segments(1, heads, num_tokens) * 2 * num_tokens * heads * head_dim;
  return int64_t(sizeof(float)) * (packed + (backward ? sums : 0));
}

}  // namespace graft
