// Every rung of every ladder (cuda/variants.h) against the reference backend's plain loops, at
// sizes that leave ragged edges, in several orders of threads and blocks; and the bank conflicts
// that a rung is there to show or to avoid.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "cuda/gemm_by_hand.h"
#include "cuda/lora_linear.h"
#include "cuda/variants.h"
#include "tensor/random.h"
#include "tests/tolerance.h"

#if defined(CUDA_EMU)
#include "cuda/emulator/emulator.h"
#endif

namespace graft {
namespace {

using Sizes = std::vector<int64_t>;

class Ladder : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
  static cudaStream_t stream() { return static_cast<CudaBackend&>(cuda_backend()).stream(); }
};

LadderFamily family_named(const std::string& name) {
  for (const LadderFamily& family : ladder_families())
    if (family.name == name) return family;
  throw Error("no ladder is named " + name);
}

// One rounding of the output, another of the expected one, and a third where a rung rounds twice;
// attention rounds its weights as well.
double tolerance(const LadderFamily& family, DType dtype) {
  const bool attention = std::string(family.name).starts_with("attention");
  return dtype == DType::BF16 && !attention ? 1.0 / 128 : tolerance_of(dtype);
}

// Calls f in several orders of threads and blocks; once on a GPU, which has its own.
template <class F>
void in_every_order(F&& f) {
#if defined(CUDA_EMU)
  const emu::Options before = emu::options();
  std::vector<emu::Options> all = {{emu::Order::kDescending, 1}, {emu::Order::kRandom, 1}};
  if (emu::checks() == emu::Checks::kNone) {  // the others' verdict does not hang on the order
    all.push_back({emu::Order::kAscending, 1});
    all.push_back({emu::Order::kRandom, 2});
  }
  for (const emu::Options& options : all) {
    emu::options() = options;
    f();
  }
  emu::options() = before;
#else
  f();
#endif
}

std::string describe(const LadderFamily& family, const LadderRung& rung, const Sizes& sizes) {
  std::string text =
      std::string(family.name) + " rung " + std::to_string(rung.number) + ", " + family.dimensions;
  for (int64_t size : sizes) text += " " + std::to_string(size);
  return text;
}

// Every rung from `first` on, in every order, with the same bytes in each.
void check_problem(const LadderFamily& family, const LadderProblem& problem, const Sizes& sizes,
                   int first, cudaStream_t stream) {
  LadderProblem expected = problem;
  for (Tensor& output : expected.outputs) output = output.clone();
  family.reference(expected);
  for (const LadderRung& rung : family.rungs) {
    if (rung.number < first) continue;
    const std::string what = describe(family, rung, sizes);
    std::vector<Tensor> seen;
    in_every_order([&] {
      LadderProblem device = on_device(problem);
      family.run(rung.number, device, stream);
      for (size_t i = 0; i < device.outputs.size(); ++i) {
        const Tensor got = device.outputs[i].to(Device::CPU), &want = expected.outputs[i];
        expect_close(got, want, tolerance(family, want.dtype()),
                     what + ", output " + std::to_string(i));
        if (seen.size() == i) seen.push_back(got);
        expect_same_bytes(got, seen[i], what + ", another order");
      }
    });
  }
}

void check_family(const std::string& name, const Sizes& sizes, int first, cudaStream_t stream) {
  const LadderFamily family = family_named(name);
  check_problem(family, family.make(sizes), sizes, first, stream);
}

TEST_F(Ladder, EveryGemmIsTheReferences) {
  for (const Sizes& sizes : {Sizes{1, 1, 8}, Sizes{130, 259, 40}, Sizes{37, 70, 104}})
    check_family("gemm", sizes, 1, stream());
}

TEST_F(Ladder, LargeTilesComeInBandsOfRows) {  // 9 x 2 tiles: one band, and a row of the next
  check_family("gemm", {8 * 128 + 1, 257, 8}, 7, stream());
}

TEST_F(Ladder, EveryLoraLinearIsTheReferences) {
  for (const Sizes& sizes :
       {Sizes{1, 1, 8, 8}, Sizes{70, 130, 520, 8}, Sizes{131, 259, 72, 24}, Sizes{33, 40, 264, 80}})
    check_family("lora_linear", sizes, 1, stream());
}

TEST_F(Ladder, EveryWideningIsTheReferences) {
  for (const Sizes& sizes : {Sizes{1, 1}, Sizes{7, 33}, Sizes{70, 130}})
    check_family("widen_nf4", sizes, 1, stream());
}

TEST_F(Ladder, EveryNormIsTheReferences) {
  for (const Sizes& sizes : {Sizes{1, 6}, Sizes{37, 51}, Sizes{9, 520}}) {
    check_family("rms_norm", sizes, 1, stream());
    check_family("rms_norm_backward", sizes, 1, stream());
  }
}

TEST_F(Ladder, EveryCrossEntropyIsTheReferences) {
  for (const Sizes& sizes : {Sizes{1, 1}, Sizes{5, 1003}, Sizes{3, 2052}, Sizes{300, 7}})
    check_family("cross_entropy", sizes, 1, stream());
}

// exp of it is infinite, so that whichever thread holds it, its maximum must reach the others.
TEST_F(Ladder, EveryCrossEntropyBearsALargeLogitAnywhere) {
  const LadderFamily family = family_named("cross_entropy");
  const Sizes sizes{66, 1003};
  LadderProblem problem = family.make(sizes);
  Tensor& logits = problem.outputs[1];
  std::vector<double> values = logits.to_doubles();
  for (size_t row = 0; row < 66; ++row) values[row * 1003 + row * 15 + row % 15] = 150;
  logits = Tensor::from_floats(logits.shape(), values, logits.dtype());
  check_problem(family, problem, sizes, 1, stream());
}

// A logit that is not a number, wherever it stands, makes the loss of its row that.
TEST_F(Ladder, EveryCrossEntropyKeepsWhatIsNotANumber) {
  const LadderFamily family = family_named("cross_entropy");
  LadderProblem problem = family.make(Sizes{5, 1003});
  std::vector<double> values = problem.outputs[1].to_doubles();
  for (const size_t place : {0 * 1003 + 0, 2 * 1003 + 700, 3 * 1003 + 1002}) values[place] = NAN;
  problem.outputs[1] =
      Tensor::from_floats(problem.outputs[1].shape(), values, problem.outputs[1].dtype());
  for (const LadderRung& rung : family.rungs) {
    LadderProblem device = on_device(problem);
    family.run(rung.number, device, stream());
    const std::vector<double> losses = device.outputs[0].to_doubles();
    for (size_t row = 0; row < 5; ++row)
      EXPECT_EQ(std::isnan(losses[row]), row == 0 || row == 2 || row == 3)
          << describe(family, rung, Sizes{5, 1003}) << ", row " << row;
  }
}

// The device cannot throw: the loss of such a row is not a number, and the rows beside it are
// right.
TEST_F(Ladder, EveryCrossEntropyTellsALabelOutsideTheRow) {
  const LadderFamily family = family_named("cross_entropy");
  const Sizes sizes{5, 1003};
  const LadderProblem problem = family.make(sizes);
  LadderProblem expected = problem, broken = problem;
  expected.outputs[0] = problem.outputs[0].clone();
  expected.outputs[1] = problem.outputs[1].clone();
  family.reference(expected);
  const std::vector<double> want = expected.outputs[0].to_doubles();
  const int32_t* labels = problem.inputs[0].data<int32_t>();
  broken.inputs[0] = Tensor::from_ints({5}, {labels[0], 1003, labels[2], -1, labels[4]});
  for (const LadderRung& rung : family.rungs) {
    LadderProblem device = on_device(broken);
    family.run(rung.number, device, stream());
    const std::vector<double> losses = device.outputs[0].to_doubles();
    for (size_t row = 0; row < 5; ++row) {
      const std::string where = concat(describe(family, rung, sizes), ", row ", row);
      if (row % 2)
        EXPECT_TRUE(std::isnan(losses[row])) << where;
      else
        EXPECT_NEAR(losses[row], want[row], 1e-3 * want[row]) << where;
    }
  }
}

TEST_F(Ladder, EveryAttentionIsTheReferences) {
  for (const Sizes& sizes : {Sizes{2, 19, 4, 2, 64}, Sizes{1, 67, 2, 1, 128}}) {
    check_family("attention", sizes, 1, stream());
    check_family("attention_backward", sizes, 1, stream());
  }
}

// What the ladder is compared with solves the same problem.
TEST_F(Ladder, EveryLibraryCallIsTheReferences) {
  int libraries = 0;
  for (const LadderFamily& family : ladder_families()) {
    if (!family.library) continue;
    ++libraries;
    const LadderProblem problem = family.make(family.small_sizes);
    LadderProblem expected = problem, device = on_device(problem);
    expected.outputs[0] = problem.outputs[0].clone();
    family.reference(expected);
    family.library(device);
    expect_close(device.outputs[0].to(Device::CPU), expected.outputs[0], 1.0 / 128, family.name);
  }
  EXPECT_EQ(libraries, 2);
}

// Every input read once and every output written once; logits are both.
TEST_F(Ladder, BytesAreThoseOfTheTensors) {
  for (const LadderFamily& family : ladder_families()) {
    const LadderProblem problem = family.make(family.small_sizes);
    double bytes = 0;
    for (const Tensor& t : problem.inputs) bytes += double(t.num_bytes());
    for (const Tensor& t : problem.outputs) bytes += double(t.num_bytes());
    if (std::string(family.name) == "cross_entropy")
      bytes += double(problem.outputs[1].num_bytes());
    EXPECT_EQ(family.costs(family.small_sizes).bytes, bytes) << family.name;
  }
}

Tensor random_matrix(Random& random, int64_t rows, int64_t cols, DType dtype) {
  std::vector<double> values(size_t(rows * cols));
  for (double& value : values) value = random.normal();
  return Tensor::from_floats({rows, cols}, values, dtype).to(Device::CUDA);
}

// c = a b^T in views of wider matrices, against the reference on dense copies.
void check_strided(int rung, DType dtype, int64_t k, cudaStream_t stream) {
  Random random(3);
  const Tensor a = random_matrix(random, 45, k + 16, dtype).slice_cols(8, 8 + k);
  const Tensor b = random_matrix(random, 35, k + 8, dtype).slice_cols(0, k);
  const Tensor whole = random_matrix(random, 45, 40, dtype), before = whole.to(Device::CPU);
  Tensor c = whole.slice_cols(1, 36);  // odd: no two elements at once
  gemm_by_hand(rung, c, a, b, stream);
  Tensor expected = Tensor::empty({45, 35}, dtype);
  const GemmTerm term = {a.to(Device::CPU).clone(), b.to(Device::CPU).clone(), false, true, 1};
  reference_backend().gemm(expected, {&term, 1});
  const std::string what = "rung " + std::to_string(rung) + ", " + std::string(dtype_name(dtype));
  const Tensor after = whole.to(Device::CPU);
  expect_close(after.slice_cols(1, 36), expected, dtype == DType::BF16 ? 1.0 / 128 : 1e-5, what);
  expect_same_bytes(after.slice_cols(0, 1), before.slice_cols(0, 1), what + ": left of c");
  expect_same_bytes(after.slice_cols(36, 40), before.slice_cols(36, 40), what + ": right of c");
}

TEST_F(Ladder, GemmTakesStridedRowsAndWritesNothingElse) {
  for (int rung = 1; rung <= kGemmRungs; ++rung) check_strided(rung, DType::BF16, 72, stream());
  for (int rung = 1; rung <= 3; ++rung) check_strided(rung, DType::F32, 52, stream());
  for (int rung = 1; rung <= 2; ++rung)
    for (DType dtype : {DType::F32, DType::BF16}) check_strided(rung, dtype, 51, stream());
}

// The comments of variants 5 to 7 promise it.
TEST_F(Ladder, TensorCoreGemmsGiveTheSameBytes) {
  const LadderFamily family = family_named("gemm");
  const LadderProblem problem = family.make({130, 259, 136});
  LadderProblem first = on_device(problem);
  family.run(4, first, stream());
  for (int rung = 5; rung <= kGemmRungs; ++rung) {
    LadderProblem other = on_device(problem);
    family.run(rung, other, stream());
    expect_same_bytes(other.outputs[0].to(Device::CPU), first.outputs[0].to(Device::CPU),
                      "rung " + std::to_string(rung));
  }
}

// Any r is fine where the low-rank product is a pass of its own.
TEST_F(Ladder, LoraLinearTakesOddRanksBeforeItIsFused) {
  const LadderFamily family = family_named("lora_linear");
  for (int64_t rank : {1, 5}) {
    const LadderProblem problem = family.make({20, 33, 64, rank});
    LadderProblem expected = problem;
    expected.outputs[0] = problem.outputs[0].clone();
    family.reference(expected);
    for (int rung : {1, 2}) {
      LadderProblem device = on_device(problem);
      family.run(rung, device, stream());
      expect_close(device.outputs[0].to(Device::CPU), expected.outputs[0], 1.0 / 128,
                   "rung " + std::to_string(rung) + ", r " + std::to_string(rank));
    }
    LadderProblem device = on_device(problem);
    EXPECT_THROW(family.run(3, device, stream()), Error);
  }
}

TEST_F(Ladder, RefusesWhatARungCannotDo) {
  Random random(4);
  const Tensor a = random_matrix(random, 4, 12, DType::BF16);
  const Tensor wide = random_matrix(random, 4, 12, DType::F32);
  Tensor c = random_matrix(random, 4, 4, DType::BF16),
         c_wide = random_matrix(random, 4, 4, DType::F32);
  gemm_by_hand(2, c, a, a, stream());
  for (int rung = 3; rung <= kGemmRungs; ++rung)
    EXPECT_THROW(gemm_by_hand(rung, c, a, a, stream()), Error) << rung;  // K is 12
  gemm_by_hand(3, c_wide, wide, wide, stream());
  EXPECT_THROW(gemm_by_hand(4, c_wide, wide, wide, stream()), Error);  // F32
  EXPECT_THROW(gemm_by_hand(1, c, wide, a, stream()), Error);
  EXPECT_THROW(gemm_by_hand(1, c, a, a.slice_rows(0, 3), stream()), Error);
  EXPECT_THROW(gemm_by_hand(0, c, a, a, stream()), Error);
  EXPECT_THROW(gemm_by_hand(kGemmRungs + 1, c, a, a, stream()), Error);
  EXPECT_THROW(lora_linear(kLoraRungs + 1, c, a, a, a, c, 1, stream()), Error);
}

#if defined(CUDA_EMU)
// Shared-memory wavefronts that each 8x8 tile of ldmatrix takes: 1 is free of conflicts, 0 a rung
// without ldmatrix.
TEST_F(Ladder, BankConflictsAreWhereTheLadderShowsThem) {
  const std::vector<std::pair<std::string, std::vector<uint64_t>>> wanted = {
      {"gemm", {0, 0, 0, 4, 1, 1, 1}}, {"lora_linear", {1, 1, 1}},
      {"widen_nf4", {0, 0}},           {"rms_norm", {0, 0}},
      {"rms_norm_backward", {0, 0}},   {"cross_entropy", {0, 0, 0}},
      {"attention", {0, 0, 1}},        {"attention_backward", {0, 0, 1}}};
  ASSERT_EQ(wanted.size(), ladder_families().size());
  for (const auto& [name, waves] : wanted) {
    const LadderFamily family = family_named(name);
    ASSERT_EQ(family.rungs.size(), waves.size()) << name;
    const LadderProblem problem = family.make(family.small_sizes);
    for (size_t i = 0; i < waves.size(); ++i) {
      LadderProblem device = on_device(problem);
      emu::stats() = {};
      family.run(family.rungs[i].number, device, stream());
      ASSERT_EQ(cudaStreamSynchronize(stream()), cudaSuccess);
      EXPECT_EQ(emu::stats().ldmatrix_tiles > 0, waves[i] > 0) << name << ' ' << i + 1;
      EXPECT_EQ(emu::stats().ldmatrix_wavefronts, waves[i] * emu::stats().ldmatrix_tiles)
          << name << ' ' << i + 1;
      if (name == "gemm" && waves[i] > 0) {  // a tensor core is given nothing but the product
        const double flop = family.costs(family.small_sizes).flop;
        EXPECT_EQ(double(emu::stats().mma) * 2 * 16 * 8 * 16, flop) << "gemm " << i + 1;
      }
    }
  }
}
#endif

}  // namespace
}  // namespace graft
