// The contract of a device: the list of kernels that the engine owes. One class per device derives
// from it (cpu/cpu_backend.h, cpu/reference/reference_backend.h, meta_backend.h, cuda/); a missing
// kernel is a compile error. Read next: cpu/reference/, where each kernel is a plain loop.
//
// Conventions. Outputs first, then inputs, then scalars. Callers (autograd/) check shapes, dtypes
// and devices and allocate outputs; a kernel checks only its own limits. Shapes below are
// row-major, the last dimension contiguous; "rows" of a tensor may be strided (Tensor::row_stride)
// where it says so. Activations, and their gradients, are of one float dtype per call: F32 or BF16
// (F64 in the reference backend); statistics, rstd, lse and every gradient of a parameter are F32
// (F64 with F64). Weights may be F32, BF16 or F16, whatever the file had. Sums are accumulated in
// F32 at least, in an order that does not depend on the number of threads.
//   T tokens in the packed batch   H hidden   D head_dim   V vocabulary   N, K, M matrix sizes
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include "tensor/random.h"
#include "tensor/tensor.h"

namespace graft {

// One product of a gemm: alpha * op(a) op(b), op being the transpose where asked for.
//   op(a) (M, K), op(b) (K, N); each F32, BF16 or F16, rows may be strided. A frozen weight of a
//   linear layer (out, in) is b with transpose_b in the forward and without it for dX. b may be NF4
//   (nf4.h): its elements are rounded to BF16 where a is BF16, and only ever widened part by part.
struct GemmTerm {
  Tensor a;
  Tensor b;
  bool transpose_a = false;
  bool transpose_b = false;
  double alpha = 1;
};

struct AdamWStep {
  double learning_rate, beta1, beta2, epsilon, weight_decay;
  int64_t step;  // from 1: bias correction is 1 - beta^step
  // LoRA+ (Hayou et al. 2024): B learns lr_ratio times as fast as A.
  double lr_ratio = 1;
  bool for_b = false;  // these parameters

  double rate() const { return for_b ? learning_rate * lr_ratio : learning_rate; }
};

// A moment of AdamW in 8 bits (blockwise8.h): codes (n) U8, absmax F32, one for 256 elements.
struct State8 {
  Tensor codes, absmax;
};

// The work of one optimizer step, on the addresses of its capture. Whoever holds it keeps what lies
// there: the step's inputs and the blocks of the allocator's pool.
class CapturedStep {
 public:
  virtual ~CapturedStep() = default;
  // Starts it, with what changes although no shape does: every adamw in it goes by these numbers
  // (without weight decay if it was captured so), and every dropout by their step.
  virtual void launch(const AdamWStep& adamw) = 0;
};

// dst = alpha * src, of one shape; dtypes may differ, rows of both may be strided.
struct ScaledCopy {
  Tensor dst;
  Tensor src;
  double alpha = 1;
};

// DoRA (Liu et al. 2024): row n of W + s B A, of length norm[n], gets the length magnitude[n], so
// that column n of what it gives is multiplied by g[n] = magnitude[n] / norm[n]; by 0 where norm[n]
// is 0. Both (N) F32 (F64), dense; both undefined: every g is 1.
struct DoraScale {
  Tensor magnitude, norm;
};
// norm[n] = |W_n + s B_n A|, from products alone that never make W + s B A:
//   norm[n]^2 = max(0, squares[n] + 2 s sum_j (A W^T)[j,n] B[n,j] + s^2 B_n (A A^T) B_n^T)
struct DoraNorm {
  Tensor norm;     // (N) F32 (F64)
  Tensor squares;  // (N), |W_n|^2, by row_squares
  Tensor weight;   // (N, K), any float dtype or NF4
  Tensor a, b;     // (r, K), (N, r) F32 (F64)
  double scaling = 1;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string describe() const = 0;  // one line for people: which code runs and why

  // Moves bytes and fills. dst and src have the same number of elements; dtypes may differ (rounded
  // to nearest even); rows of either may be strided. src may be NF4 (nf4.h), and be widened.
  virtual void fill(Tensor& dst, double value) = 0;
  virtual void copy(Tensor& dst, const Tensor& src) = 0;

  // Many small copies at once. Destinations F32 or BF16, sources F32; none overlap.
  virtual void copy_scaled(std::span<const ScaledCopy> copies) = 0;

  // y = a + b, all the same shape and dtype; y may be a or b.
  virtual void add(Tensor& y, const Tensor& a, const Tensor& b) = 0;
  // y += alpha * x. y F32/F64 or of x's dtype; for accumulating gradients.
  virtual void axpy(Tensor& y, const Tensor& x, double alpha) = 0;
  // y = alpha * x; y may be x.
  virtual void scale(Tensor& y, const Tensor& x, double alpha) = 0;
  // y = factor * x, the factor a scalar on the device of x (F32 or F64): it need not be known here.
  virtual void scale_by(Tensor& y, const Tensor& x, const Tensor& factor) = 0;
  // total += alpha * sum of x. total a scalar F64; x dense F32 or F64; summed in F64, fixed order.
  virtual void add_sum(Tensor& total, const Tensor& x, double alpha) = 0;

  // c (M, N) = addend + bias + sum of the terms; accumulated in F32, rounded once to c's dtype.
  //   addend (M, N) of c's dtype or undefined; it may be c itself (accumulate)
  //   bias   (N), any float dtype, or undefined, added to every row
  // One or two terms: two are the base product and the low-rank product of a LoRA layer in one
  // pass. Rows of c, addend, a and b may be strided. On the GPU operands are multiplied in a's
  // dtype (b is rounded to it), and c is rounded after each term.
  virtual void gemm(Tensor& c, std::span<const GemmTerm> terms, const Tensor& addend = {},
                    const Tensor& bias = {}) = 0;
  // db (N) F32 += or = sum over rows of dy (M, N).
  virtual void sum_rows(Tensor& db, const Tensor& dy, bool accumulate) = 0;

  // y (T, H) = weight[ids[t]], ids (T) I32, weight (V, H) any float dtype.
  virtual void embedding_forward(Tensor& y, const Tensor& ids, const Tensor& weight) = 0;
  // dweight (V, H) F32 += rows of dy (T, H) at ids, in token order.
  virtual void embedding_backward(Tensor& dweight, const Tensor& ids, const Tensor& dy) = 0;

  // RMSNorm (Zhang & Sennrich 2019): y = x * rstd * weight, rstd = 1 / sqrt(mean x^2 + eps), over
  // the last dimension. x, y (..., H), x's rows may be strided; weight (H); rstd (rows) F32.
  virtual void rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                                double eps) = 0;
  // dx (like x), dweight (H) F32 accumulated; either may be undefined and is then not computed.
  virtual void rms_norm_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                                 const Tensor& weight, const Tensor& rstd) = 0;

  // Rotary position embedding (Su et al. 2021), halves as in Hugging Face: the pair (i, i + D/2) of
  // every head turns by angle table(position, i). y, x (T, heads, D); y may be x;
  //   cos_sin (positions, D) F32 (F64): cos in columns [0, D/2), sin in [D/2, D), any attention
  //   factor multiplied in; positions (T) I32, row of cos_sin for each token;
  //   direction +1 forward, -1 backward (the gradient of a rotation is the opposite rotation).
  virtual void rope(Tensor& y, const Tensor& x, const Tensor& positions, const Tensor& cos_sin,
                    int direction) = 0;

  // The two above in one pass over each head of a token, as Qwen3 does to its queries and keys: y =
  // rope(rms_norm(x)), rounded once. Without a weight nothing is normed, and rstd not touched.
  //   y, x (T, heads, D) or (T, heads * D), rows strided (tensor/heads.h); y may be x
  //   rstd (T * heads) F32; weight (D), any float dtype, or undefined
  virtual void qk_norm_rope_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                                    double eps, const Tensor& positions, const Tensor& cos_sin) = 0;
  // dx (laid out as it likes; may be dy or x), dweight (D) F32 accumulated; either may be undefined
  // and is then not computed. Without a weight x and rstd are not read.
  virtual void qk_norm_rope_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                                     const Tensor& weight, const Tensor& rstd,
                                     const Tensor& positions, const Tensor& cos_sin) = 0;

  // Causal attention within each packed document, online softmax (Milakov & Gimelshein 2018; tiled
  // as FlashAttention-2, Dao 2023). Document d owns rows [cu_q[d], cu_q[d+1]) of q and
  // [cu_k[d], cu_k[d+1]) of k and v; its query i sees keys j <= i + (length_k - length_q), so that
  // decoding with a KV cache is the same call. Query head h uses key head h / (heads / kv_heads).
  //   out, q (Tq, heads, D); k, v (Tk, kv_heads, D); lse (heads, Tq) F32 natural log-sum-exp of the
  //   scaled scores; cu_q, cu_k (documents + 1) I32 on the CPU. Rows are dense.
  virtual void attention_forward(Tensor& out, Tensor& lse, const Tensor& q, const Tensor& k,
                                 const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                                 double scale) = 0;
  // dq, dk, dv like q, k, v; all are written (not accumulated). Self-attention: cu_q is cu_k.
  virtual void attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& dout,
                                  const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens,
                                  double scale) = 0;

  // SwiGLU (Shazeer 2020): y = silu(gate) * up, elementwise; all (T, I).
  virtual void swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up) = 0;
  // dgate, dup from dy; either may be undefined; they may be gate, up themselves (in place).
  virtual void swiglu_backward(Tensor& dgate, Tensor& dup, const Tensor& dy, const Tensor& gate,
                               const Tensor& up) = 0;

  // y[t,n] = (y[t,n] where accumulate +) g[n] h[t,n] + bias[n]; y and h (T, N), rows strided; y may
  // be h. bias (N), any float dtype, or undefined.
  virtual void dora_scale(Tensor& y, const Tensor& h, const DoraScale& dora, const Tensor& bias,
                          bool accumulate) = 0;
  // dh[t,n] = g[n] dy[t,n] and dmagnitude[n] = sum_t dy[t,n] h[t,n] / norm[n] (0 where norm is 0);
  // either may be undefined, dh may be dy. Where of_scaled, `h` is g h: the sum is then over
  // magnitude[n] (0 where that is 0).
  virtual void dora_scale_backward(Tensor& dh, Tensor& dmagnitude, const Tensor& dy,
                                   const Tensor& h, const DoraScale& dora, bool of_scaled) = 0;
  // swiglu of gate and up that are scaled on the way: y = silu(g1 gate) g2 up.
  virtual void dora_swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up,
                                   const DoraScale& of_gate, const DoraScale& of_up) = 0;
  // Its gradients, dgate and dup already times g1 and g2; they may be gate and up themselves. Any
  // may be undefined.
  virtual void dora_swiglu_backward(Tensor& dgate, Tensor& dup, Tensor& dgate_magnitude,
                                    Tensor& dup_magnitude, const Tensor& dy, const Tensor& gate,
                                    const Tensor& up, const DoraScale& of_gate,
                                    const DoraScale& of_up) = 0;
  // squares[n] = sum_k w[n,k]^2. squares (N) F32 (F64); w (N, K), any float dtype or NF4.
  virtual void row_squares(Tensor& squares, const Tensor& w) = 0;
  virtual void dora_norms(std::span<const DoraNorm> layers) = 0;

  // For each row n of a chunk of logits (N, V), F32 or BF16, with label labels[n] in [0, V):
  // losses[n] (N, F32) = logsumexp(logits[n]) - logits[n][label]; and, where with_gradient, the
  // logits are overwritten by (softmax(logits[n]) - onehot(label)) * scale.
  virtual void cross_entropy(Tensor& losses, Tensor& logits, const Tensor& labels, double scale,
                             bool with_gradient) = 0;

  // indices[n] (N, I32, where x is) = column of the largest element of row n of x (N, C) F32, the
  // first of equal ones. C > 0; of a row with NaN it is any column.
  virtual void argmax_rows(Tensor& indices, const Tensor& x) = 0;

  // Rows of src (rows, C) at indices (n) I32 into dst (n, C), and back: dst[indices[i]] += src[i].
  virtual void gather_rows(Tensor& dst, const Tensor& src, const Tensor& indices) = 0;
  virtual void scatter_add_rows(Tensor& dst, const Tensor& src, const Tensor& indices) = 0;

  // y (T, C) = dropout(x), or y += where accumulate, by the mask that `key` names (random.h): x /
  // (1-p) where kept, else 0. Applying it to a gradient with the same key is the backward.
  virtual void dropout(Tensor& y, const Tensor& x, double p, const DropoutKey& key,
                       bool accumulate) = 0;

  // total, one F64 = sum of squares of x (F32), added in a fixed order.
  virtual void sum_of_squares(Tensor& total, const Tensor& x) = 0;
  // What a step came to, on its device, for nobody to wait for: outcome (3) F64 goes from {loss,
  // sum of squares of the gradient, -} to {loss, norm, factor}. The factor is that of torch's
  // clip_grad_norm_, min(1, max_norm / (norm + 1e-6)), or 1 where max_norm is 0; and NaN where the
  // loss or the norm is not finite.
  virtual void clip_factor(Tensor& outcome, double max_norm) = 0;
  // AdamW (Loshchilov & Hutter 2019; the arithmetic of torch.optim.AdamW) over flat F32 buffers.
  // The gradient is multiplied by grad_scale (one F64) first; where that is NaN nothing is done.
  // `parameter`, m, v are updated.
  virtual void adamw(Tensor& parameter, Tensor& m, Tensor& v, const Tensor& gradient,
                     const Tensor& grad_scale, const AdamWStep& step) = 0;
  // As bitsandbytes' AdamW8bit: m (signed map) and v (unsigned) are widened, updated, quantised.
  virtual void adamw_8bit(Tensor& parameter, State8& m, State8& v, const Tensor& gradient,
                          const Tensor& grad_scale, const AdamWStep& step) = 0;

  // Runs `step`, whose kernels are not started but kept, to be started many times at once. The
  // GPU alone can do that; it must have run the same step before.
  virtual std::unique_ptr<CapturedStep> capture(const std::function<void()>& step);
};

// The backend of a tensor: CPU F64 runs on the reference backend, Meta on the one that does
// nothing, everything else on the backend in use for its device.
Backend& backend_of(const Tensor& tensor);
Backend& backend_of(Device device);

Backend& reference_backend();  // plain loops, F32, BF16 and F64: the meaning of every kernel
Backend& cpu_backend();        // the fast twins
Backend& meta_backend();

// While it lives, CPU tensors run on the reference backend. For tests.
class UseReferenceBackend {
 public:
  UseReferenceBackend();
  ~UseReferenceBackend();

 private:
  Backend* previous_;
};

}  // namespace graft
