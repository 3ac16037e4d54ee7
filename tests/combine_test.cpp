// Adapters made into one: the sums of tests/golden/stacks, whose singular values torch computed.
#include "models/combine.h"

#include <algorithm>

#include "models/adapter_stack.h"
#include "models/low_rank.h"
#include "models/weights.h"
#include "tensor/random.h"
#include "tests/golden_case.h"

namespace graft {
namespace {

using Json = nlohmann::json;
const std::string kAdapters = "tests/golden/adapters/";

std::vector<WeightedAdapter> adapters_of(const Json& golden) {
  std::vector<WeightedAdapter> adapters;
  for (const Json& one : golden["adapters"]) adapters.push_back({read_adapter(one[0]), one[1]});
  return adapters;
}

// The logits with the adapter written to disk and loaded as any adapter is.
std::vector<double> logits_with(const AdapterFile& file, const Json& golden) {
  const ScratchFolder scratch;
  write_adapter(file, scratch / "a");
  auto model = load_model(golden["model"]);
  load_adapter(*model, scratch / "a");
  return logits_of(*model, golden["input_ids"]);
}

class Sum : public testing::TestWithParam<const char*> {
 protected:
  Json golden() const {
    return golden_json(std::string("tests/golden/stacks/") + GetParam() + ".json");
  }
};

// Where there is DoRA, the weights of the base are asked for.
BaseWeight base_of(const Json& golden) {
  std::shared_ptr<Decoder> model = load_model(golden["model"]);
  return [model](const std::string& name) {
    for (const NamedLinear& layer : linear_layers(*model))
      if (layer.name == name) return layer.linear->weight.value();
    return Tensor();
  };
}

bool any_dora(const Json& golden) {
  for (const WeightedAdapter& adapter : adapters_of(golden))
    if (has_dora(adapter.file)) return true;
  return false;
}

TEST_P(Sum, ByCatIsExactAndRefusesDora) {
  const Json golden = this->golden();
  if (any_dora(golden)) {
    const std::string error = error_of([&] { combine_cat(adapters_of(golden)); });
    EXPECT_NE(error.find("full rank"), std::string::npos) << error;
    EXPECT_NE(error_of([&] { combine_svd(adapters_of(golden), 4); }).find("--model"),
              std::string::npos);
    return;
  }
  const Combined combined = combine_cat(adapters_of(golden));
  EXPECT_LT(worst_share(logits_with(combined.file, golden), golden_numbers(golden["logits"])),
            1e-5);
}

TEST_P(Sum, BySvdKeepsTheEnergyThatTorchFinds) {
  const Json golden = this->golden();
  const Combined combined = combine_svd(adapters_of(golden), golden["rank"], base_of(golden));
  ASSERT_EQ(combined.modules.size(), golden["energy"].size());
  for (const CombinedModule& module : combined.modules) {
    const double energy = golden["energy"].at(module.name);
    EXPECT_NEAR(module.energy, energy, 1e-6) << module.name;
    EXPECT_NEAR(module.error, std::sqrt(std::max(0.0, 1 - energy)), 2e-4) << module.name;
    EXPECT_LE(module.rank, 3);
  }
  EXPECT_LT(worst_share(logits_with(combined.file, golden), golden_numbers(golden["svd_logits"])),
            2e-5);
}

TEST_P(Sum, BySvdOfTheWholeRankIsExact) {
  const Json golden = this->golden();
  const Combined combined = combine_svd(adapters_of(golden), 64, base_of(golden));
  EXPECT_LT(worst_share(logits_with(combined.file, golden), golden_numbers(golden["logits"])),
            1e-5);
  for (const CombinedModule& module : combined.modules) EXPECT_NEAR(module.energy, 1, 1e-9);
}
INSTANTIATE_TEST_SUITE_P(Golden, Sum,
                         testing::Values("mixed_ranks", "mixed_rslora", "three", "one", "dora",
                                         "dora_and_lora", "dora_patterns"),
                         [](const auto& info) { return std::string(info.param); });

std::vector<double> dense(const AdapterModule& module) {
  std::vector<double> delta;
  const int64_t r = module.a.size(0), in = module.a.size(1);
  for (int64_t o = 0; o < module.b.size(0); ++o)
    for (int64_t i = 0; i < in; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < r; ++k)
        sum += double(module.b.data<float>()[o * r + k]) * module.a.data<float>()[k * in + i];
      delta.push_back(module.scaling * sum);
    }
  return delta;
}

// rsLoRA and patterns as well, where PEFT 0.21 is wrong.
TEST(Combine, OneAdapterOfWeightOneIsItself) {
  for (const char* name : {"llama_gqa", "patterns", "patterns_all_layers", "regex"}) {
    const AdapterFile file = read_adapter(kAdapters + name);
    int64_t rank = 0;
    for (const AdapterModule& module : file.modules) rank = std::max(rank, module.a.size(0));
    for (const Combined& combined : {combine_cat({{file, 1}}), combine_svd({{file, 1}}, rank)}) {
      ASSERT_EQ(combined.file.modules.size(), file.modules.size());
      const ScratchFolder scratch;
      write_adapter(combined.file, scratch / "a");
      const AdapterFile read = read_adapter(scratch / "a");
      for (const AdapterModule& module : file.modules)
        EXPECT_LT(worst_share(dense(*read.find(module.name)), dense(module)), 1e-6)
            << name << " " << module.name;
    }
  }
}

TEST(Combine, RefusesBasesOfOtherShapes) {
  EXPECT_NE(error_of([] {
              combine_cat({{read_adapter(kAdapters + "llama_gqa"), 1},
                           {read_adapter(kAdapters + "qwen3_tied"), 1}});
            }).find("adapters of one base"),
            std::string::npos);
}

// Known singular values: U diag(s) V^T with U, V from Gram-Schmidt in double.
Tensor with_spectrum(int64_t rows, int64_t cols, const std::vector<double>& values) {
  const auto basis = [](int64_t length, size_t count, uint64_t seed) {
    Random random(seed);
    std::vector<std::vector<double>> all;
    for (size_t k = 0; k < count; ++k) {
      std::vector<double> v;
      for (int64_t i = 0; i < length; ++i) v.push_back(random.normal());
      for (int twice = 0; twice < 2; ++twice)
        for (const auto& u : all) {
          double dot = 0;
          for (int64_t i = 0; i < length; ++i) dot += u[size_t(i)] * v[size_t(i)];
          for (int64_t i = 0; i < length; ++i) v[size_t(i)] -= dot * u[size_t(i)];
        }
      double norm = 0;
      for (const double x : v) norm += x * x;
      for (double& x : v) x /= std::sqrt(norm);
      all.push_back(v);
    }
    return all;
  };
  const auto u = basis(rows, values.size(), 1), v = basis(cols, values.size(), 2);
  Tensor m = Tensor::zeros({rows, cols}, DType::F32);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      double sum = 0;
      for (size_t k = 0; k < values.size(); ++k)
        sum += values[k] * u[k][size_t(r)] * v[k][size_t(c)];
      m.data<float>()[r * cols + c] = float(sum);
    }
  return m;
}

TEST(LowRank, FindsKnownSingularValuesExactlyAndBySubspaceIteration) {
  std::vector<double> values;
  for (int k = 0; k < 60; ++k)
    values.push_back(std::pow(0.9, k));  // falls slowly: 16 is far from all
  double all = 0, kept = 0;
  for (size_t k = 0; k < values.size(); ++k) {
    all += values[k] * values[k];
    if (k < 16) kept += values[k] * values[k];
  }
  for (const auto& [rows, cols] : {std::pair{100, 300}, std::pair{320, 280}, std::pair{280, 700}}) {
    const Truncated cut = truncate_dense(with_spectrum(rows, cols, values), 16);
    EXPECT_NEAR(cut.energy, kept / all, 1e-5) << rows;
    EXPECT_NEAR(cut.error, std::sqrt(1 - kept / all), 1e-4) << rows;
    EXPECT_EQ(cut.factors.a.shape(), (Shape{16, cols}));
    EXPECT_EQ(cut.factors.b.shape(), (Shape{rows, 16}));
  }
}

TEST(LowRank, OfZeroIsZero) {
  const Truncated cut = truncate_dense(Tensor::zeros({300, 290}, DType::F32), 4);
  for (const double x : cut.factors.b.to_doubles()) EXPECT_EQ(x, 0);
  EXPECT_EQ(cut.energy, 1);
}

}  // namespace
}  // namespace graft
