// The product that needs no library (cuda/own_gemm.h) against the reference's plain loops: every
// transpose, ragged sizes, rows that begin anywhere; and the backend and a run without cuBLAS.
#include "cuda/own_gemm.h"

#include <gtest/gtest.h>

#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "tests/op_cases.h"
#include "tests/tiny_run.h"
#include "tests/tolerance.h"
#include "train/finetune.h"

#if defined(CUDA_EMU)
#include "cuda/emulator/emulator.h"
#endif

namespace graft {
namespace {

CudaBackend& device() { return static_cast<CudaBackend&>(cuda_backend()); }

struct Sizes {
  int64_t m, n, k;
};
struct Dtypes {
  DType operands, result;
};
constexpr Dtypes kDtypes[] = {
    {DType::F32, DType::F32}, {DType::BF16, DType::BF16}, {DType::BF16, DType::F32}};

// c, a and b as columns [gap, gap + cols) of rows with gap and one more gap around them.
struct Problem {
  Tensor whole_c, c;
  GemmTerm term;
};
Problem make_problem(Device where, const Dtypes& dtypes, const Sizes& s, int transposed,
                     int64_t gap) {
  const bool ta = transposed & 1, tb = transposed & 2;
  const auto matrix = [&](int64_t rows, int64_t cols, DType dtype, uint64_t seed) {
    return random_tensor({rows, cols + 2 * gap}, dtype, seed).to(where);
  };
  const auto middle = [&](const Tensor& whole) {
    return whole.slice_cols(gap, whole.cols() - gap);
  };
  Problem p;
  p.whole_c = matrix(s.m, s.n, dtypes.result, 1);
  p.c = middle(p.whole_c);
  p.term = {
      .a = middle(ta ? matrix(s.k, s.m, dtypes.operands, 2) : matrix(s.m, s.k, dtypes.operands, 2)),
      .b = middle(tb ? matrix(s.n, s.k, dtypes.operands, 3) : matrix(s.k, s.n, dtypes.operands, 3)),
      .transpose_a = ta,
      .transpose_b = tb,
      .alpha = -0.75};
  return p;
}

std::string describe(const Dtypes& dtypes, const Sizes& s, int transposed, int64_t gap, float beta,
                     OwnTiles tiles) {
  return concat(dtype_name(dtypes.operands), " to ", dtype_name(dtypes.result), ", ", s.m, "x", s.n,
                "x", s.k, ", transposed ", transposed, ", gap ", gap, ", beta ", beta, ", tiles ",
                int(tiles));
}

class OwnGemm : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }

  // Also that nothing beside c is written, whatever the schedule.
  static void check(const Dtypes& dtypes, const Sizes& s, int transposed, int64_t gap, float beta,
                    OwnTiles tiles) {
    const std::string what = describe(dtypes, s, transposed, gap, beta, tiles);
    Problem want = make_problem(Device::CPU, dtypes, s, transposed, gap);
    const Problem before = make_problem(Device::CPU, dtypes, s, transposed, gap);
    reference_backend().gemm(want.c, {&want.term, 1}, beta != 0 ? want.c : Tensor());
    Problem got = make_problem(Device::CUDA, dtypes, s, transposed, gap);
    own_gemm(got.c, got.term, beta, device().stream(), tiles);
    const Tensor all = got.whole_c.to(Device::CPU);
    const double tolerance = dtypes.result == DType::BF16 ? 1.0 / 128 : 1e-5;
    expect_close(all.slice_cols(gap, gap + s.n), want.c, tolerance, what);
    if (gap == 0) return;
    for (int64_t first : {int64_t(0), gap + s.n})
      expect_same_bytes(all.slice_cols(first, first + gap),
                        before.whole_c.slice_cols(first, first + gap), what + ", beside c");
  }
};

// gap 8: rows of whole 16-byte chunks; 3: rows that begin anywhere; 2: neighbours by pairs.
TEST_F(OwnGemm, IsTheReferencesForEveryTransposeAndEdge) {
  for (const Dtypes& dtypes : kDtypes)
    for (int transposed = 0; transposed < 4; ++transposed) {
      const auto all = [&](const Sizes& s, int64_t gap, float beta, OwnTiles tiles) {
        check(dtypes, s, transposed, gap, beta, tiles);
      };
      all({1, 1, 1}, 0, 0, OwnTiles::Small);
      all({72, 104, 136}, 8, 0, OwnTiles::Small);  // five steps: past the pipeline's stages
      all({67, 70, 37}, 3, 1, OwnTiles::Small);
      all({16, 130, 40}, 0, 1, OwnTiles::Small);
      all({19, 24, 33}, 2, 0, OwnTiles::Small);
      all({136, 264, 40}, 8, 1, OwnTiles::Large);
      all({131, 70, 35}, 3, 0, OwnTiles::Large);
    }
}

// More rows of tiles than a band has, and columns that are whole tiles; then also rows that are,
// for the last band is as high as there are tiles.
TEST_F(OwnGemm, ReachesEveryTileOfSeveralBands) {
  for (const Dtypes& dtypes : kDtypes)
    for (OwnTiles tiles : {OwnTiles::Small, OwnTiles::Large})
      for (int64_t rows : {1160, 1280}) check(dtypes, {rows, 256, 5}, 0, 0, 0, tiles);
}

TEST_F(OwnGemm, SumsInTheSameOrderInTilesOfEverySize) {
  for (int transposed = 0; transposed < 4; ++transposed) {
    const auto run = [&](OwnTiles tiles) {
      Problem p = make_problem(Device::CUDA, kDtypes[1], {70, 72, 104}, transposed, 8);
      own_gemm(p.c, p.term, 0, device().stream(), tiles);
      return p.c.to(Device::CPU).clone();
    };
    expect_same_bytes(run(OwnTiles::Small), run(OwnTiles::Large),
                      concat("transposed ", transposed));
  }
}

// Of 128 x 256 outputs there are 129 x 1, a band and more, and they are used: 8 warps a block.
TEST_F(OwnGemm, TakesLargeTilesWhereThereAreEnough) {
#if defined(CUDA_EMU)
  const auto threads = [] { return emu::stats().threads; };
  const auto before = threads();
#endif
  check(kDtypes[1], {128 * 128 + 1, 8, 8}, 2, 0, 0, OwnTiles::ByShape);
#if defined(CUDA_EMU)
  EXPECT_EQ(threads() - before, 129u * 256);
#endif
}

#if defined(CUDA_EMU)

// A transposed operand's tile is turned by ldmatrix.trans, no slower than the other is read.
TEST_F(OwnGemm, ReadsTilesWithoutBankConflicts) {
  for (OwnTiles tiles : {OwnTiles::Small, OwnTiles::Large})
    for (int transposed = 0; transposed < 4; ++transposed) {
      Problem p = make_problem(Device::CUDA, kDtypes[1], {72, 72, 64}, transposed, 8);
      emu::stats() = {};
      own_gemm(p.c, p.term, 0, device().stream(), tiles);
      ASSERT_EQ(cudaStreamSynchronize(device().stream()), cudaSuccess);
      EXPECT_GT(emu::stats().ldmatrix_tiles, 0u);
      EXPECT_EQ(emu::stats().ldmatrix_wavefronts, emu::stats().ldmatrix_tiles)
          << "transposed " << transposed << ", tiles " << int(tiles);
    }
}

// In any order of threads and blocks, with the same bytes.
TEST_F(OwnGemm, GivesTheSameBytesInEveryOrder) {
  const emu::Options before = emu::options();
  for (const Dtypes& dtypes : kDtypes)
    for (int transposed : {1, 2}) {
      std::vector<Tensor> results;
      for (const emu::Options& options : {emu::Options{emu::Order::kAscending, 1},
                                          {emu::Order::kDescending, 1},
                                          {emu::Order::kRandom, 1},
                                          {emu::Order::kRandom, 2}}) {
        emu::options() = options;
        Problem p = make_problem(Device::CUDA, dtypes, {67, 70, 168}, transposed, 3);
        own_gemm(p.c, p.term, 1, device().stream(), OwnTiles::Small);
        results.push_back(p.c.to(Device::CPU).clone());
        expect_same_bytes(results.back(), results[0], concat("transposed ", transposed));
      }
    }
  emu::options() = before;
}

#endif

// --- the backend without cuBLAS
// -------------------------------------------------------------------

class WithoutCublas : public TinyRun {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
    used_ = device().uses_cublas();
    device().use_cublas(false);
  }
  void TearDown() override {
    if (used_) device().use_cublas(true);
  }

  TrainResult train(TrainOptions::DeviceChoice choice, DType dtype, const std::string& name,
                    bool cuda_graph = false) {
    TrainOptions o;
    o.model = model();
    o.data = {path("data.jsonl")};
    o.output_dir = path(name);
    o.device = choice;
    o.dtype = dtype;
    o.cuda_graph = cuda_graph;
    o.lora.base_model_name_or_path = "tiny";
    o.lora.r = 4;
    o.lora.lora_dropout = 0.1;
    o.learning_rate = 2e-3;
    o.gradient_accumulation_steps = 1;
    o.max_steps = 3;  // with graphs: plainly, captured, replayed
    o.save_steps = 0;
    write_data("data.jsonl", 1);
    return finetune(o);
  }
  bool used_ = false;
};

TEST_F(WithoutCublas, ARunLosesAsTheCpuDoesAndTwiceTheSameBytes) {
  using Choice = TrainOptions::DeviceChoice;
  for (DType dtype : {DType::F32, DType::BF16}) {
    const std::string name = std::string(dtype_name(dtype));
    const TrainResult cpu = train(Choice::Cpu, dtype, "cpu" + name),
                      first = train(Choice::Cuda, dtype, "first" + name);
    train(Choice::Cuda, dtype, "second" + name, true);
    const double tolerance = dtype == DType::F32 ? 1e-5 : 2e-2;
    ASSERT_EQ(first.losses.size(), 3u);
    for (size_t i = 0; i < first.losses.size(); ++i) {
      EXPECT_NEAR(first.losses[i] / cpu.losses[i], 1, tolerance) << name << ", step " << i + 1;
      EXPECT_NEAR(first.grad_norms[i] / cpu.grad_norms[i], 1, 10 * tolerance)
          << name << ", step " << i + 1;
    }
    EXPECT_GT(read("first" + name + "/adapter_model.safetensors").size(), 1000u);
    EXPECT_EQ(read("first" + name + "/adapter_model.safetensors"),
              read("second" + name + "/adapter_model.safetensors"));
  }
}

TEST_F(WithoutCublas, TheBackendSaysSo) {
  EXPECT_NE(device().describe().find("graft's own GEMM"), std::string::npos);
  if (!used_) GTEST_SKIP() << "there is no cuBLAS to go back to";
  device().use_cublas(true);
  EXPECT_NE(device().describe().find("cuBLAS from"), std::string::npos);
}

#if defined(CUDA_EMU)

// auto takes the card, and one line tells what it has instead.
TEST_F(WithoutCublas, TheBinaryTakesTheCardAndSaysSoInOneLine) {
  const std::string graft = std::filesystem::absolute("build/emu/fast/graft");
  if (!std::filesystem::exists(graft)) GTEST_SKIP() << "build/emu/fast/graft is not built";
  write_data("data.jsonl", 4);
  const Outcome outcome = shell("GRAFT_CUBLAS=none " + graft +
                                " train --model model --data data.jsonl --output-dir out "
                                "--max-steps 2 --tune");
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  const std::string line = "no cuBLAS: GRAFT_CUBLAS is none; using graft's own GEMM\n";
  const size_t at = outcome.out.find(line);
  ASSERT_NE(at, std::string::npos) << outcome.out;
  EXPECT_EQ(outcome.out.find("no cuBLAS", at + 1), std::string::npos);
  EXPECT_NE(outcome.out.find("; graft's own GEMM\n"), std::string::npos) << outcome.out;
  EXPECT_NE(outcome.out.find("tune: there is no cublasLt here"), std::string::npos) << outcome.out;
}

#endif

}  // namespace
}  // namespace graft
