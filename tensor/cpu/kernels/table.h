// The table of inner loops that each instruction set fills (kernels/table.cpp). Functions work on
// one piece on one thread, on raw pointers: `dtype` is of the activations (F32 or BF16), strides
// are in elements, gradients of parameters and statistics are F32. tensor/backend.h says what they
// compute.
#pragma once

#include <cstdint>

#include "tensor/dtype.h"

namespace graft {

constexpr int64_t kMaxHeadDim = 256;  // of attention: sizes its tiles on the stack
constexpr int64_t kAttentionTile =
    96;                                // queries, and keys, of one tile: a multiple of 12 and of 32
constexpr int64_t kDecodeChunk = 512;  // keys of one piece when decoding

// The mask of one row: keep element c when word c % 4 of philox({c / 4, counter}, key) >=
// threshold.
struct DropoutRow {
  uint32_t counter[3];
  uint32_t key[2];
  uint64_t threshold;  // at most 2^32
  float scale;
};

// torch.optim.AdamW with the scalars of one step worked out.
struct AdamWFactors {
  float grad_scale, decay, beta2, one_minus_beta1, one_minus_beta2, sqrt_correction2, epsilon,
      step_size;
};

// K^T and V as attention wants them: for a document's keys, panels of `panel` keys, each (D,
// panel), and plain rows of padded_dim floats. Both begin at the document's first key.
struct AttentionTile {
  const void* q;          // first query of the tile, this head
  const void* dout;       // backward only: like q
  const void* out_saved;  // backward only: like q
  void* out;              // forward: like q; backward: dq
  float* lse;             // first query of the tile, this head
  const float* k_panels;  // of this head's key head
  const float* v_panels;  // backward only
  const float* k_rows;    // backward only
  const float* v_rows;    // forward only
  float* dk;              // backward: (keys, padded_dim), accumulated
  float* dv;
  int64_t q_stride, dout_stride, out_saved_stride, out_stride;  // from a query to the next
  int64_t rows;     // queries in the tile, at most kAttentionTile
  int64_t visible;  // keys that the first query sees: may be <= 0; each next one sees one more
  int64_t keys;     // of the document
  int64_t head_dim;
  DType dtype;
  float scale;
};

// One query of a group of heads that share a key head, over up to kDecodeChunk keys.
struct DecodeChunk {
  float* partial;  // (group, padded_dim + 2): sum of exp(score - max) v, then max, then sum of exp
  const void* q;   // (group, q_stride)
  const void* k;   // first key
  const void* v;
  int64_t q_stride, k_stride, v_stride;
  int64_t group, keys, head_dim;
  DType dtype;
  float scale;
};

// A matrix of activations as a kernel walks it; data null: absent.
struct DoraRows {
  void* data;
  int64_t stride;  // elements from a row to the next
};
// The two matrices that SwiGLU multiplies, and the factors of their columns (null: 1).
struct DoraSwiglu {
  DoraRows gate, up;
  const float *gate_scale, *up_scale;
  DType dtype;
  int64_t rows, cols;
};

struct CpuKernels {
  const char* name;
  int lanes;
  // Attention pads head_dim to a multiple of `lanes` and cuts keys into panels of 2 * lanes.
  int64_t padded_dim(int64_t head_dim) const { return (head_dim + lanes - 1) / lanes * lanes; }
  int64_t panel() const { return 2 * lanes; }

  // n elements in a row
  void (*copy)(void* y, DType y_dtype, const void* x, DType x_dtype, int64_t n);
  void (*add)(void* y, const void* a, const void* b, DType dtype, int64_t n);
  void (*axpy)(void* y, DType y_dtype, const void* x, DType x_dtype, float alpha, int64_t n);
  void (*scale)(void* y, const void* x, DType dtype, float alpha, int64_t n);
  void (*swiglu_forward)(void* y, const void* gate, const void* up, DType dtype, int64_t n);
  // dgate or dup may be null; they may be gate and up
  void (*swiglu_backward)(void* dgate, void* dup, const void* dy, const void* gate, const void* up,
                          DType dtype, int64_t n);
  void (*adamw)(float* parameter, float* m, float* v, const float* gradient, int64_t n,
                const AdamWFactors& factors);
  double (*sum_of_squares)(const float* x, int64_t n);

  // db (cols) = or += column sums of (rows, cols)
  void (*sum_rows)(float* db, const void* dy, DType dtype, int64_t rows, int64_t cols,
                   int64_t stride, bool accumulate);
  void (*rms_norm_forward)(void* y, int64_t y_stride, float* rstd, const void* x, int64_t x_stride,
                           DType dtype, const float* weight, int64_t rows, int64_t cols, float eps);
  // dx may be null; dweight (cols), accumulated, may be null
  void (*rms_norm_backward)(void* dx, int64_t dx_stride, float* dweight, const void* dy,
                            int64_t dy_stride, const void* x, int64_t x_stride, DType dtype,
                            const float* weight, const float* rstd, int64_t rows, int64_t cols);
  // one token: x (heads, head_dim), cos_sin its row of the table
  void (*rope)(void* y, int64_t y_stride, const void* x, int64_t x_stride, DType dtype,
               const float* cos_sin, int64_t heads, int64_t head_dim, int direction);
  // one token; x, y (heads, head_dim), rstd (heads)
  void (*qk_norm_rope_forward)(void* y, int64_t y_stride, float* rstd, const void* x,
                               int64_t x_stride, DType dtype, const float* weight,
                               const float* cos_sin, int64_t heads, int64_t head_dim, float eps);
  // dx may be null; dweight (head_dim), accumulated, may be null
  void (*qk_norm_rope_backward)(void* dx, int64_t dx_stride, float* dweight, const void* dy,
                                int64_t dy_stride, const void* x, int64_t x_stride, DType dtype,
                                const float* weight, const float* rstd, const float* cos_sin,
                                int64_t heads, int64_t head_dim);
  // y = or += scale h + bias, by column; bias may be null
  void (*dora_scale)(DoraRows y, DoraRows h, DType dtype, const float* scale, const float* bias,
                     int64_t rows, int64_t cols, bool accumulate);
  // dh = scale dy, sums (cols) = column sums of dy h; either may be null
  void (*dora_scale_backward)(DoraRows dh, float* sums, DoraRows dy, DoraRows h, DType dtype,
                              const float* scale, int64_t rows, int64_t cols);
  void (*dora_swiglu_forward)(DoraRows y, const DoraSwiglu& in);
  // gate_sums, up_sums (cols): column sums of the gradient of scale * gate times gate; or null
  void (*dora_swiglu_backward)(DoraRows dgate, DoraRows dup, float* gate_sums, float* up_sums,
                               DoraRows dy, const DoraSwiglu& in);
  // squares (rows), of weights
  void (*row_squares)(float* squares, DoraRows w, DType dtype, int64_t rows, int64_t cols);
  // one row; returns the loss
  float (*cross_entropy)(float* logits, int64_t cols, int64_t label, float scale,
                         bool with_gradient);
  void (*dropout)(void* y, const void* x, DType dtype, int64_t cols, const DropoutRow& row,
                  bool accumulate);

  // Packs keys (or values) of one head; panels or rows may be null. Panels are padded with zeros.
  void (*attention_pack)(float* panels, float* rows, const void* src, int64_t stride, DType dtype,
                         int64_t keys, int64_t head_dim);
  void (*attention_forward)(const AttentionTile& tile);
  void (*attention_backward)(const AttentionTile& tile);
  void (*attention_decode)(const DecodeChunk& chunk);
  // out (head_dim) and its lse from `chunks` partials, `partial_stride` floats apart
  void (*attention_combine)(void* out, float* lse, const float* partials, int64_t chunks,
                            int64_t partial_stride, int64_t head_dim, DType dtype);
};

}  // namespace graft
