// The cuBLAS and cuBLASLt stand-ins against a naive product in double: every type, transposition,
// stride, batch and algorithm; and what they refuse, as the libraries do.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "tests/cuda/support.h"

namespace graft {
namespace {

template <class T>
constexpr cudaDataType kType = CUDA_R_32F;
template <>
constexpr cudaDataType kType<__nv_bfloat16> = CUDA_R_16BF;
template <>
constexpr cudaDataType kType<__half> = CUDA_R_16F;
// One rounding of the result, and sums of twenty products in F32.
template <class T>
constexpr double kTolerance = 1e-5;
template <>
constexpr double kTolerance<__nv_bfloat16> = 1.0 / 256;
template <>
constexpr double kTolerance<__half> = 1.0 / 2048;

double to_double(float x) { return x; }
double to_double(__nv_bfloat16 x) { return __bfloat162float(x); }
double to_double(__half x) { return __half2float(x); }
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half(x);
  else
    return T(x);
}

// A batch of column-major matrices with room between columns and between matrices.
template <class T>
struct Batch {
  int rows, cols, ld, count;
  long long stride;
  std::vector<T> values;
  DeviceArray<T> device;

  static std::vector<T> draw(size_t n, unsigned seed) {
    std::vector<T> v;
    for (float x : random_values<float>(n, seed)) v.push_back(from_float<T>(x));
    return v;
  }
  Batch(int r, int c, int batch, unsigned seed)
      : rows(r),
        cols(c),
        ld(r + 3),
        count(batch),
        stride((r + 3) * c + 5),
        values(draw(static_cast<size_t>(stride * batch), seed)),
        device(values) {}
  size_t at(int i, int row, int col) const {
    return static_cast<size_t>(i * stride + col * ld + row);
  }
};

struct Case {
  bool ta, tb, bias;
  float alpha, beta;
  int batch;
};

// What d must be, and that nothing between its columns has changed.
template <class In, class Out>
void expect_product(const std::vector<Out>& got, const Batch<In>& a, const Batch<In>& b,
                    const Batch<Out>& c, const Batch<Out>& d, const std::vector<Out>& bias,
                    const Case& t, const std::string& what) {
  std::vector<Out> want = d.values;
  double worst = 0;
  std::vector<bool> written(want.size());
  for (int i = 0; i < t.batch; ++i)
    for (int row = 0; row < d.rows; ++row)
      for (int col = 0; col < d.cols; ++col) {
        double sum = 0;
        for (int k = 0; k < (t.ta ? a.rows : a.cols); ++k)
          sum += to_double(a.values[t.ta ? a.at(i, k, row) : a.at(i, row, k)]) *
                 to_double(b.values[t.tb ? b.at(i, col, k) : b.at(i, k, col)]);
        double value = t.alpha * sum + t.beta * to_double(c.values[c.at(i, row, col)]);
        if (t.bias) value += to_double(bias[static_cast<size_t>(row)]);
        const size_t at = d.at(i, row, col);
        written[at] = true;
        const double error = std::abs(to_double(got[at]) - value) / (1 + std::abs(value));
        worst = error <= worst ? worst : error;
      }
  EXPECT_LE(worst, kTolerance<Out>) << what;
  for (size_t at = 0; at < want.size(); ++at)
    if (!written[at]) {
      ASSERT_EQ(to_double(got[at]), to_double(want[at])) << what << ", at " << at;
    }
}

constexpr int kM = 13, kN = 7, kK = 20;
constexpr size_t kWorkspace = 256 << 10;

// Owns the descriptors of one product.
struct Plan {
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr, d = nullptr;

  Plan(cublasComputeType_t compute = CUBLAS_COMPUTE_32F, uint64_t workspace = kWorkspace) {
    EXPECT_EQ(cublasLtCreate(&handle), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtMatmulDescCreate(&desc, compute, CUDA_R_32F), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtMatmulPreferenceCreate(&preference), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &workspace, sizeof workspace),
        CUBLAS_STATUS_SUCCESS);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    for (auto layout : {a, b, c, d})
      if (layout) cublasLtMatrixLayoutDestroy(layout);
    cublasLtMatmulPreferenceDestroy(preference);
    cublasLtMatmulDescDestroy(desc);
    cublasLtDestroy(handle);
  }
  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, T value) {
    EXPECT_EQ(cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value),
              CUBLAS_STATUS_SUCCESS);
  }
  template <class T>
  void layout(cublasLtMatrixLayout_t& l, const Batch<T>& m) {
    if (l) cublasLtMatrixLayoutDestroy(l);
    ASSERT_EQ(cublasLtMatrixLayoutCreate(&l, kType<T>, uint64_t(m.rows), uint64_t(m.cols), m.ld),
              CUBLAS_STATUS_SUCCESS);
    const int32_t count = m.count;
    const int64_t stride = m.stride;
    EXPECT_EQ(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, 4),
              CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                               &stride, 8),
              CUBLAS_STATUS_SUCCESS);
  }
  std::vector<cublasLtMatmulHeuristicResult_t> algos(
      cublasStatus_t expected = CUBLAS_STATUS_SUCCESS) {
    std::vector<cublasLtMatmulHeuristicResult_t> results(8);
    int found = 0;
    EXPECT_EQ(cublasLtMatmulAlgoGetHeuristic(handle, desc, a, b, c, d, preference, 8,
                                             results.data(), &found),
              expected);
    results.resize(size_t(found));
    return results;
  }
};

template <class In, class Out>
void check_lt(const Case& t) {
  const Batch<In> a(t.ta ? kK : kM, t.ta ? kM : kK, t.batch, 1),
      b(t.tb ? kN : kK, t.tb ? kK : kN, t.batch, 2);
  const Batch<Out> c(kM, kN, t.batch, 3), d(kM, kN, t.batch, 4);
  const std::vector<Out> bias = Batch<Out>::draw(kM, 5);
  DeviceArray<Out> device_bias(bias);
  DeviceArray<char> workspace(kWorkspace);
  Plan plan;
  plan.set(CUBLASLT_MATMUL_DESC_TRANSA, t.ta ? CUBLAS_OP_T : CUBLAS_OP_N);
  plan.set(CUBLASLT_MATMUL_DESC_TRANSB, t.tb ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (t.bias) {
    plan.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(device_bias.get()));
    plan.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t(kType<Out>));
  }
  plan.layout(plan.a, a);
  plan.layout(plan.b, b);
  plan.layout(plan.c, c);
  plan.layout(plan.d, d);
  const auto algos = plan.algos();
  ASSERT_GE(algos.size(), 2u);
  for (const auto& algo : algos) {
    ASSERT_EQ(algo.state, CUBLAS_STATUS_SUCCESS);
    ASSERT_EQ(cudaMemcpy(d.device.get(), d.values.data(), d.values.size() * sizeof(Out),
                         cudaMemcpyHostToDevice),
              cudaSuccess);
    ASSERT_EQ(
        cublasLtMatmul(plan.handle, plan.desc, &t.alpha, a.device.get(), plan.a, b.device.get(),
                       plan.b, &t.beta, c.device.get(), plan.c, d.device.get(), plan.d, &algo.algo,
                       workspace.get(), algo.workspaceSize, nullptr),
        CUBLAS_STATUS_SUCCESS);
    expect_product(d.device.host(), a, b, c, d, bias, t,
                   "types " + std::to_string(kType<In>) + ", " + std::to_string(kType<Out>) +
                       ", transposed " + std::to_string(t.ta) + std::to_string(t.tb));
  }
}

template <class In, class Out>
void check_all_lt() {
  for (bool ta : {false, true})
    for (bool tb : {false, true})
      for (bool bias : {false, true}) {
        check_lt<In, Out>({ta, tb, bias, 1, 0, 1});
        check_lt<In, Out>({ta, tb, bias, -0.5f, 2, 3});
      }
}

TEST(CublasLt, MultipliesF32) { check_all_lt<float, float>(); }
TEST(CublasLt, MultipliesBf16) {
  check_all_lt<__nv_bfloat16, __nv_bfloat16>();
  check_all_lt<__nv_bfloat16, float>();
}
TEST(CublasLt, MultipliesF16) {
  check_all_lt<__half, __half>();
  check_all_lt<__half, float>();
}

// A plan of a (13, 20) times b (20, 7), which each test then spoils.
struct Small {
  Batch<__nv_bfloat16> a{kM, kK, 1, 1}, b{kK, kN, 1, 2}, d{kM, kN, 1, 3};
  DeviceArray<char> workspace{kWorkspace};
  Plan plan;
  float one = 1, zero = 0;

  Small() {
    plan.layout(plan.a, a);
    plan.layout(plan.b, b);
    plan.layout(plan.c, d);
    plan.layout(plan.d, d);
  }
  cublasStatus_t run(const cublasLtMatmulAlgo_t* algo, size_t workspace_bytes, int shift = 0) {
    return cublasLtMatmul(plan.handle, plan.desc, &one, a.device.get(), plan.a, b.device.get(),
                          plan.b, &zero, d.device.get(), plan.d, d.device.get() + shift, plan.d,
                          algo, workspace.get(), workspace_bytes, nullptr);
  }
};

TEST(CublasLt, AlgorithmsFitTheWorkspace) {
  Small s;
  const auto all = s.plan.algos();
  const uint64_t none = 0;
  ASSERT_EQ(cublasLtMatmulPreferenceSetAttribute(
                s.plan.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &none, 8),
            CUBLAS_STATUS_SUCCESS);
  const auto without = s.plan.algos();
  EXPECT_GT(all.size(), without.size());
  ASSERT_FALSE(without.empty());
  for (const auto& algo : without) EXPECT_EQ(algo.workspaceSize, 0u);
  for (const auto& algo : all) {
    EXPECT_EQ(s.run(&algo.algo, algo.workspaceSize), CUBLAS_STATUS_SUCCESS);
    if (algo.workspaceSize > 0) {
      EXPECT_EQ(s.run(&algo.algo, algo.workspaceSize - 1), CUBLAS_STATUS_INVALID_VALUE);
    }
  }
  EXPECT_EQ(s.run(nullptr, 0), CUBLAS_STATUS_SUCCESS);
}

TEST(CublasLt, WorkspaceIsOverwritten) {
  Small s;
  const auto algo = s.plan.algos()[0];
  ASSERT_GT(algo.workspaceSize, 0u);
  ASSERT_EQ(cudaMemset(s.workspace.get(), 0, kWorkspace), cudaSuccess);
  ASSERT_EQ(s.run(&algo.algo, algo.workspaceSize), CUBLAS_STATUS_SUCCESS);
  EXPECT_NE(s.workspace.host()[0], 0);
}

TEST(CublasLt, RefusesWhatTheLibraryRefuses) {
  {
    Small s;  // an algorithm for another transposition
    const auto algo = s.plan.algos()[1];
    Batch<__nv_bfloat16> at(kK, kM, 1, 1);
    s.plan.layout(s.plan.a, at);
    s.plan.set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    EXPECT_EQ(s.run(&algo.algo, 0), CUBLAS_STATUS_NOT_SUPPORTED);
  }
  {
    Small s;  // bf16 times f32
    s.plan.layout(s.plan.b, Batch<float>(kK, kN, 1, 2));
    s.plan.algos(CUBLAS_STATUS_NOT_SUPPORTED);
  }
  {
    Small s;  // a bias that is not of d's type
    s.plan.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    s.plan.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t(CUDA_R_32F));
    s.plan.algos(CUBLAS_STATUS_NOT_SUPPORTED);
  }
  {
    Small s;  // shapes that do not meet
    s.plan.layout(s.plan.b, Batch<__nv_bfloat16>(kK + 1, kN, 1, 2));
    s.plan.algos(CUBLAS_STATUS_INVALID_VALUE);
  }
  {
    Small s;
    const int64_t ld = kM - 1;
    cublasLtMatrixLayoutSetAttribute(s.plan.a, CUBLASLT_MATRIX_LAYOUT_LD, &ld, sizeof ld);
    s.plan.algos(CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_EQ(cublasLtMatrixLayoutSetAttribute(s.plan.a, CUBLASLT_MATRIX_LAYOUT_LD, &ld, 4),
              CUBLAS_STATUS_INVALID_VALUE);
  }
  Small s;
  EXPECT_EQ(s.run(nullptr, 0, 9), CUBLAS_STATUS_INVALID_VALUE);  // d runs past its allocation
}

TEST(CublasLt, RefusesToOverwriteAnOperand) {
  const int n = 8;
  Batch<float> square(n, n, 1, 1), other(n, n, 1, 2);
  Plan plan;
  for (auto* l : {&plan.a, &plan.b, &plan.c, &plan.d}) plan.layout(*l, square);
  const float one = 1, zero = 0;
  float* p = square.device.get();
  const auto run = [&](float* a, float* d) {
    return cublasLtMatmul(plan.handle, plan.desc, &one, a, plan.a, other.device.get(), plan.b,
                          &zero, d, plan.c, d, plan.d, nullptr, nullptr, 0, nullptr);
  };
  EXPECT_EQ(run(p, p), CUBLAS_STATUS_INVALID_VALUE);
  // Two slices of one buffer: rows 0-3 and 4-7 of each column.
  const uint64_t four = 4;
  for (auto l : {plan.a, plan.c, plan.d})
    cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_ROWS, &four, sizeof four);
  EXPECT_EQ(run(p, p + 4), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(run(p + 4, p), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(run(p, p + 3), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(run(p + 3, p), CUBLAS_STATUS_INVALID_VALUE);
}

template <class In, class Out>
void check_cublas(const Case& t) {
  const Batch<In> a(t.ta ? kK : kM, t.ta ? kM : kK, t.batch, 1),
      b(t.tb ? kN : kK, t.tb ? kK : kN, t.batch, 2);
  const Batch<Out> c(kM, kN, t.batch, 3);
  cublasHandle_t handle = nullptr;
  ASSERT_EQ(cublasCreate(&handle), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cublasGemmStridedBatchedEx(
                handle, t.ta ? CUBLAS_OP_T : CUBLAS_OP_N, t.tb ? CUBLAS_OP_T : CUBLAS_OP_N, kM, kN,
                kK, &t.alpha, a.device.get(), kType<In>, a.ld, a.stride, b.device.get(), kType<In>,
                b.ld, b.stride, &t.beta, c.device.get(), kType<Out>, c.ld, c.stride, t.batch,
                CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
            CUBLAS_STATUS_SUCCESS);
  expect_product(c.device.host(), a, b, c, c, {}, t, "cublas");
  EXPECT_EQ(cublasDestroy(handle), CUBLAS_STATUS_SUCCESS);
}

TEST(Cublas, MultipliesEveryType) {
  for (bool ta : {false, true})
    for (bool tb : {false, true}) {
      const Case t{ta, tb, false, 0.5f, 2, 2};
      check_cublas<float, float>(t);
      check_cublas<__nv_bfloat16, __nv_bfloat16>(t);
      check_cublas<__nv_bfloat16, float>(t);
      check_cublas<__half, __half>(t);
      check_cublas<__half, float>(t);
    }
}

// 1 + 2^-12 has more bits than TF32 keeps: asked for, they are lost; not asked for, they are not.
TEST(Cublas, Tf32LosesBitsOnlyWhereAskedFor) {
  DeviceArray<float> a(std::vector<float>{1 + 0x1p-12f}), b(std::vector<float>{1}), c(1);
  cublasHandle_t handle = nullptr;
  ASSERT_EQ(cublasCreate(&handle), CUBLAS_STATUS_SUCCESS);
  const float one = 1, zero = 0;
  for (auto compute : {CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32}) {
    ASSERT_EQ(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &one, a.get(), CUDA_R_32F, 1,
                           b.get(), CUDA_R_32F, 1, &zero, c.get(), CUDA_R_32F, 1, compute,
                           CUBLAS_GEMM_DEFAULT),
              CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(c.host()[0], compute == CUBLAS_COMPUTE_32F ? 1 + 0x1p-12f : 1.0f);
  }
  cublasDestroy(handle);
}

}  // namespace
}  // namespace graft
