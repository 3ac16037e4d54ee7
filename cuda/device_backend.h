// The class behind cuda_backend(): the methods of tensor/backend.h, each implemented in the .cu
// file that has its kernels (the stem is that of cpu/reference/). Everything runs in order on one
// stream; no method waits for the device, except those that copy to the host.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <memory>
#include <vector>

#include "cuda/blas.h"
#include "cuda/gemm_plan.h"
#include "cuda/staging.h"
#include "tensor/backend.h"

namespace graft {

struct AdamWConstants;  // step_scalars.h
struct StepScalars;

// Whether this binary holds machine code of the device's architecture, or PTX for it.
// elementwise.cu
bool has_code_for_device();

class CudaBackend final : public Backend {
 public:
  CudaBackend();
  ~CudaBackend() override;
  std::string describe() const override;
  cudaStream_t stream() const { return stream_; }
  GemmPlans& plans() { return *plans_; }
  // Products by cuBLAS, or by own_gemm.h; at first as cuda_has_cublas() says. Error where it is
  // wanted and there is none.
  void use_cublas(bool use);
  bool uses_cublas() const { return uses_cublas_; }

  // elementwise.cu
  void fill(Tensor& dst, double value) override;
  void copy(Tensor& dst, const Tensor& src) override;  // also from and to CPU tensors
  void add(Tensor& y, const Tensor& a, const Tensor& b) override;
  void axpy(Tensor& y, const Tensor& x, double alpha) override;
  void scale(Tensor& y, const Tensor& x, double alpha) override;
  void scale_by(Tensor& y, const Tensor& x, const Tensor& factor) override;
  void add_sum(Tensor& total, const Tensor& x, double alpha) override;
  void sum_rows(Tensor& db, const Tensor& dy, bool accumulate) override;

  // copy_scaled.cu
  void copy_scaled(std::span<const ScaledCopy> copies) override;

  // gemm.cu (over blas.h or own_gemm.h)
  void gemm(Tensor& c, std::span<const GemmTerm> terms, const Tensor& addend,
            const Tensor& bias) override;

  // embedding.cu
  void embedding_forward(Tensor& y, const Tensor& ids, const Tensor& weight) override;
  void embedding_backward(Tensor& dweight, const Tensor& ids, const Tensor& dy) override;
  void gather_rows(Tensor& dst, const Tensor& src, const Tensor& indices) override;
  void scatter_add_rows(Tensor& dst, const Tensor& src, const Tensor& indices) override;

  // rms_norm.cu
  void rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                        double eps) override;
  void rms_norm_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                         const Tensor& weight, const Tensor& rstd) override;

  // rope.cu
  void rope(Tensor& y, const Tensor& x, const Tensor& positions, const Tensor& cos_sin,
            int direction) override;

  // qk_norm_rope.cu
  void qk_norm_rope_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                            double eps, const Tensor& positions, const Tensor& cos_sin) override;
  void qk_norm_rope_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                             const Tensor& weight, const Tensor& rstd, const Tensor& positions,
                             const Tensor& cos_sin) override;

  // attention.cu
  void attention_forward(Tensor& out, Tensor& lse, const Tensor& q, const Tensor& k,
                         const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                         double scale) override;
  void attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& dout, const Tensor& q,
                          const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                          const Tensor& cu_seqlens, double scale) override;

  // attention_tiles.cpp; see attention.h
  Tensor tile_list(const Tensor& cu_q, const Tensor& cu_k, int rows, bool over_keys);

  // swiglu.cu
  void swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up) override;
  void swiglu_backward(Tensor& dgate, Tensor& dup, const Tensor& dy, const Tensor& gate,
                       const Tensor& up) override;

  // dora.cu, dora_norms.cu
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

  // cross_entropy.cu
  void cross_entropy(Tensor& losses, Tensor& logits, const Tensor& labels, double scale,
                     bool with_gradient) override;

  // argmax.cu
  void argmax_rows(Tensor& indices, const Tensor& x) override;

  // dropout.cu
  void dropout(Tensor& y, const Tensor& x, double p, const DropoutKey& key,
               bool accumulate) override;

  // adamw.cu
  void sum_of_squares(Tensor& total, const Tensor& x) override;
  void clip_factor(Tensor& outcome, double max_norm) override;
  void adamw(Tensor& parameter, Tensor& m, Tensor& v, const Tensor& gradient,
             const Tensor& grad_scale, const AdamWStep& step) override;

  // adamw_8bit.cu
  void adamw_8bit(Tensor& parameter, State8& m, State8& v, const Tensor& gradient,
                  const Tensor& grad_scale, const AdamWStep& step) override;

  // captured_step.cpp
  std::unique_ptr<CapturedStep> capture(const std::function<void()>& step) override;
  // Copies to the device what the kernels started next will read; `from` may then be changed.
  void upload(void* device, const void* from, size_t bytes);

 private:
  void open_cublas(const CublasFunctions& cublas);

  // A device copy of an I32 tensor that may lie on the CPU (token ids, cu_seqlens); a tensor that
  // is on the device already is returned as it is. elementwise.cu.
  Tensor on_device(const Tensor& indices);

  // Where the kernels of a step that is being captured find its scalars; null at other times.
  const StepScalars* captured_scalars() const;
  const AdamWConstants* captured_adamw(const AdamWStep& step) const;

  // The weight in `dtype`: itself, a copy, or NF4 widened, which lasts until the next NF4 weight.
  // nf4.cu.
  Tensor widened(const Tensor& weight, DType dtype);

  // One product of a gemm; addend and bias as there. gemm.cu.
  void add_product(Tensor& c, const GemmTerm& term, const Tensor& addend, const Tensor& bias);
  // c = beta c + alpha op(a) op(b) by cublasGemmEx, or by own_gemm; a and b of one dtype.
  void add_product_in_place(Tensor& c, const GemmTerm& term, float beta);

  struct TileList {
    std::weak_ptr<Storage> cu_q, cu_k;  // the list goes some time after one of these
    const void *place_q, *place_k;
    int rows;
    bool over_keys;
    Tensor tiles;
  };

  cudaStream_t stream_ = nullptr;
  Staging staging_{nullptr};
  cudaStream_t side_stream_ = nullptr;  // for uploads while stream_ is captured
  bool capturing_ = false;
  Tensor scalars_;  // one StepScalars, read by captured steps
  bool uses_cublas_ = false;
  cublasHandle_t cublas_ = nullptr;  // null where there is no cuBLAS
  Tensor workspace_;                 // cuBLAS's and cublasLt's: all products run on one stream
  std::unique_ptr<GemmPlans> plans_;
  std::vector<TileList> tile_lists_;
  std::vector<Tensor> nf4_scratch_[2];  // F32, BF16: the last is in use
  Tensor dynamic_maps_;                 // (2, 256): signed, unsigned; made when first wanted
  int64_t most_nf4_elements_ = 0;       // of a weight that was copied here
};

}  // namespace graft
