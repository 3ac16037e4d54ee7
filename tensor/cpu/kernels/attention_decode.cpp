// Attention for few queries and many keys (decoding with a KV cache): keys and values are read
// once, in place, for all the heads that share them; chunks of keys are combined afterwards, in
// their order.
#include "tensor/cpu/kernels/attention_tile.h"
#include "tensor/cpu/kernels/install.h"

namespace graft::GRAFT_ISA {
namespace {

constexpr int kHeads = 8;  // query heads at a time

template <class T>
void decode_heads(const DecodeChunk& c, int64_t head, int heads) {
  const int64_t padded_dim = round_up(c.head_dim, kLanes), keys = c.keys;
  const T* k = static_cast<const T*>(c.k);
  const T* v = static_cast<const T*>(c.v);
  alignas(64) float q[kHeads * kMaxHeadDim] = {};  // heads that are not there have zero queries
  alignas(64) float scores[kHeads][kDecodeChunk];
  pack_rows(q, padded_dim, static_cast<const T*>(c.q) + head * c.q_stride, c.q_stride, heads,
            c.head_dim, c.scale);
  for (int64_t key = 0; key < keys; ++key) {
    Vec sum[kHeads]{};
    for_each_vector(c.head_dim, [&](int64_t d, auto lanes) {
      const Vec right = load(k + key * c.k_stride + d, lanes);
      for (int h = 0; h < kHeads; ++h) sum[h] += right * load(q + h * padded_dim + d);
    });
    for (int h = 0; h < kHeads; ++h) scores[h][key] = horizontal_sum(sum[h]);
  }
  for (int h = 0; h < heads; ++h) {
    float* tail = c.partial + (head + h) * (padded_dim + 2) + padded_dim;
    float largest = -__builtin_inff();
    for (int64_t i = 0; i < keys; ++i) largest = scores[h][i] > largest ? scores[h][i] : largest;
    Vec sum{};
    for_each_vector(keys, [&](int64_t i, auto lanes) {
      store(scores[h] + i, exp(load(scores[h] + i, lanes) - largest), lanes);
      sum += load(scores[h] + i, lanes);
    });
    tail[0] = largest;
    tail[1] = horizontal_sum(sum);
  }
  for (int h = heads; h < kHeads; ++h) std::memset(scores[h], 0, sizeof scores[h]);
  for_each_vector(c.head_dim, [&](int64_t d, auto lanes) {
    Vec sum[kHeads]{};
    for (int64_t key = 0; key < keys; ++key) {
      const Vec right = load(v + key * c.v_stride + d, lanes);
      for (int h = 0; h < kHeads; ++h) sum[h] += scores[h][key] * right;
    }
    for (int h = 0; h < heads; ++h) store(c.partial + (head + h) * (padded_dim + 2) + d, sum[h]);
  });
}

void attention_decode(const DecodeChunk& chunk) {
  with_activation(chunk.dtype, [&]<class T>(T) {
    for (int64_t head = 0; head < chunk.group; head += kHeads)
      decode_heads<T>(chunk, head, int(smaller(kHeads, chunk.group - head)));
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
