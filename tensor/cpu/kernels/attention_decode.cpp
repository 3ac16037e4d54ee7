// Attention for few queries and many keys (decoding with a KV cache): keys and values are read
// once, in place, for all the heads that share them; chunks of keys are combined afterwards, in
// their order.
#include "tensor/cpu/kernels/attention_tile.h"
#include "tensor/cpu/kernels/install.h"

namespace graft::GRAFT_ISA {
namespace {

// Heads lie in lanes: scores (keys, width) = K (keys, D) q^T (D, width), then softmax goes down the
// columns, and out (heads, D) = P^T V.
template <class T>
void decode_heads(const DecodeChunk& c, int64_t head, int64_t heads) {
  const int64_t padded_dim = round_up(c.head_dim, kLanes), width = round_up(heads, kLanes);
  alignas(64) float q[kMaxHeadDim * kPanel] = {};  // heads that are not there have zero queries
  alignas(64) float scores[kDecodeChunk * kPanel];
  alignas(64) float rows[kAttentionTile * kMaxHeadDim];  // a block of keys, then of values, in F32
  alignas(64) float out[kPanel * kMaxHeadDim];
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t d = 0; d < c.head_dim; ++d)
      q[d * width + h] = to_f32(static_cast<const T*>(c.q)[(head + h) * c.q_stride + d]) * c.scale;

  for (int64_t key = 0; key < c.keys; key += kAttentionTile) {
    const int64_t count = smaller(kAttentionTile, c.keys - key);
    pack_rows(rows, padded_dim, static_cast<const T*>(c.k) + key * c.k_stride, c.k_stride, count,
              c.head_dim, 1.0f);
    tile_product<false>(scores + key * width, width, {rows, padded_dim}, {q, kPanel, width}, count,
                        false, [&](int64_t, int64_t) {
                          return Bounds{width, 0, c.head_dim};
                        });
  }
  for (int64_t h = 0; h < width; h += kLanes) {
    Vec largest = broadcast(-__builtin_inff()), sum{};
    for (int64_t key = 0; key < c.keys; ++key)
      largest = max(load(scores + key * width + h), largest);
    for (int64_t key = 0; key < c.keys; ++key) {
      const Vec p = exp(load(scores + key * width + h) - largest);
      store(scores + key * width + h, p);
      sum += p;
    }
    for (int64_t lane = 0; lane < smaller(kLanes, heads - h); ++lane) {
      float* tail = c.partial + (head + h + lane) * (padded_dim + 2) + padded_dim;
      tail[0] = largest[lane];
      tail[1] = sum[lane];
    }
  }
  std::memset(out, 0, size_t(heads * padded_dim) * sizeof(float));
  for (int64_t key = 0; key < c.keys; key += kAttentionTile) {
    const int64_t count = smaller(kAttentionTile, c.keys - key);
    pack_rows(rows, padded_dim, static_cast<const T*>(c.v) + key * c.v_stride, c.v_stride, count,
              c.head_dim, 1.0f);
    tile_product<true>(out, padded_dim, {scores + key * width, width}, {rows, kPanel, padded_dim},
                       heads, true, [&](int64_t, int64_t) {
                         return Bounds{padded_dim, 0, count};
                       });
  }
  for (int64_t h = 0; h < heads; ++h)
    std::memcpy(c.partial + (head + h) * (padded_dim + 2), out + h * padded_dim,
                size_t(padded_dim) * sizeof(float));
}

void attention_decode(const DecodeChunk& chunk) {
  with_activation(chunk.dtype, [&]<class T>(T) {
    for (int64_t head = 0; head < chunk.group; head += kPanel)
      decode_heads<T>(chunk, head, smaller(kPanel, chunk.group - head));
  });
}

void attention_combine(void* out, float* lse, const float* partials, int64_t chunks,
                       int64_t partial_stride, int64_t head_dim, DType dtype) {
  const int64_t padded_dim = round_up(head_dim, kLanes);
  float largest = -__builtin_inff(), sum = 0;
  for (int64_t i = 0; i < chunks; ++i) {
    const float in_chunk = partials[i * partial_stride + padded_dim];
    largest = in_chunk > largest ? in_chunk : largest;
  }
  for (int64_t i = 0; i < chunks; ++i) {
    const float* tail = partials + i * partial_stride + padded_dim;
    sum += tail[1] * exp(tail[0] - largest);
  }
  *lse = largest + __builtin_logf(sum);
  with_activation(dtype, [&]<class T>(T) {
    for_each_vector(head_dim, [&](int64_t d, auto lanes) {
      Vec total{};
      for (int64_t i = 0; i < chunks; ++i) {
        const float* partial = partials + i * partial_stride;
        total += load(partial + d) * exp(partial[padded_dim] - largest);
      }
      store(static_cast<T*>(out) + d, chunks > 0 ? total / sum : total, lanes);
    });
  });
}

}  // namespace

void install_attention_decode(CpuKernels& kernels) {
  kernels.attention_decode = attention_decode;
  kernels.attention_combine = attention_combine;
}

}  // namespace graft::GRAFT_ISA
