// The backend of Device::Meta: every kernel does nothing. A training step on it allocates what a
// real step would allocate, and so predicts the memory that the step will take.
#pragma once

#include "tensor/backend.h"

namespace graft {

class MetaBackend final : public Backend {
 public:
  std::string describe() const override { return "meta (no values, memory is only counted)"; }
  void fill(Tensor&, double) override {}
  void copy(Tensor&, const Tensor&) override {}
  void copy_scaled(std::span<const ScaledCopy>) override {}
  void add(Tensor&, const Tensor&, const Tensor&) override {}
  void axpy(Tensor&, const Tensor&, double) override {}
  void scale(Tensor&, const Tensor&, double) override {}
  void scale_by(Tensor&, const Tensor&, const Tensor&) override {}
  void add_sum(Tensor&, const Tensor&, double) override {}
  void gemm(Tensor&, std::span<const GemmTerm>, const Tensor&, const Tensor&) override {}
  void sum_rows(Tensor&, const Tensor&, bool) override {}
  void embedding_forward(Tensor&, const Tensor&, const Tensor&) override {}
  void embedding_backward(Tensor&, const Tensor&, const Tensor&) override {}
  void rms_norm_forward(Tensor&, Tensor&, const Tensor&, const Tensor&, double) override {}
  void rms_norm_backward(Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         const Tensor&) override {}
  void rope(Tensor&, const Tensor&, const Tensor&, const Tensor&, int) override {}
  void qk_norm_rope_forward(Tensor&, Tensor&, const Tensor&, const Tensor&, double, const Tensor&,
                            const Tensor&) override {}
  void qk_norm_rope_backward(Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&,
                             const Tensor&, const Tensor&, const Tensor&) override {}
  void attention_forward(Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         const Tensor&, const Tensor&, double) override {}
  void attention_backward(Tensor&, Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          double) override {}
  void swiglu_forward(Tensor&, const Tensor&, const Tensor&) override {}
  void swiglu_backward(Tensor&, Tensor&, const Tensor&, const Tensor&, const Tensor&) override {}
  void dora_scale(Tensor&, const Tensor&, const DoraScale&, const Tensor&, bool) override {}
  void dora_scale_backward(Tensor&, Tensor&, const Tensor&, const Tensor&, const DoraScale&,
                           bool) override {}
  void dora_swiglu_forward(Tensor&, const Tensor&, const Tensor&, const DoraScale&,
                           const DoraScale&) override {}
  void dora_swiglu_backward(Tensor&, Tensor&, Tensor&, Tensor&, const Tensor&, const Tensor&,
                            const Tensor&, const DoraScale&, const DoraScale&) override {}
  void row_squares(Tensor&, const Tensor&) override {}
  void dora_norms(std::span<const DoraNorm>) override {}
  void cross_entropy(Tensor&, Tensor&, const Tensor&, double, bool) override {}
  void argmax_rows(Tensor&, const Tensor&) override {}
  void gather_rows(Tensor&, const Tensor&, const Tensor&) override {}
  void scatter_add_rows(Tensor&, const Tensor&, const Tensor&) override {}
  void dropout(Tensor&, const Tensor&, double, const DropoutKey&, bool) override {}
  void sum_of_squares(Tensor&, const Tensor&) override {}
  void clip_factor(Tensor&, double) override {}
  void adamw(Tensor&, Tensor&, Tensor&, const Tensor&, const Tensor&, const AdamWStep&) override {}
  void adamw_8bit(Tensor&, State8&, State8&, const Tensor&, const Tensor&,
                  const AdamWStep&) override {}
};

}  // namespace graft
