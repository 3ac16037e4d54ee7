// The CPU's matrix product against a plain triple loop in F64, for every instruction set that this
// machine runs, and against OpenBLAS, whose code shares nothing with ours.
#include "tensor/cpu/gemm.h"

#include <cblas.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tensor/cpu/cpu_info.h"
#include "tensor/tensor.h"
#include "tensor/thread_pool.h"

namespace graft {
namespace {

struct NamedKernels {
  std::string name;
  const GemmKernels* kernels;
};

// What this CPU can run; wide16 needs AVX2.
std::vector<NamedKernels> runnable_kernels() {
  std::vector<NamedKernels> all = {{"portable", &gemm_kernels(CpuPath::Portable)}};
  if (last_cpu_path(cpu_features()) >= CpuPath::Avx2) {
    all.push_back({"avx2", &gemm_kernels(CpuPath::Avx2)});
    all.push_back({"wide16", &gemm_kernels_wide16()});
    all.push_back({"wide16_amx", &gemm_kernels_wide16_amx()});
  }
  if (last_cpu_path(cpu_features()) >= CpuPath::Avx512)
    all.push_back({"avx512", &gemm_kernels(CpuPath::Avx512)});
  if (last_cpu_path(cpu_features()) >= CpuPath::Avx512Bf16)
    all.push_back({"avx512_bf16", &gemm_kernels(CpuPath::Avx512Bf16)});
  if (last_cpu_path(cpu_features()) >= CpuPath::Amx)
    all.push_back({"amx", &gemm_kernels(CpuPath::Amx)});
  return all;
}

// Uniform in [-1, 1), the same on every machine.
class Numbers {
 public:
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return double(int64_t(state_) >> 11) / double(int64_t(1) << 52);
  }
  int64_t below(int64_t n) { return int64_t((next() + 1) / 2 * double(n)); }

 private:
  uint64_t state_ = 20240607;
};

// A (rows, cols) view whose rows are `gap` elements further apart than dense ones.
Tensor random_matrix(Numbers& numbers, int64_t rows, int64_t cols, DType dtype, int64_t gap = 0) {
  std::vector<double> values(size_t(rows * (cols + gap)));
  for (double& value : values) value = numbers.next();
  const Tensor whole = Tensor::from_floats({rows, cols + gap}, values, dtype);
  return gap == 0 ? whole : whole.slice_cols(0, cols);
}

GemmTerm random_term(Numbers& numbers, int64_t M, int64_t N, int64_t K, bool transpose_a,
                     bool transpose_b, DType a, DType b, int64_t gap = 0, double alpha = 1) {
  return {transpose_a ? random_matrix(numbers, K, M, a, gap) : random_matrix(numbers, M, K, a, gap),
          transpose_b ? random_matrix(numbers, N, K, b, gap) : random_matrix(numbers, K, N, b, gap),
          transpose_a, transpose_b, alpha};
}

// The meaning of the product, in F64; `scale` gets the sum of the absolute values of what is added.
std::vector<double> expected_product(int64_t M, int64_t N, std::span<const GemmTerm> terms,
                                     const Tensor& addend, const Tensor& bias,
                                     std::vector<double>& scale) {
  std::vector<double> c(size_t(M * N), 0.0);
  scale.assign(c.size(), 1e-30);
  const auto add = [&](int64_t at, double value) {
    c[size_t(at)] += value;
    scale[size_t(at)] += std::fabs(value);
  };
  for (const GemmTerm& t : terms) {
    const std::vector<double> a = t.a.to_doubles(), b = t.b.to_doubles();
    const int64_t K = t.transpose_a ? t.a.size(0) : t.a.size(1);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k)
          add(m * N + n, t.alpha * a[size_t(t.transpose_a ? k * M + m : m * K + k)] *
                             b[size_t(t.transpose_b ? n * K + k : k * N + n)]);
  }
  if (addend.defined()) {
    const std::vector<double> values = addend.to_doubles();
    for (int64_t i = 0; i < M * N; ++i) add(i, values[size_t(i)]);
  }
  if (bias.defined()) {
    const std::vector<double> values = bias.to_doubles();
    for (int64_t i = 0; i < M * N; ++i) add(i, values[size_t(i % N)]);
  }
  return c;
}

// F32 sums of K terms: 1e-5 of the sum of absolute values; one rounding to BF16: 2^-8 of the value.
void expect_near(const Tensor& c, const std::vector<double>& expected,
                 const std::vector<double>& scale, const std::string& what) {
  const std::vector<double> got = c.to_doubles();
  double worst = 0;
  size_t where = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double rounding = c.dtype() == DType::BF16 ? std::fabs(expected[i]) / 256 : 0;
    const double share = std::fabs(got[i] - expected[i]) / (1e-5 * scale[i] + rounding);
    if (!(share <= worst)) worst = share, where = i;
  }
  EXPECT_LE(worst, 1) << what << ": element " << where << " is " << got[where] << ", expected "
                      << expected[where] << ", error as a share of the tolerance " << worst;
}

void check_product(const NamedKernels& isa, Numbers& numbers, std::span<const GemmTerm> terms,
                   int64_t M, int64_t N, DType dtype, bool in_place, bool with_bias,
                   const std::string& what) {
  ThreadPool pool(2);
  Tensor c = random_matrix(numbers, M, N, dtype, in_place ? 3 : 0);
  const Tensor addend = in_place ? c : Tensor();
  const Tensor bias = with_bias ? random_matrix(numbers, 1, N, DType::BF16).reshape({N}) : Tensor();
  std::vector<double> scale;
  const std::vector<double> expected = expected_product(M, N, terms, addend, bias, scale);
  cpu_gemm(*isa.kernels, pool, c, terms, addend, bias);
  expect_near(c, expected, scale, isa.name + " " + what);
}

const DType kInputs[] = {DType::F32, DType::BF16, DType::F16};

TEST(Gemm, AgreesWithATripleLoopForAllTransposesAndDTypes) {
  for (const NamedKernels& isa : runnable_kernels()) {
    Numbers numbers;
    for (int variant = 0; variant < 72; ++variant) {
      const bool ta = variant & 1, tb = variant & 2;
      const DType a = kInputs[variant / 4 % 3], b = kInputs[variant / 12 % 3];
      const DType c = variant / 36 ? DType::BF16 : DType::F32;
      const int64_t M = 67, N = 131, K = 83;
      const GemmTerm term = random_term(numbers, M, N, K, ta, tb, a, b, variant % 5);
      check_product(isa, numbers, {&term, 1}, M, N, c, variant % 3 == 0, variant % 2 == 0,
                    concat("variant ", variant));
    }
  }
}

TEST(Gemm, AgreesWithATripleLoopForRaggedSizes) {
  for (const NamedKernels& isa : runnable_kernels()) {
    Numbers numbers;
    for (int round = 0; round < 250; ++round) {
      const int64_t limit = round % 3 == 0 ? 9 : 131;
      const int64_t M = 1 + numbers.below(limit), N = 1 + numbers.below(131),
                    K = 1 + numbers.below(131);
      const bool ta = numbers.next() > 0, tb = numbers.next() > 0;
      const GemmTerm term = random_term(numbers, M, N, K, ta, tb, kInputs[round % 3],
                                        kInputs[round / 3 % 3], round % 4, -1.5);
      check_product(isa, numbers, {&term, 1}, M, N, round % 2 ? DType::F32 : DType::BF16,
                    round % 5 == 0, round % 7 == 0,
                    concat("M=", M, " N=", N, " K=", K, " transposes ", ta, tb));
    }
  }
}

// LoRA's products: every narrow width that the kernels tell apart, and k over their passes.
TEST(Gemm, AgreesWithATripleLoopForNarrowProducts) {
  for (const NamedKernels& isa : runnable_kernels()) {
    Numbers numbers;
    int round = 0;
    for (const int64_t narrow : {1, 3, 4, 5, 8, 9, 16, 17, 24, 31, 32, 33, 48})
      for (const int64_t K : {1, 7, 64, 65, 130, 513, 700})
        for (int shape = 0; shape < 4; ++shape, ++round) {
          const bool ta = shape >= 2, tb = shape == 1;
          const int64_t wide = 49 + numbers.below(150);
          const int64_t M = shape == 3 ? narrow : wide, N = shape == 3 ? wide : narrow;
          const GemmTerm term =
              random_term(numbers, M, N, K, ta, tb, kInputs[round % 3], kInputs[round / 3 % 3],
                          round % 4, round % 5 ? 0.75 : 1);
          check_product(isa, numbers, {&term, 1}, M, N, round % 2 ? DType::F32 : DType::BF16,
                        round % 4 == 0, round % 7 == 0,
                        concat("M=", M, " N=", N, " K=", K, " transposes ", ta, tb));
        }
  }
}

TEST(Gemm, AddsTwoTermsOfDifferentK) {
  for (const NamedKernels& isa : runnable_kernels()) {
    Numbers numbers;
    for (int round = 0; round < 48; ++round) {
      const int64_t M = round % 4 == 0 ? 1 + round / 16 : 30 + numbers.below(60);
      const int64_t N = round % 4 == 1 ? 17 : 40 + numbers.below(60);
      const int64_t K1 = 500 + numbers.below(60), K2 = 1 + numbers.below(32);
      const bool tb = round & 1;
      const GemmTerm terms[] = {
          random_term(numbers, M, N, K1, round & 2, tb, DType::BF16, DType::F16, 1),
          random_term(numbers, M, N, K2, false, round & 4 ? tb : !tb, DType::F32, DType::F32, 2,
                      2)};
      check_product(isa, numbers, terms, M, N, round & 8 ? DType::BF16 : DType::F32, round & 4,
                    round & 1, concat("M=", M, " N=", N, " K=", K1, "+", K2));
    }
  }
}

// BF16 by BF16 with k odd and beyond one step, and a low-rank term in F32 behind it: pairs of k
// where the instruction set has them, then single ones.
TEST(Gemm, AddsAnF32TermToABf16Product) {
  for (const NamedKernels& isa : runnable_kernels()) {
    Numbers numbers;
    for (int round = 0; round < 48; ++round) {
      const int64_t M = 7 + numbers.below(90), N = 50 + numbers.below(100);
      const int64_t K = round % 3 == 0 ? 1 + numbers.below(40) : 1500 + numbers.below(700);
      const bool ta = round & 1, tb = round & 2;
      const GemmTerm terms[] = {
          random_term(numbers, M, N, K, ta, tb, DType::BF16, DType::BF16, round % 5),
          random_term(numbers, M, N, 1 + round % 17, false, round & 4, DType::F32, DType::F32, 2,
                      2)};
      check_product(isa, numbers, terms, M, N, round & 8 ? DType::BF16 : DType::F32, round & 4,
                    round & 1, concat("M=", M, " N=", N, " K=", K, " transposes ", ta, tb));
    }
  }
}

// The pairs are told from the widened F32 by what vdpbf16ps does to subnormals: it takes them as
// zero. This is how the test knows that the instruction runs, not a property to rely on.
TEST(Gemm, MultipliesBf16InPairsWhereTheCpuIsFastAtIt) {
  if (last_cpu_path(cpu_features()) < CpuPath::Avx512Bf16)
    GTEST_SKIP() << "this CPU has no vdpbf16ps";
  const auto product = [](const GemmKernels& kernels, DType dtype) {
    const GemmTerm term{
        Tensor::from_floats({64, 64}, std::vector<double>(64 * 64, 0x1p-130), dtype),
        Tensor::from_floats({64, 64}, std::vector<double>(64 * 64, 0x1p100), dtype), false, true,
        1};
    ThreadPool pool(1);
    Tensor c = Tensor::empty({64, 64}, DType::F32);
    cpu_gemm(kernels, pool, c, {&term, 1}, {}, {});
    return c.to_doubles()[77];
  };
  EXPECT_EQ(product(gemm_kernels(CpuPath::Avx512Bf16), DType::BF16), 0);
  EXPECT_EQ(product(gemm_kernels(CpuPath::Avx512Bf16), DType::F32), 64 * 0x1p-30);
  EXPECT_EQ(product(gemm_kernels(CpuPath::Avx512), DType::BF16), 64 * 0x1p-30);
}

TEST(Gemm, AgreesWithOpenBlasOverBlocksOfRowsAndLongK) {
  struct Size {
    int64_t M, N, K;
  };
  // More rows than one block; K too long for the packed rows, with more columns than are kept.
  for (const Size s :
       {Size{800, 70, 300}, Size{1000, 900, 33}, Size{770, 2100, 4900}, Size{770, 130, 9001}}) {
    Numbers numbers;
    const Tensor a16 = random_matrix(numbers, s.M, s.K, DType::BF16);  // both exact in F32
    const Tensor b16 = random_matrix(numbers, s.N, s.K, DType::BF16);
    const Tensor a = a16.to(DType::F32), b = b16.to(DType::F32);
    const Tensor expected = Tensor::empty({s.M, s.N}, DType::F32);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(s.M), int(s.N), int(s.K), 1.0f,
                a.data<float>(), int(s.K), b.data<float>(), int(s.K), 0.0f, expected.data<float>(),
                int(s.N));
    for (const NamedKernels& isa : runnable_kernels()) {
      if (isa.name == "portable" && s.K > 4000) continue;
      ThreadPool pool(2);
      Tensor c = Tensor::empty({s.M, s.N}, DType::F32);
      for (const GemmTerm& term :
           {GemmTerm{a, b, false, true, 1}, GemmTerm{a16, b16, false, true, 1}}) {
        cpu_gemm(*isa.kernels, pool, c, {&term, 1}, {}, {});
        double worst = 0;
        for (int64_t i = 0; i < s.M * s.N; ++i)
          worst =
              std::max(worst, std::fabs(double(c.data<float>()[i]) - expected.data<float>()[i]));
        EXPECT_LE(worst, 1e-6 * double(s.K))
            << isa.name << " " << dtype_name(term.a.dtype()) << " M=" << s.M << " K=" << s.K;
      }
    }
  }
}

TEST(Gemm, GivesAddendAndBiasWhereKIsZero) {
  for (const NamedKernels& isa : runnable_kernels()) {
    Numbers numbers;
    for (const int64_t M : {1, 7, 200}) {
      const GemmTerm term = random_term(numbers, M, 65, 0, false, true, DType::F32, DType::F32);
      check_product(isa, numbers, {&term, 1}, M, 65, DType::F32, true, true, "K=0");
      check_product(isa, numbers, {&term, 1}, M, 65, DType::BF16, false, false, "K=0 alone");
    }
  }
}

TEST(Gemm, AcceptsNoRowsAndNoColumns) {
  Numbers numbers;
  for (const NamedKernels& isa : runnable_kernels()) {
    ThreadPool pool(2);
    const GemmTerm rows = random_term(numbers, 0, 8, 8, false, true, DType::F32, DType::F32);
    const GemmTerm cols = random_term(numbers, 8, 0, 8, false, true, DType::F32, DType::F32);
    Tensor no_rows = Tensor::empty({0, 8}, DType::F32), no_cols = Tensor::empty({8, 0}, DType::F32);
    EXPECT_NO_THROW(cpu_gemm(*isa.kernels, pool, no_rows, {&rows, 1}, {}, {}));
    EXPECT_NO_THROW(cpu_gemm(*isa.kernels, pool, no_cols, {&cols, 1}, {}, {}));
  }
}

// Rounding more than once would move many of these: the base product alone is about 1000 times the
// low-rank one, whose bits a rounding in between would lose.
TEST(Gemm, RoundsOnceToBFloat16) {
  for (const NamedKernels& isa : runnable_kernels()) {
    Numbers numbers;
    const int64_t M = 40, N = 64;
    const GemmTerm terms[] = {
        random_term(numbers, M, N, 64, false, true, DType::F32, DType::F32, 0, 1),
        random_term(numbers, M, N, 8, false, true, DType::F32, DType::F32, 0, 0.004)};
    ThreadPool pool(2);
    Tensor wide = Tensor::empty({M, N}, DType::F32), narrow = Tensor::empty({M, N}, DType::BF16);
    cpu_gemm(*isa.kernels, pool, wide, terms, {}, {});
    cpu_gemm(*isa.kernels, pool, narrow, terms, {}, {});
    const Tensor rounded = wide.to(DType::BF16);
    EXPECT_EQ(std::memcmp(narrow.raw(), rounded.raw(), size_t(narrow.num_bytes())), 0) << isa.name;
  }
}

TEST(Gemm, KeepsNaNAndInfinityInBFloat16) {
  for (const NamedKernels& isa : runnable_kernels()) {
    std::vector<double> values(32 * 64, 1.0);
    values[64 * 3] = NAN;
    values[64 * 5] = INFINITY;
    const GemmTerm term{
        Tensor::from_floats({32, 64}, values, DType::F32),
        Tensor::from_floats({64, 64}, std::vector<double>(64 * 64, 1.0), DType::F32), false, true,
        1};
    ThreadPool pool(1);
    Tensor c = Tensor::empty({32, 64}, DType::BF16);
    cpu_gemm(*isa.kernels, pool, c, {&term, 1}, {}, {});
    const std::vector<double> got = c.to_doubles();
    EXPECT_TRUE(std::isnan(got[64 * 3 + 7])) << isa.name;
    EXPECT_TRUE(std::isinf(got[64 * 5 + 9])) << isa.name;
    EXPECT_EQ(got[64 * 4], 64) << isa.name;
  }
}

TEST(Gemm, GivesTheSameBytesWithAnyNumberOfThreads) {
  struct Size {
    int64_t M, N, K;
    bool ta, tb;
  };
  for (const NamedKernels& isa : runnable_kernels())
    for (const Size s : {Size{512, 300, 200, false, true}, Size{900, 16, 300, false, true},
                         Size{16, 700, 512, true, false}, Size{700, 16, 512, true, false},
                         Size{1, 3000, 300, false, true}, Size{300, 257, 1000, false, false}}) {
      Numbers numbers;
      const DType dtype = s.K == 512 ? DType::F32 : DType::BF16;
      const GemmTerm terms[] = {
          random_term(numbers, s.M, s.N, s.K, s.ta, s.tb, dtype, DType::BF16),
          random_term(numbers, s.M, s.N, 16, false, true, DType::F32, DType::F32)};
      for (const size_t count : {1, 2}) {
        Tensor first = Tensor::empty({s.M, s.N}, DType::F32);
        for (const int threads : {1, 2, 3, 8}) {
          ThreadPool pool(threads);
          Tensor c = Tensor::empty({s.M, s.N}, DType::F32);
          cpu_gemm(*isa.kernels, pool, c, {terms, count}, {}, {});
          if (threads == 1) first = c;
          EXPECT_EQ(std::memcmp(c.raw(), first.raw(), size_t(c.num_bytes())), 0)
              << isa.name << " M=" << s.M << " N=" << s.N << " terms=" << count
              << " threads=" << threads;
        }
      }
    }
}
TEST(Gemm, GivesARowTheSameBytesInTilesOfAnyHeight) {
  for (const NamedKernels& isa : runnable_kernels())
    for (const DType dtype : {DType::F32, DType::BF16}) {
      Numbers numbers;
      const int64_t M = 23, N = 149, K = 1700;
      const GemmTerm all = random_term(numbers, M, N, K, false, true, dtype, dtype);
      ThreadPool pool(2);
      Tensor whole = Tensor::empty({M, N}, DType::F32);
      cpu_gemm(*isa.kernels, pool, whole, {&all, 1}, {}, {});
      for (int64_t rows = 5; rows < M; ++rows) {
        const int64_t cols = 49 + rows * 4;
        const GemmTerm part{all.a.slice_rows(0, rows), all.b.slice_rows(0, cols), false, true, 1};
        Tensor c = Tensor::empty({rows, cols}, DType::F32);
        cpu_gemm(*isa.kernels, pool, c, {&part, 1}, {}, {});
        for (int64_t m = 0; m < rows; ++m)
          ASSERT_EQ(std::memcmp(c.data<float>() + m * cols, whole.data<float>() + m * N,
                                size_t(cols) * 4),
                    0)
              << isa.name << " rows=" << rows << " " << dtype_name(dtype);
      }
    }
}

TEST(Gemm, RefusesF64AndThreeTerms) {
  Numbers numbers;
  const GemmTerm wide = random_term(numbers, 8, 8, 8, false, true, DType::F64, DType::F64);
  const GemmTerm term = random_term(numbers, 8, 8, 8, false, true, DType::F32, DType::F32);
  const GemmTerm three[] = {term, term, term};
  Tensor c = Tensor::empty({8, 8}, DType::F32);
  EXPECT_THROW(cpu_gemm(c, {&wide, 1}, {}, {}), Error);
  EXPECT_THROW(cpu_gemm(c, three, {}, {}), Error);
}

TEST(Gemm, KeepsNoMoreScratchThanItSays) {
  Numbers numbers;
  const GemmTerm term = random_term(numbers, 770, 70, 5000, false, true, DType::BF16, DType::BF16);
  Tensor c = Tensor::empty({770, 70}, DType::F32);
  cpu_gemm(c, {&term, 1}, {}, {});
  const MemoryStats before = allocator_of(Device::CPU).stats();
  cpu_gemm(c, {&term, 1}, {}, {});
  const MemoryStats after = allocator_of(Device::CPU).stats();
  EXPECT_EQ(after.system_calls, before.system_calls);
  EXPECT_LE(after.live[size_t(Scope::Scratch)], gemm_scratch_bytes(8) + (1 << 20));
}

}  // namespace
}  // namespace graft
