// Attention backward over one tile of queries of one head. With P = e^(S - lse) and
// delta = sum_d dout out, over every tile of keys:
//   dV += P^T dout;  dP = dout V^T;  dS = P (dP - delta);  dQ += dS K scale;  dK += dS^T (Q scale)
#include "tensor/cpu/kernels/attention_tile.h"
#include "tensor/cpu/kernels/install.h"

namespace graft::GRAFT_ISA {
namespace {

// scores becomes P and dscores becomes dS, both zero from `visible` to `padded`.
void softmax_gradient_row(float* scores, float* dscores, int64_t visible, int64_t padded, float lse,
                          float delta) {
  int64_t i = 0;
  for (; i < visible; i += kLanes) {
    const VecI32 in_range = lane_index() < int32_t(visible - i);
    const Vec p = select(in_range, exp(load(scores + i) - lse), Vec{});
    store(scores + i, p);
    store(dscores + i, select(in_range, p * (load(dscores + i) - delta), Vec{}));
  }
  for (; i < padded; i += kLanes) {
    store(scores + i, Vec{});
    store(dscores + i, Vec{});
  }
}

struct Buffers {
  alignas(64) float q[kAttentionTile * kMaxHeadDim];
  alignas(64) float dout[kAttentionTile * kMaxHeadDim];
  alignas(64) float dq[kAttentionTile * kMaxHeadDim];
  alignas(64) float scores[kAttentionTile * kAttentionTile];
  alignas(64) float dscores[kAttentionTile * kAttentionTile];
  float delta[kAttentionTile];
};

void backward_key_tile(const AttentionTile& t, Buffers& b, int64_t begin) {
  const int64_t padded_dim = round_up(t.head_dim, kLanes), rows = t.rows;
  const int64_t keys = smaller(kAttentionTile, t.keys - begin);
  const auto visible = [&](int64_t row) {
    const int64_t n = smaller(keys, t.visible + row - begin);
    return n > 0 ? n : 0;
  };
  const auto score_bounds = [&](int64_t first, int64_t count) {
    return Bounds{round_up(visible(first + count - 1), kLanes), 0, t.head_dim};
  };
  const int64_t panel_stride = t.head_dim * kPanel;
  tile_product<false>(b.scores, kAttentionTile, {b.q, padded_dim},
                      {t.k_panels + begin * t.head_dim, panel_stride, kPanel}, rows, false,
                      score_bounds);
  tile_product<false>(b.dscores, kAttentionTile, {b.dout, padded_dim},
                      {t.v_panels + begin * t.head_dim, panel_stride, kPanel}, rows, false,
                      score_bounds);
  for (int64_t r = 0; r < rows; ++r)
    softmax_gradient_row(b.scores + r * kAttentionTile, b.dscores + r * kAttentionTile, visible(r),
                         round_up(keys, kLanes), t.lse[r], b.delta[r]);
  tile_product<false>(b.dq, padded_dim, {b.dscores, kAttentionTile},
                      {t.k_rows + begin * padded_dim, kPanel, padded_dim}, rows, true,
                      [&](int64_t first, int64_t count) {
                        return Bounds{padded_dim, 0, visible(first + count - 1)};
                      });
  // Rows of dK and dV are keys; key j is seen from query j + begin - visible + 1 on.
  const auto key_bounds = [&](int64_t first, int64_t) {
    const int64_t query = begin + first - t.visible + 1;
    return Bounds{padded_dim, query > 0 ? query : 0, rows};
  };
  tile_product<true>(t.dk + begin * padded_dim, padded_dim, {b.dscores, kAttentionTile},
                     {b.q, kPanel, padded_dim}, keys, true, key_bounds);
  tile_product<true>(t.dv + begin * padded_dim, padded_dim, {b.scores, kAttentionTile},
                     {b.dout, kPanel, padded_dim}, keys, true, key_bounds);
}

template <class T>
void backward_tile(const AttentionTile& t) {
  const int64_t padded_dim = round_up(t.head_dim, kLanes), rows = t.rows;
  Buffers b;
  const T* dout = static_cast<const T*>(t.dout);
  pack_rows(b.q, padded_dim, static_cast<const T*>(t.q), t.q_stride, rows, t.head_dim, t.scale);
  pack_rows(b.dout, padded_dim, dout, t.dout_stride, rows, t.head_dim, 1.0f);
  std::memset(b.dq, 0, size_t(rows * padded_dim) * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    Vec sum{};
    const T* out = static_cast<const T*>(t.out_saved) + r * t.out_saved_stride;
    for_each_vector(t.head_dim, [&](int64_t d, auto lanes) {
      sum += load(dout + r * t.dout_stride + d, lanes) * load(out + d, lanes);
    });
    b.delta[r] = horizontal_sum(sum);
  }
  const int64_t last = smaller(t.keys, t.visible + rows - 1);
  for (int64_t begin = 0; begin < last; begin += kAttentionTile) backward_key_tile(t, b, begin);
  for (int64_t r = 0; r < rows; ++r)
    for_each_vector(t.head_dim, [&](int64_t d, auto lanes) {
      store(static_cast<T*>(t.out) + r * t.out_stride + d,
            load(b.dq + r * padded_dim + d) * t.scale, lanes);
    });
}

void attention_backward(const AttentionTile& tile) {
  with_activation(tile.dtype, [&]<class T>(T) { backward_tile<T>(tile); });
}

}  // namespace

void install_attention_backward(CpuKernels& kernels) {
  kernels.attention_backward = attention_backward;
}

}  // namespace graft::GRAFT_ISA
