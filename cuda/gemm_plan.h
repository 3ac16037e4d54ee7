// Products by cublasLt: descriptors and an algorithm for each shape, made at the first product of
// that shape and kept. Read cuda/gemm.cu first, which calls this and knows what to do without it.
#pragma once

#include <compare>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "cuda/blas.h"
#include "cuda/gemm_plan_file.h"
#include "tensor/backend.h"

namespace graft {

// All that the choice of an algorithm depends on: row-major c (m, n) = addend + op(a) op(b) + bias.
struct GemmKey {
  int64_t m = 0, n = 0, k = 0;
  int64_t stride_a = 0, stride_b = 0, stride_c = 0, stride_addend = 0;  // of rows, in elements
  bool transpose_a = false, transpose_b = false, has_bias = false;
  DType operands = DType::F32, result = DType::F32;
  // Of the pointers, in bytes, at most 256: a slice of columns is less aligned than a tensor.
  int32_t align_a = 0, align_b = 0, align_c = 0, align_addend = 0;

  auto operator<=>(const GemmKey&) const = default;
  std::string text() const;  // its name in a plan file
};

class GemmPlans {
 public:
  // Everything runs on `stream`, and any algorithm may overwrite `workspace`.
  GemmPlans(const CublasLtFunctions* functions, cudaStream_t stream, Tensor workspace);
  ~GemmPlans();
  GemmPlans(const GemmPlans&) = delete;

  // c = addend + alpha op(a) op(b) + bias, rounded once; a and b of one dtype. addend of c's dtype:
  // c itself, or apart from it, or undefined; bias (n) dense and of c's dtype, or undefined.
  // False, and nothing done, where cublasLt is absent, switched off, or has no algorithm for it.
  bool multiply(Tensor& c, const GemmTerm& term, const Tensor& addend, const Tensor& bias);

  // From here on the choices in `path` hold, where they were made for `device` and this cublasLt;
  // with `tune`, shapes that it lacks are chosen by timing and added to it. Without a file (an
  // empty path) the choice is the library's first, which the shape alone decides. Drops all plans.
  //   say  gets one line where a file was left out, and why, or where there is nothing to time
  void use_file(const std::string& path, const std::string& device, bool tune,
                const std::function<void(const std::string&)>& say);

  void set_enabled(bool enabled) { enabled_ = enabled; }  // off: multiply() declines
  int64_t num_plans() const { return int64_t(plans_.size()); }
  int64_t num_timed() const { return num_timed_; }  // shapes whose candidates were timed

 private:
  struct Plan;
  struct Operands;
  Plan& plan_for(const GemmKey& key, const Operands& operands);
  bool usable() const { return enabled_ && handle_; }
  void choose(Plan& plan, const GemmKey& key, const Operands& operands);
  int fastest(Plan& plan, const GemmKey& key, const Operands& operands, double* microseconds);
  cublasStatus_t run(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                     const Operands& operands);
  bool capturing() const;

  const CublasLtFunctions* lt_;
  cudaStream_t stream_;
  Tensor workspace_;
  cublasLtHandle_t handle_ = nullptr;
  bool enabled_ = true, tune_ = false;
  int64_t num_timed_ = 0;
  std::unique_ptr<GemmPlanFile> file_;
  std::map<GemmKey, std::unique_ptr<Plan>> plans_;
};

}  // namespace graft
