// Attention forward over one tile of queries: online softmax (Milakov & Gimelshein 2018) over tiles
// of keys, as FlashAttention-2 (Dao 2023). S = (q scale) K^T; P = e^(S - max); out = P V / sum P.
#include "tensor/cpu/kernels/attention_tile.h"
#include "tensor/cpu/kernels/install.h"

namespace graft::GRAFT_ISA {
namespace {

void attention_pack(float* panels, float* rows, const void* src, int64_t stride, DType dtype,
                    int64_t keys, int64_t head_dim) {
  const int64_t padded = round_up(head_dim, kLanes);
  with_activation(dtype, [&]<class T>(T) {
    const T* from = static_cast<const T*>(src);
    if (rows) pack_rows(rows, padded, from, stride, keys, head_dim, 1.0f);
    if (!panels) return;
    for (int64_t key = 0; key < round_up(keys, kPanel); ++key) {
      float* to = panels + key / kPanel * kPanel * head_dim + key % kPanel;
      for (int64_t d = 0; d < head_dim; ++d)
        to[d * kPanel] = key < keys ? to_f32(from[key * stride + d]) : 0.0f;
    }
  });
}

// Turns a row of scores into P = e^(s - max), zero from `visible` to `padded`; updates the row's
// running max and sum, and returns the factor that what was summed under the old max must take.
float softmax_row(float* scores, int64_t visible, int64_t padded, float& running_max,
                  float& running_sum) {
  const float kNone = -__builtin_inff();
  Vec best = broadcast(running_max);
  for (int64_t i = 0; i < visible; i += kLanes) {
    const VecI32 in_range = lane_index() < int32_t(visible - i);
    best = max(select(in_range, load(scores + i), broadcast(kNone)), best);
  }
  const float new_max = horizontal_max(best);
  Vec sum{};
  int64_t i = 0;
  for (; i < visible; i += kLanes) {
    const VecI32 in_range = lane_index() < int32_t(visible - i);
    const Vec p = select(in_range, exp(load(scores + i) - new_max), Vec{});
    store(scores + i, p);
    sum += p;
  }
  for (; i < padded; i += kLanes) store(scores + i, Vec{});
  const float correction = running_max == kNone ? 0.0f : exp(running_max - new_max);
  running_sum = running_sum * correction + horizontal_sum(sum);
  running_max = new_max;
  return correction;
}

template <class T>
void forward_tile(const AttentionTile& t) {
  const int64_t padded_dim = round_up(t.head_dim, kLanes), rows = t.rows;
  alignas(64) float q[kAttentionTile * kMaxHeadDim];
  alignas(64) float out[kAttentionTile * kMaxHeadDim];
  alignas(64) float scores[kAttentionTile * kAttentionTile];
  float row_max[kAttentionTile], row_sum[kAttentionTile];
  pack_rows(q, padded_dim, static_cast<const T*>(t.q), t.q_stride, rows, t.head_dim, t.scale);
  std::memset(out, 0, size_t(rows * padded_dim) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) row_max[r] = -__builtin_inff(), row_sum[r] = 0;

  const int64_t last = smaller(t.keys, t.visible + rows - 1);  // keys that any query sees
  for (int64_t begin = 0; begin < last; begin += kAttentionTile) {
    const int64_t keys = smaller(kAttentionTile, t.keys - begin);
    const auto visible = [&](int64_t row) {  // keys of this tile that `row` sees
      const int64_t n = smaller(keys, t.visible + row - begin);
      return n > 0 ? n : 0;
    };
    tile_product<false>(scores, kAttentionTile, {q, padded_dim},
                        {t.k_panels + begin * t.head_dim, t.head_dim * kPanel, kPanel}, rows, false,
                        [&](int64_t first, int64_t count) {
                          const int64_t n = visible(first + count - 1);
                          return Bounds{round_up(n, kLanes), 0, t.head_dim};
                        });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t n = visible(r);
      const int64_t padded = round_up(smaller(keys, n + kTileRows), kLanes);
      if (n == 0) {
        std::memset(scores + r * kAttentionTile, 0, size_t(padded) * sizeof(float));
        continue;
      }
      const float factor =
          softmax_row(scores + r * kAttentionTile, n, padded, row_max[r], row_sum[r]);
      if (factor != 1.0f)
        for (int64_t d = 0; d < padded_dim; d += kLanes)
          store(out + r * padded_dim + d, load(out + r * padded_dim + d) * factor);
    }
    tile_product<false>(out, padded_dim, {scores, kAttentionTile},
                        {t.v_rows + begin * padded_dim, kPanel, padded_dim}, rows, true,
                        [&](int64_t first, int64_t count) {
                          return Bounds{padded_dim, 0, visible(first + count - 1)};
                        });
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float inverse =
        row_sum[r] > 0 ? 1.0f / row_sum[r] : (row_sum[r] == 0 ? 0.0f : row_sum[r]);
    t.lse[r] = row_max[r] + __builtin_logf(row_sum[r]);
    for_each_vector(t.head_dim, [&](int64_t d, auto lanes) {
      store(static_cast<T*>(t.out) + r * t.out_stride + d, load(out + r * padded_dim + d) * inverse,
            lanes);
    });
  }
}

void attention_forward(const AttentionTile& tile) {
  with_activation(tile.dtype, [&]<class T>(T) { forward_tile<T>(tile); });
}

}  // namespace

void install_attention(CpuKernels& kernels) {
  kernels.attention_pack = attention_pack;
  kernels.attention_forward = attention_forward;
}

}  // namespace graft::GRAFT_ISA
