// Products by cublasLt and what is below it: both against the reference, plans that are kept, and
// choices that are timed, stored, replayed and refused.
#include "cuda/gemm_plan.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

CudaBackend& device() { return static_cast<CudaBackend&>(cuda_backend()); }

class GemmPlan : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
    if (!cublas_lt_functions()) GTEST_SKIP() << "there is no cublasLt";
    folder_ = fs::temp_directory_path() / concat("graft_plan_", getpid());
    fs::create_directories(folder_);
  }
  void TearDown() override {
    if (folder_.empty()) return;
    device().plans().set_enabled(true);
    use("", false);
    fs::remove_all(folder_);
  }
  std::string file() const { return folder_ / "gemm_plan.json"; }
  std::string text() const {
    std::ostringstream text;
    text << std::ifstream(file()).rdbuf();
    return text.str();
  }
  void use(const std::string& path, bool tune, const std::string& name = "card A") {
    device().plans().use_file(path, name, tune, [this](const std::string& line) { said_ = line; });
  }
  fs::path folder_;
  std::string said_;
};

// A product with every operand a slice of columns, rows `gap` elements wider than they need be.
struct Product {
  Tensor c;
  GemmTerm term;
  Tensor addend, bias;
};
Product make_product(Device where, DType dtype, DType result, bool ta, bool tb, int64_t gap) {
  const int64_t m = 19, n = 24, k = 33;
  const auto matrix = [&](int64_t rows, int64_t cols, DType type, uint64_t seed) {
    return random_tensor({rows, cols + gap}, type, seed).to(where).slice_cols(gap, cols + gap);
  };
  Product p;
  p.c = matrix(m, n, result, 1);
  p.term = {.a = ta ? matrix(k, m, dtype, 2) : matrix(m, k, dtype, 2),
            .b = tb ? matrix(n, k, dtype, 3) : matrix(k, n, dtype, 3),
            .transpose_a = ta,
            .transpose_b = tb,
            .alpha = 0.75};
  p.addend = matrix(m, n, result, 4);
  p.bias = random_tensor({n}, result, 5).to(where);
  return p;
}

// c becomes the product with an addend (1), in place (2), and a bias (4), as `parts` says.
Tensor run(Backend& backend, Product p, int parts) {
  const Tensor addend = parts & 2 ? p.c : parts & 1 ? p.addend : Tensor();
  backend.gemm(p.c, {&p.term, 1}, addend, parts & 4 ? p.bias : Tensor());
  return p.c.to(Device::CPU).clone();
}

TEST_F(GemmPlan, AgreesWithTheReferenceAndSoDoesTheRungBelow) {
  for (const auto& [dtype, result] :
       {std::pair{DType::F32, DType::F32}, {DType::BF16, DType::BF16}, {DType::BF16, DType::F32}})
    for (int transposed = 0; transposed < 4; ++transposed)
      for (int64_t gap : {0, 3})
        for (int parts : {0, 1, 2, 4, 5, 6}) {
          const auto make = [&](Device where) {
            return make_product(where, dtype, result, transposed & 1, transposed & 2, gap);
          };
          const Tensor want = run(reference_backend(), make(Device::CPU), parts);
          for (bool enabled : {true, false}) {
            device().plans().set_enabled(enabled);
            expect_close(run(device(), make(Device::CUDA), parts), want, tolerance_of(result),
                         concat(dtype_name(dtype), " to ", dtype_name(result), ", transposed ",
                                transposed, ", gap ", gap, ", parts ", parts,
                                enabled ? ", by cublasLt" : ", by cublasGemmEx"));
          }
        }
}

TEST_F(GemmPlan, MakesOnePlanForEachShape) {
  use("", false);
  const auto once = [&](int64_t gap, int parts) {
    run(device(), make_product(Device::CUDA, DType::BF16, DType::BF16, false, true, gap), parts);
    return device().plans().num_plans();
  };
  EXPECT_EQ(once(0, 0), 1);
  EXPECT_EQ(once(0, 0), 1);
  EXPECT_EQ(once(0, 2), 1) << "what is added to it does not change the shape";
  EXPECT_EQ(once(0, 4), 2) << "a bias does";
  EXPECT_EQ(once(8, 0), 3) << "so do the strides of rows";
  EXPECT_EQ(device().plans().num_timed(), 0) << "nothing is timed unless asked for";
}

TEST_F(GemmPlan, TimesAShapeOnceAndKeepsTheChoice) {
  const int64_t before = device().plans().num_timed();
  use(file(), true);
  const Product p = make_product(Device::CUDA, DType::F32, DType::F32, false, true, 0);
  const Tensor c_before = p.c.to(Device::CPU);
  const Tensor first = run(device(), p, 2);
  EXPECT_EQ(device().plans().num_timed(), before + 1);
  // c was added to once, though several candidates ran.
  const Product twin = make_product(Device::CPU, DType::F32, DType::F32, false, true, 0);
  expect_same_bytes(c_before, twin.c, "c before");
  expect_close(first, run(reference_backend(), twin, 2), 1e-4, "an accumulating product");
  run(device(), p, 0);
  EXPECT_EQ(device().plans().num_timed(), before + 1);
  const auto json = nlohmann::json::parse(text());
  EXPECT_EQ(json["device"], "card A");
  ASSERT_EQ(json["products"].size(), 1u);
  EXPECT_GE(json["products"].begin().value()["candidate"], 0);
}

TEST_F(GemmPlan, ReplaysAFileWithoutTiming) {
  const auto product = [] {
    return make_product(Device::CUDA, DType::F32, DType::F32, false, true, 0);
  };
  use(file(), true);
  run(device(), product(), 0);
  auto json = nlohmann::json::parse(text());
  // The candidates of the emulator differ in the order of their sums: another choice shows.
  std::vector<Tensor> results;
  for (int candidate = 0; candidate < 3; ++candidate) {
    json["products"].begin().value()["candidate"] = candidate;
    std::ofstream(file()) << json;
    const int64_t timed = device().plans().num_timed();
    for (bool tune : {true, false}) {
      said_.clear();
      use(file(), tune);
      results.push_back(run(device(), product(), 0));
      EXPECT_EQ(said_, "");
      EXPECT_EQ(device().plans().num_timed(), timed);
    }
    expect_same_bytes(results[results.size() - 1], results[results.size() - 2], "replayed");
  }
#if defined(CUDA_EMU)
  EXPECT_FALSE(same_bytes(results[0], results[4])) << "candidate 2 sums k in two halves";
#endif
  use("", false);
  expect_same_bytes(run(device(), product(), 0), results[0], "without a file: the first");
}

TEST_F(GemmPlan, LeavesOutThePlanOfAnotherCardOrVersionAndTimesAgain) {
  const auto run_one = [&] {
    run(device(), make_product(Device::CUDA, DType::F32, DType::F32, false, true, 0), 0);
  };
  use(file(), true);
  run_one();
  int64_t timed = device().plans().num_timed();
  const std::string of_a = text();
  use(file(), false, "card B");
  EXPECT_EQ(said_,
            concat("tune: ", file(), " was made for \"card A\", this is card B; it is left out"));
  run_one();
  EXPECT_EQ(text(), of_a) << "without tune it is not touched";
  use(file(), true, "card B");
  run_one();
  EXPECT_EQ(device().plans().num_timed(), ++timed);
  EXPECT_EQ(nlohmann::json::parse(text())["device"], "card B");

  auto json = nlohmann::json::parse(text());
  const uint64_t version = json["cublaslt"];
  json["cublaslt"] = version + 1;
  std::ofstream(file()) << json;
  use(file(), true, "card B");
  EXPECT_EQ(said_, concat("tune: ", file(), " was made for cublasLt ", version + 1, ", this is ",
                          version, "; it is left out"));
  run_one();
  EXPECT_EQ(device().plans().num_timed(), ++timed);
}

TEST_F(GemmPlan, LeavesOutATornFile) {
  use(file(), true);
  run(device(), make_product(Device::CUDA, DType::F32, DType::F32, false, true, 0), 0);
  const std::string whole = text();
  for (const std::string& torn :
       {std::string(), whole.substr(0, whole.size() / 2), std::string("[]"),
        std::string(R"({"device": "card A", "cublaslt": 130000})"),
        std::string(
            R"({"device":"card A","cublaslt":130000,"products":{"x":{"candidate":-1}}})")}) {
    std::ofstream(file()) << torn;
    said_.clear();
    use(file(), true);
    if (torn.find("130000") == std::string::npos)
      EXPECT_EQ(said_,
                concat("tune: ", file(), " is not a whole plan of products; it is left out"));
    else
      EXPECT_NE(said_, "") << torn;
    const int64_t timed = device().plans().num_timed();
    run(device(), make_product(Device::CUDA, DType::F32, DType::F32, false, true, 0), 0);
    EXPECT_EQ(device().plans().num_timed(), timed + 1);
    EXPECT_EQ(nlohmann::json::parse(text())["products"].size(), 1u);
  }
}

TEST_F(GemmPlan, AFolderInItsPlaceIsSaid) {
  std::filesystem::create_directories(file());
  use(file(), true);
  EXPECT_EQ(said_, concat("tune: ", file(), " is not a file; it is left out"));
}

TEST_F(GemmPlan, TakesTheFirstWhereTheFileNamesACandidateThatIsNotThere) {
  const auto product = [] {
    return make_product(Device::CUDA, DType::F32, DType::F32, false, true, 0);
  };
  use(file(), true);
  run(device(), product(), 0);
  auto json = nlohmann::json::parse(text());
  json["products"].begin().value()["candidate"] = 999;
  std::ofstream(file()) << json;
  use("", false);
  const Tensor first = run(device(), product(), 0);
  use(file(), false);
  expect_same_bytes(run(device(), product(), 0), first, "the first");
}

}  // namespace
}  // namespace graft
