// The fast CPU backend, F32 and BF16: cuts each kernel into pieces for the thread pool and runs the
// inner loops of one instruction set (kernels/table.h) on them. Pieces are fixed by the shapes
// alone, and partial sums are combined in the order of the pieces, so the bytes that come out do
// not depend on the number of threads. reference/ has the same kernels as plain loops.
#pragma once

#include "tensor/backend.h"

namespace graft {

struct CpuKernels;

class CpuBackend : public Backend {
 public:
  // The kernels of cpu_choice(), or others (tests). They must outlive the backend.
  CpuBackend();
  explicit CpuBackend(const CpuKernels& kernels) : kernels_(kernels) {}

  std::string describe() const override;
  void fill(Tensor& dst, double value) override;
  void copy(Tensor& dst, const Tensor& src) override;
  void copy_scaled(std::span<const ScaledCopy> copies) override;
  void add(Tensor& y, const Tensor& a, const Tensor& b) override;
  void axpy(Tensor& y, const Tensor& x, double alpha) override;
  void scale(Tensor& y, const Tensor& x, double alpha) override;
  void scale_by(Tensor& y, const Tensor& x, const Tensor& factor) override {
    scale(y, x, factor.item());
  }
  void add_sum(Tensor& total, const Tensor& x, double alpha) override;
  void gemm(Tensor& c, std::span<const GemmTerm> terms, const Tensor& addend = {},
            const Tensor& bias = {}) override;
  void sum_rows(Tensor& db, const Tensor& dy, bool accumulate) override;
  void embedding_forward(Tensor& y, const Tensor& ids, const Tensor& weight) override;
  void embedding_backward(Tensor& dweight, const Tensor& ids, const Tensor& dy) override;
  void rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                        double eps) override;
  void rms_norm_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                         const Tensor& weight, const Tensor& rstd) override;
  void rope(Tensor& y, const Tensor& x, const Tensor& positions, const Tensor& cos_sin,
            int direction) override;
  void qk_norm_rope_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                            double eps, const Tensor& positions, const Tensor& cos_sin) override;
  void qk_norm_rope_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                             const Tensor& weight, const Tensor& rstd, const Tensor& positions,
                             const Tensor& cos_sin) override;
  void attention_forward(Tensor& out, Tensor& lse, const Tensor& q, const Tensor& k,
                         const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                         double scale) override;
  void attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& dout, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                          const Tensor& cu_seqlens, double scale) override;
  void swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up) override;
  void swiglu_backward(Tensor& dgate, Tensor& dup, const Tensor& dy, const Tensor& gate,
                       const Tensor& up) override;
  // cpu_dora.cpp
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
  void cross_entropy(Tensor& losses, Tensor& logits, const Tensor& labels, double scale,
                     bool with_gradient) override;
  void argmax_rows(Tensor& indices, const Tensor& x) override;
  void gather_rows(Tensor& dst, const Tensor& src, const Tensor& indices) override;
  void scatter_add_rows(Tensor& dst, const Tensor& src, const Tensor& indices) override;
  void dropout(Tensor& y, const Tensor& x, double p, const DropoutKey& key,
               bool accumulate) override;
  void sum_of_squares(Tensor& total, const Tensor& x) override;
  void clip_factor(Tensor& outcome, double max_norm) override;
  void adamw(Tensor& parameter, Tensor& m, Tensor& v, const Tensor& gradient,
             const Tensor& grad_scale, const AdamWStep& step) override;
  void adamw_8bit(Tensor& parameter, State8& m, State8& v, const Tensor& gradient,
                  const Tensor& grad_scale, const AdamWStep& step) override;

 private:
  Tensor weight_as_f32(const Tensor& weight);
  // dst[indices[i]] += src[i], in the order of i
  void add_rows_at(Tensor& dst, const Tensor& src, const Tensor& indices);

  const CpuKernels& kernels_;
};

// Bytes of scratch (Scope::Scratch) that attention takes while it runs: the packed keys and values,
// and in the backward the gradients of keys and values per query head. For the memory plan.
int64_t cpu_kernel_scratch_bytes(int64_t num_tokens, int64_t heads, int64_t kv_heads,
                                 int64_t head_dim, bool backward);

}  // namespace graft
