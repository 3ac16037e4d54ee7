#include "cuda/gemm_plan.h"

#include <algorithm>
#include <vector>

#include "cuda/gpu.cuh"

namespace graft {
namespace {

constexpr int kCandidates = 8;  // that are timed
constexpr int kRepeats = 3;     // of each; the shortest counts

cudaDataType data_type(DType dtype) { return dtype == DType::F32 ? CUDA_R_32F : CUDA_R_16BF; }

int32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t lowest_bit = address & (~address + 1);
  return int32_t(address == 0 || lowest_bit > 256 ? 256 : lowest_bit);
}

// A row that stands alone may have any stride, so take one that is allowed.
int64_t stride_of(const Tensor& t) { return t.num_rows() <= 1 ? t.cols() : t.row_stride(); }

void check_lt(const char* call, cublasStatus_t status) {
  CHECK(status == CUBLAS_STATUS_SUCCESS, cublas_error(call, status));
}

}  // namespace

std::string GemmKey::text() const {
  return concat(dtype_name(operands), " ", m, "x", n, "x", k, " to ", dtype_name(result),
                transpose_a ? " ta" : "", transpose_b ? " tb" : "", has_bias ? " bias" : "",
                " strides ", stride_a, ",", stride_b, ",", stride_c, ",", stride_addend, " align ",
                align_a, ",", align_b, ",", align_c, ",", align_addend);
}

// Column-major names, as cublasLt has them: its D^T is our c, so its A is our b and its B our a.
struct GemmPlans::Operands {
  const void *a, *b, *c;  // c: what the product is added to; any pointer where beta is 0
  void* d;
  const void* bias;
  float alpha, beta;
};

struct GemmPlans::Plan {
  explicit Plan(const CublasLtFunctions* functions) : lt(functions) {}
  ~Plan() {
    for (cublasLtMatrixLayout_t layout : {a, b, c, d})
      if (layout) lt->destroy_layout(layout);
    if (desc) lt->destroy_desc(desc);
  }
  Plan(const Plan&) = delete;

  const CublasLtFunctions* lt;
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr, d = nullptr;
  std::vector<cublasLtMatmulAlgo_t> candidates;  // the library's best guess first
  int chosen = -1;                               // -1: there is none
};

GemmPlans::GemmPlans(const CublasLtFunctions* functions, cudaStream_t stream, Tensor workspace)
    : lt_(functions), stream_(stream), workspace_(std::move(workspace)) {
  if (lt_) check_lt("cublasLtCreate", lt_->create(&handle_));
}

GemmPlans::~GemmPlans() = default;  // the handle lives as long as the process

bool GemmPlans::capturing() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CUDA_CHECK(cudaStreamIsCapturing(stream_, &status));
  return status != cudaStreamCaptureStatusNone;
}

cublasStatus_t GemmPlans::run(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                              const Operands& o) {
  if (o.bias)
    check_lt("cublasLtMatmulDescSetAttribute",
             lt_->set_desc(plan.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &o.bias, sizeof o.bias));
  return lt_->matmul(handle_, plan.desc, &o.alpha, o.a, plan.a, o.b, plan.b, &o.beta, o.c, plan.c,
                     o.d, plan.d, &algorithm, workspace_.raw(), size_t(workspace_.num_bytes()),
                     stream_);
}

// The candidate that takes the least time. Results go to a tensor of their own, for c may be what
// the product is added to.
int GemmPlans::fastest(Plan& plan, const GemmKey& key, const Operands& operands,
                       double* microseconds) {
  const Tensor scratch =
      Tensor::empty({key.m, key.stride_c}, key.result, Device::CUDA, Scope::Scratch);
  Operands apart = operands;
  apart.d = scratch.raw();
  if (operands.beta == 0) apart.c = apart.d;
  cudaEvent_t start = nullptr, end = nullptr;
  CUDA_CHECK(cudaEventCreate(&start));
  CUDA_CHECK(cudaEventCreate(&end));
  int best = -1;
  for (int i = 0; i < int(plan.candidates.size()); ++i) {
    bool works = true;
    for (int repeat = 0; repeat <= kRepeats && works; ++repeat) {  // the first warms up
      CUDA_CHECK(cudaEventRecord(start, stream_));
      works = run(plan, plan.candidates[size_t(i)], apart) == CUBLAS_STATUS_SUCCESS;
      CUDA_CHECK(cudaEventRecord(end, stream_));
      CUDA_CHECK(cudaEventSynchronize(end));
      float milliseconds = 0;
      CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start, end));
      if (!works || repeat == 0) continue;
      if (best < 0 || milliseconds * 1e3 < *microseconds) {
        best = i;
        *microseconds = milliseconds * 1e3;
      }
    }
  }
  CUDA_CHECK(cudaEventDestroy(start));
  CUDA_CHECK(cudaEventDestroy(end));
  ++num_timed_;
  return best;
}

// By the plan file, else by timing where asked for, else the first.
void GemmPlans::choose(Plan& plan, const GemmKey& key, const Operands& operands) {
  if (plan.candidates.empty()) return;
  plan.chosen = 0;
  if (!file_) return;
  const std::string name = key.text();
  if (const auto kept = file_->find(name); kept && *kept < int(plan.candidates.size())) {
    plan.chosen = *kept;
  } else if (tune_ && !capturing()) {  // events cannot be read while work is recorded
    double microseconds = 0;
    int best = -1;
    try {
      best = fastest(plan, key, operands, &microseconds);
    } catch (const OutOfMemory&) {
      // No room for a second result to time with: the first, and nothing to keep.
    }
    if (best < 0) return;
    plan.chosen = best;
    file_->add(name, {best, microseconds});
  }
}

GemmPlans::Plan& GemmPlans::plan_for(const GemmKey& key, const Operands& operands) {
  if (const auto found = plans_.find(key); found != plans_.end()) return *found->second;
  auto plan = std::make_unique<Plan>(lt_);
  check_lt("cublasLtMatmulDescCreate",
           lt_->create_desc(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    check_lt("cublasLtMatmulDescSetAttribute",
             lt_->set_desc(plan->desc, attribute, &value, sizeof value));
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, key.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_TRANSB, key.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (key.has_bias) set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  // A row-major matrix is a column-major one of as many rows as it has columns.
  const auto layout = [&](cublasLtMatrixLayout_t& to, DType dtype, int64_t rows, int64_t cols,
                          int64_t stride) {
    check_lt("cublasLtMatrixLayoutCreate",
             lt_->create_layout(&to, data_type(dtype), uint64_t(cols), uint64_t(rows), stride));
  };
  layout(plan->a, key.operands, key.transpose_b ? key.n : key.k, key.transpose_b ? key.k : key.n,
         key.stride_b);
  layout(plan->b, key.operands, key.transpose_a ? key.k : key.m, key.transpose_a ? key.m : key.k,
         key.stride_a);
  layout(plan->c, key.result, key.m, key.n, key.stride_addend);
  layout(plan->d, key.result, key.m, key.n, key.stride_c);

  cublasLtMatmulPreference_t preference = nullptr;
  check_lt("cublasLtMatmulPreferenceCreate", lt_->create_preference(&preference));
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check_lt("cublasLtMatmulPreferenceSetAttribute",
             lt_->set_preference(preference, attribute, &value, sizeof value));
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(workspace_.num_bytes()));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.align_b);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.align_a);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.align_addend);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.align_c);
  cublasLtMatmulHeuristicResult_t results[kCandidates];
  int found = 0;
  const cublasStatus_t status =
      lt_->find_algorithms(handle_, plan->desc, plan->a, plan->b, plan->c, plan->d, preference,
                           kCandidates, results, &found);
  lt_->destroy_preference(preference);
  for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < found; ++i)
    if (results[i].state == CUBLAS_STATUS_SUCCESS) plan->candidates.push_back(results[i].algo);
  choose(*plan, key, operands);
  return *plans_.emplace(key, std::move(plan)).first->second;
}

bool GemmPlans::multiply(Tensor& c, const GemmTerm& term, const Tensor& addend,
                         const Tensor& bias) {
  const Tensor &a = term.a, &b = term.b;
  if (!usable()) return false;
  if (bias.defined() && (bias.dtype() != c.dtype() || !bias.is_contiguous())) return false;
  const Tensor& before = addend.defined() ? addend : c;
  const GemmKey key{.m = c.num_rows(),
                    .n = c.cols(),
                    .k = term.transpose_a ? a.num_rows() : a.cols(),
                    .stride_a = stride_of(a),
                    .stride_b = stride_of(b),
                    .stride_c = stride_of(c),
                    .stride_addend = stride_of(before),
                    .transpose_a = term.transpose_a,
                    .transpose_b = term.transpose_b,
                    .has_bias = bias.defined(),
                    .operands = a.dtype(),
                    .result = c.dtype(),
                    .align_a = alignment_of(a.raw()),
                    .align_b = alignment_of(b.raw()),
                    .align_c = alignment_of(c.raw()),
                    .align_addend = alignment_of(before.raw())};
  const Operands operands{b.raw(),
                          a.raw(),
                          before.raw(),
                          c.raw(),
                          bias.defined() ? bias.raw() : nullptr,
                          float(term.alpha),
                          addend.defined() ? 1.0f : 0.0f};
  const Plan& plan = plan_for(key, operands);
  if (plan.chosen < 0) return false;
  const cublasStatus_t status = run(plan, plan.candidates[size_t(plan.chosen)], operands);
  CHECK(status == CUBLAS_STATUS_SUCCESS, cublas_error("cublasLtMatmul", status), " for ",
        key.text());
  return true;
}

void GemmPlans::use_file(const std::string& path, const std::string& device, bool tune,
                         const std::function<void(const std::string&)>& say) {
  plans_.clear();
  file_.reset();
  tune_ = tune && lt_;
  if (tune && !lt_) say("tune: there is no cublasLt here, so that nothing is to be timed");
  if (!path.empty() && lt_)
    file_ = std::make_unique<GemmPlanFile>(path, device, lt_->version(), say);
}

}  // namespace graft
