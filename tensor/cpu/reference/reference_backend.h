// The meaning of every kernel of tensor/backend.h: plain loops, sums in double, one rounding at the
// store. F32, BF16 and F64 activations. The oracle of every test and the backend of gradient
// checks.
#pragma once

#include "tensor/backend.h"

namespace graft {

class ReferenceBackend final : public Backend {
 public:
  std::string describe() const override { return "reference (plain loops, sums in F64)"; }

  // elementwise.cpp
  void fill(Tensor& dst, double value) override;
  void copy(Tensor& dst, const Tensor& src) override;
  void copy_scaled(std::span<const ScaledCopy> copies) override;
  void add(Tensor& y, const Tensor& a, const Tensor& b) override;
  void axpy(Tensor& y, const Tensor& x, double alpha) override;
  void scale(Tensor& y, const Tensor& x, double alpha) override;
  void scale_by(Tensor& y, const Tensor& x, const Tensor& factor) override;
  void add_sum(Tensor& total, const Tensor& x, double alpha) override;
  void sum_rows(Tensor& db, const Tensor& dy, bool accumulate) override;

  // gemm.cpp
  void gemm(Tensor& c, std::span<const GemmTerm> terms, const Tensor& addend,
            const Tensor& bias) override;

  // embedding.cpp
  void embedding_forward(Tensor& y, const Tensor& ids, const Tensor& weight) override;
  void embedding_backward(Tensor& dweight, const Tensor& ids, const Tensor& dy) override;
  void gather_rows(Tensor& dst, const Tensor& src, const Tensor& indices) override;
  void scatter_add_rows(Tensor& dst, const Tensor& src, const Tensor& indices) override;

  // rms_norm.cpp
  void rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                        double eps) override;
  void rms_norm_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                         const Tensor& weight, const Tensor& rstd) override;

  // rope.cpp
  void rope(Tensor& y, const Tensor& x, const Tensor& positions, const Tensor& cos_sin,
            int direction) override;

  // qk_norm_rope.cpp
  void qk_norm_rope_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                            double eps, const Tensor& positions, const Tensor& cos_sin) override;
  void qk_norm_rope_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                             const Tensor& weight, const Tensor& rstd, const Tensor& positions,
                             const Tensor& cos_sin) override;

  // attention.cpp
  void attention_forward(Tensor& out, Tensor& lse, const Tensor& q, const Tensor& k,
                         const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                         double scale) override;
  void attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& dout, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                          const Tensor& cu_seqlens, double scale) override;

  // swiglu.cpp
  void swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up) override;
  void swiglu_backward(Tensor& dgate, Tensor& dup, const Tensor& dy, const Tensor& gate,
                       const Tensor& up) override;

  // dora.cpp
  void dora_scale(Tensor& y, const Tensor& h, const DoraScale& dora, const Tensor& bias,
                  bool accumulate) override;
  void dora_scale_backward(Tensor& dh, Tensor& dmagnitude, const Tensor& dy, const Tensor& h,
                           const DoraScale& dora, bool of_scaled) override;
  void dora_swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up,
                           const DoraScale& of_gate, const DoraScale& of_up) override;
  void dora_swiglu_backward(Tensor& dgate, Tensor& dup, Tensor& dgate_magnitude,
                            Tensor& dup_magnitude, const Tensor& dy, const Tensor& gate,
                            const Tensor& up, const DoraScale& of_gate,
                            const DoraScale& of_up) override;
  void row_squares(Tensor& squares, const Tensor& w) override;
  void dora_norms(std::span<const DoraNorm> layers) override;

  // cross_entropy.cpp
  void cross_entropy(Tensor& losses, Tensor& logits, const Tensor& labels, double scale,
                     bool with_gradient) override;

  // argmax.cpp
  void argmax_rows(Tensor& indices, const Tensor& x) override;

  // dropout.cpp
  void dropout(Tensor& y, const Tensor& x, double p, const DropoutKey& key,
               bool accumulate) override;

  // adamw.cpp
  void sum_of_squares(Tensor& total, const Tensor& x) override;
  void clip_factor(Tensor& outcome, double max_norm) override;
  void adamw(Tensor& parameter, Tensor& m, Tensor& v, const Tensor& gradient,
             const Tensor& grad_scale, const AdamWStep& step) override;
  void adamw_8bit(Tensor& parameter, State8& m, State8& v, const Tensor& gradient,
                  const Tensor& grad_scale, const AdamWStep& step) override;
};

}  // namespace graft
