// Every differentiable op, with its two equations. Activations are packed: T tokens of all the rows
// of a batch one after the other, no padding; documents are told apart by cu_seqlens.
//   T tokens   H hidden   D head_dim   N, K out and in features   r rank   V vocabulary
// Activations are F32, BF16 (or F64, on the reference backend, for gradient checks); weights of
// those or F16. Every op throws Error, under its own name, on shapes, dtypes or devices that do not
// fit.
#pragma once

#include <vector>

#include "autograd/variable.h"
#include "tensor/random.h"

namespace graft::ops {

// y = a + b; da = db = dy. (T, H)
Variable add(const Variable& a, const Variable& b);
// A view with another shape; dx = dy reshaped.
Variable reshape(const Variable& x, Shape shape);
// y = alpha x.
Variable scale(const Variable& x, double alpha);

// y[t] = weight[ids[t]]; dweight[ids[t]] += dy[t]. ids (T) I32, weight (V, H); y in `dtype`.
Variable embedding(const Tensor& ids, const Variable& weight, DType dtype);

// y[t] = base[t] + scaling B[ids[t]] A: LoRA on an embedding, whose weight it turns into W +
// scaling B A. dB[ids[t]] += scaling dy[t] A^T, dA = scaling sum_t B[ids[t]]^T dy[t]. base (T, H),
// A (r, H), B (V, r), which PEFT keeps transposed, and under each other's name.
struct LoraArguments;
Variable add_embedding_low_rank(const Variable& base, const Tensor& ids, const LoraArguments& lora);

// y = x W^T + b; dx = dy W, dW = dy^T x, db = sum_t dy. x (T, K), weight (N, K), bias (N) or
// undefined.
Variable linear(const Variable& x, const Variable& weight, const Variable& bias = {});

// LoRA (Hu et al. 2021) on a frozen or trained linear layer, dropout on the low-rank branch only:
//   u = drop(x) A^T        y = x W^T + b + scaling u B^T
//   dB = scaling dy^T u    du = scaling dy B    dA = du^T drop(x)    dx = dy W + drop'(du A)
// A (r, K), B (N, r): leaves, F32 (F64). dropout_p 0 draws nothing.
struct LoraArguments {
  Variable a, b;
  double scaling = 1;
  double dropout_p = 0;
  DropoutKey key = {};
};
Variable lora_linear(const Variable& x, const Variable& weight, const Variable& bias,
                     const LoraArguments& lora);

// DoRA (Liu et al. 2024) on a frozen layer: the rows of W + scaling B A, of lengths `norm`, get the
// lengths m, a leaf (N):
//   h = x W^T + scaling u B^T, u = x A^T      g = m / norm (0 where norm is 0)      y = g h + b
//   dh = g dy      dm = sum_t dy h / norm     and from dh what lora_linear makes from dy
// norm is a constant to the gradient, as in the paper and in PEFT. With dropout, PEFT's base
// product under g sees drop(x) too, which takes a second product here and in the backward:
//   h = drop(x) W^T + scaling u B^T, u = drop(x) A^T      y = g h + (x - drop(x)) W^T + b
// Without bias and dropout y is kept for dm, which a consumer may keep as well: dm = sum_t dy y /
// m, and 0 where m is 0. Else h is.
struct DoraFactor {
  Variable magnitude;  // m
  Tensor norm;         // (N) F32 (F64): whoever changes A or B brings it up to date (nn/dora.h)
};
Variable dora_linear(const Variable& x, const Variable& weight, const Variable& bias,
                     const LoraArguments& lora, const DoraFactor& dora);
// y = base + scaling (x A^T) B^T with frozen A (r, K) and B (N, r): what adapters that are not
// trained add to a layer. dbase = dy, dx = scaling (dy B) A. base (T, N), x (T, K).
Variable add_low_rank(const Variable& base, const Variable& x, const Tensor& a, const Tensor& b,
                      double scaling);
// y[t,n] = m[n] / norm[n] h[t,n] + bias[n] with frozen m and bias; dh = m / norm dy.
Variable scale_columns(const Variable& h, const DoraFactor& rows, const Variable& bias = {});

// Frozen linear layers that share their input, each with an adapter or none, as one product. In the
// columns of layer i, y is what lora_linear gives for it; dropout has a mask for each layer.
//   bordered  undefined; or (N + R, K + R) of x's dtype, R = border_columns(): [W | B] above [A |
//   0],
//             B being scaling B_i on the diagonal, A all A_i in order, what is left over zero.
//             Then, with S = x A^T in spare columns of x and dS = dy B in spare columns of dy,
//               y = [x | S] [W | B]^T + b      dx = [dy | dS] [W; A]      (no dropout)
//             are one product each. x with spare columns may go to one such group only. Whoever
//             changes A or B brings `bordered` up to date (nn/linear_group.h).
struct LoraGroup {
  struct Layer {
    int64_t out_features = 0;
    LoraArguments lora;  // a, b undefined: no adapter
  };
  Tensor weight;  // (N, K): the rows of all layers, one layer after another
  Tensor bias;    // (N) or undefined
  Tensor bordered;
  bool wide_output = false;  // bordered: y gets R spare columns, for a consumer that gives dy so
  std::vector<Layer> layers;
};
// The ranks of all adapters, up to a multiple of 8: what spare columns x should have.
int64_t border_columns(const LoraGroup& group);
Variable lora_linear_group(const Variable& x, const LoraGroup& group);

// y = x rstd weight, rstd = 1 / sqrt(mean x^2 + eps) over the last dimension.
//   dx = rstd (w dy - x rstd^2 mean(x w dy)), dw = sum dy x rstd. x (..., H), weight (H).
// spare_cols: of y (Tensor::with_spare_cols); x is a matrix then.
Variable rms_norm(const Variable& x, const Variable& weight, double eps, int64_t spare_cols = 0);

// Rotates every head by the token's position (backend.h). x (T, heads, D), positions (T), cos_sin
// (P, D).
Variable rope(const Variable& x, const Tensor& positions, const Tensor& cos_sin);

// rope(rms_norm(x, weight, eps)) of every head in one pass; saves x and rstd alone. Without a
// weight it is rope. The gradient turns back and is then that of rms_norm. x (T, heads, D), weight
// (D).
Variable qk_norm_rope(const Variable& x, const Variable& weight, double eps,
                      const Tensor& positions, const Tensor& cos_sin);

// softmax(scale q k^T + causal mask within each document) v. q (T, heads, D), k, v (T, kv_heads,
// D); saves q, k, v, out and the log-sum-exp. cu_seqlens (documents + 1) I32.
Variable attention(const Variable& q, const Variable& k, const Variable& v,
                   const Tensor& cu_seqlens, double scale);

// y = silu(gate) up; all (T, I).
Variable swiglu(const Variable& gate, const Variable& up);
// swiglu(g1 gate, g2 up) where gate and up are h of DoRA layers (undefined factor: not one): keeps
// what swiglu keeps, and neither y of the layers nor a pass over it exists.
Variable dora_swiglu(const Variable& gate, const Variable& up, const DoraFactor& of_gate,
                     const DoraFactor& of_up);
// swiglu on the halves of gate_up (T, 2 I); y gets spare columns.
Variable swiglu_merged(const Variable& gate_up, int64_t spare_cols = 0);

// Attention on the columns of qkv (T, (heads + 2 kv_heads) D): q and k normed by head where there
// is a norm, and turned. y (T, heads D). Norms are frozen.
struct MergedHeads {
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  Variable q_norm, k_norm;  // (D) or undefined
  double eps = 0;
  Tensor positions, cos_sin, cu_seqlens;
  double scale = 1;
};
Variable attention_merged(const Variable& qkv, const MergedHeads& heads);

// scale * sum over labelled rows of the cross-entropy of softmax(hidden W^T) against labels.
//   hidden (T, H), weight (V, H), labels (T) I32 with kIgnoreLabel where nothing is predicted.
// Rows without a label cost nothing; logits exist for chunk_rows rows at a time, and the gradient
// of hidden is made in the forward: never more than chunk_rows x V logits. token_losses: if given,
// becomes (T) F32, the loss of each row, 0 where there is no label.
constexpr int32_t kIgnoreLabel = -100;
// chunk_rows 0: 256 on the CPU; 2048 on the GPU, where fewer would read the weight more often than
// they multiply (a chunk at V = 151936 is 0.6 GB in BF16).
constexpr int64_t kLossChunkRows = 256, kLossChunkRowsGpu = 2048;
// adapters: pairs of LoRA on the head, as lora_linear has them; their sum is added to the logits.
Variable linear_cross_entropy(const Variable& hidden, const Variable& weight, const Tensor& labels,
                              double scale, Tensor* token_losses = nullptr, int64_t chunk_rows = 0,
                              const std::vector<LoraArguments>& adapters = {});

// The same from the rows that have a label, in order: their numbers and their labels, (n) I32 both.
// Whoever puts them on the GPU beforehand uploads nothing in the op.
struct LabelledRows {
  Tensor rows, labels;
};
LabelledRows labelled_rows(const Tensor& labels, int64_t vocabulary);  // labels (T) on the CPU
Variable linear_cross_entropy(const Variable& hidden, const Variable& weight,
                              const LabelledRows& labelled, double scale,
                              Tensor* token_losses = nullptr, int64_t chunk_rows = 0,
                              const std::vector<LoraArguments>& adapters = {});

}  // namespace graft::ops
