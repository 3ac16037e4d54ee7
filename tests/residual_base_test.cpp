// PiSSA and OLoRA: the matrices that an adapter begins as, the base that is left, and the adapter
// that is saved. That the training is PEFT's is checked in trajectory_test.cpp.
#include "models/residual_base.h"

#include <algorithm>

#include "models/adapter.h"
#include "models/low_rank.h"
#include "models/weights.h"
#include "nn/dora.h"
#include "tensor/random.h"
#include "tensor/thread_pool.h"
#include "tests/golden_case.h"
#include "train/options.h"

namespace graft {
namespace {

using Init = LoraConfig::Init;
const std::string kModels = "tests/golden/models/";
const nlohmann::json kRows = {{5, 17, 80, 3, 44, 9, 61, 12}, {7, 7, 30, 91}};

// --- matrices --------------------------------------------------------------------------------

Tensor random_matrix(int64_t rows, int64_t cols, uint64_t seed) {
  Random random(seed);
  Tensor m = Tensor::zeros({rows, cols}, DType::F32);
  for (int64_t i = 0; i < m.num_elements(); ++i) m.data<float>()[i] = float(random.normal());
  return m;
}

double norm(const Tensor& t) {
  double sum = 0;
  for (const double x : t.to_doubles()) sum += x * x;
  return std::sqrt(sum);
}

// x y^T of two matrices of rows of one length, or, transposed, x^T y.
std::vector<double> products(const Tensor& x, const Tensor& y, bool transposed) {
  const auto a = x.to_doubles(), b = y.to_doubles();
  const int64_t n = transposed ? x.cols() : x.size(0), length = transposed ? x.size(0) : x.cols();
  const auto at = [&](const std::vector<double>& v, int64_t row, int64_t i) {
    return transposed ? v[size_t(i * n + row)] : v[size_t(row * length + i)];
  };
  std::vector<double> all(size_t(n * n), 0.0);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < n; ++c)
      for (int64_t i = 0; i < length; ++i) all[size_t(r * n + c)] += at(a, r, i) * at(b, c, i);
  return all;
}

TEST(PrincipalPart, IsTheNearestMatrixOfItsRank) {
  for (const auto& [rows, cols] : {std::pair{40, 90}, std::pair{90, 40}, std::pair{30, 30}}) {
    const Tensor m = random_matrix(rows, cols, 1);
    const LowRankTerm part = principal_part(m, 5, 0.5, {}, 0);
    // truncate_dense takes Eigen's SVD at this size.
    EXPECT_NEAR(norm(remainder(m, part)) / norm(m), truncate_dense(m, 5).error, 1e-7);
    const auto of_a = products(part.a, part.a, false), of_b = products(part.b, part.b, true);
    EXPECT_LT(worst_share(of_b, of_a), 1e-6) << "the singular values are shared evenly";
    for (int i = 1; i < 5; ++i) EXPECT_GT(of_a[size_t(i - 1) * 6], of_a[size_t(i) * 6]);
  }
}

// Where singular values are equal, inverse iteration has to find several vectors of one value.
TEST(PrincipalPart, OfEqualOrFewSingularValuesHoldsThemAll) {
  Tensor equal = Tensor::zeros({30, 20}, DType::F32), one = Tensor::zeros({30, 20}, DType::F32);
  for (int i = 0; i < 20; ++i) equal.data<float>()[i * 20 + i] = 3;
  for (int i = 0; i < 600; ++i) one.data<float>()[i] = 1;
  const LowRankTerm part = principal_part(equal, 5, 1, {}, 0);
  const auto of_a = products(part.a, part.a, false);
  for (int i = 0; i < 25; ++i) EXPECT_NEAR(of_a[size_t(i)], i % 6 == 0 ? 3 : 0, 1e-5);
  EXPECT_LT(norm(remainder(one, principal_part(one, 5, 2, {}, 0))), 1e-5);
  const LowRankTerm zero = principal_part(Tensor::zeros({30, 20}, DType::F32), 5, 2, {}, 0);
  EXPECT_EQ(norm(zero.a), 0);
  EXPECT_EQ(norm(zero.b), 0);
  EXPECT_LT(
      norm(remainder(one.slice_rows(0, 1), principal_part(one.slice_rows(0, 1), 1, 1, {}, 0))),
      1e-5);
}

TEST(PrincipalPart, OfSomeRoundsIsNearlyTheExact) {
  const Tensor m = random_matrix(90, 300, 2);
  const double exact = norm(remainder(m, principal_part(m, 8, 1, {}, 0)));
  double before = norm(m);
  for (const int64_t rounds : {0, 2, 8}) {
    const double left = norm(remainder(m, principal_part(m, 8, 1, rounds, 3)));
    EXPECT_GE(left, exact * (1 - 1e-6));
    EXPECT_LT(left, before);
    before = left;
  }
  EXPECT_NEAR(before / exact, 1, 1e-3);
}

TEST(LeadingQr, TakesTheFirstColumnsAway) {
  for (const auto& [rows, cols] : {std::pair{40, 90}, std::pair{90, 40}}) {
    const Tensor m = random_matrix(rows, cols, 4);
    const LowRankTerm part = leading_qr(m, 6);
    const auto of_b = products(part.b, part.b, true);
    for (int i = 0; i < 36; ++i) EXPECT_NEAR(of_b[size_t(i)], i % 7 == 0 ? 1 : 0, 1e-6);
    for (int row = 0; row < 6; ++row)
      for (int col = 0; col < row; ++col) EXPECT_EQ(part.a.data<float>()[row * cols + col], 0);
    EXPECT_LT(norm(remainder(m, part).slice_cols(0, 6)), 1e-5);
  }
}

// --- models ----------------------------------------------------------------------------------

LoraConfig config_of(Init init) {
  LoraConfig config;
  config.r = 4;
  config.lora_alpha = 6;
  config.lora_dropout = 0;
  config.init_lora_weights = init;
  return config;
}

std::unique_ptr<Decoder> begun(const std::string& name, const LoraConfig& config,
                               std::optional<DType> dtype = {}) {
  auto model = load_model(kModels + name, dtype);
  attach_lora(*model, config, 7);
  take_out_adapters(*model, config, 7);
  model->refresh_adapters();
  return model;
}

// In each dtype of a file: F16 computes in F32, and so the residual is F32.
TEST(ResidualBase, ComputesWhatTheBaseDoes) {
  LoraConfig fast = config_of(Init::Pissa);
  fast.pissa_niter = 2;
  LoraConfig dora = config_of(Init::Pissa);
  dora.use_dora = true;
  for (const LoraConfig& config : {config_of(Init::Pissa), config_of(Init::Olora), fast, dora})
    for (const char* name : {"qwen3_tied", "llama_head_dim", "llama_mqa"}) {
      const auto base = load_model(kModels + name), model = begun(name, config);
      EXPECT_LT(worst_share(logits_of(*model, kRows), logits_of(*base, kRows)),
                model->compute_dtype() == DType::BF16 ? 2e-2 : 1e-5)
          << name << ", " << init_name(config);
      const Linear &before = base->layers[0].mlp.up_proj, &after = model->layers[0].mlp.up_proj;
      EXPECT_EQ(after.weight.value().dtype(), model->compute_dtype());
      EXPECT_LT(norm(after.weight.value()), 0.95 * norm(before.weight.value()));
      EXPECT_FALSE(after.weight.requires_grad());
    }
}

void move_away(Decoder& model) {
  uint64_t seed = 100;
  for (const NamedLinear& layer : linear_layers(model)) {
    if (!layer.linear->lora) continue;
    for (auto& [name, leaf] : adapter_leaves(layer.name, *layer.linear->lora)) {
      Random random(seed++);
      for (int64_t i = 0; i < leaf.value().num_elements(); ++i)
        leaf.value().data<float>()[i] *= float(1 + 0.3 * random.normal());
    }
  }
  model.refresh_adapters();
}

TEST(ResidualBase, SavesAnAdapterThatGivesTheSameLogitsOnTheUntouchedBase) {
  LoraConfig patterns = config_of(Init::Pissa);
  patterns.use_rslora = true;  // PEFT does not convert the two together
  patterns.rank_pattern = {{"q_proj", 2}, {"layers.1.mlp.down_proj", 6}};
  patterns.alpha_pattern = {{"v_proj", 3}};
  LoraConfig dora = config_of(Init::Olora);
  dora.use_dora = true;
  LoraConfig fast = config_of(Init::Pissa);
  fast.pissa_niter = 1;
  for (const LoraConfig& config :
       {config_of(Init::Pissa), config_of(Init::Olora), patterns, dora, fast}) {
    const ScratchFolder folder;
    const auto trained = begun("qwen3_tied", config);
    move_away(*trained);
    save_adapter(*trained, config, folder / "a");
    const auto model = load_model(kModels + "qwen3_tied");
    const auto base = logits_of(*model, kRows);
    const LoraConfig saved = load_adapter(*model, folder / "a");
    const auto wanted = logits_of(*trained, kRows);
    EXPECT_LT(worst_share(logits_of(*model, kRows), wanted), 1e-5) << init_name(config);
    EXPECT_GT(worst_share(base, wanted), 0.02);
    EXPECT_EQ(init_name(saved), "true");
    EXPECT_EQ(saved.r, 8);
    EXPECT_EQ(saved.alpha(), config.use_rslora ? 6 * std::sqrt(2.0) : 12);
    EXPECT_EQ(saved.use_dora, config.use_dora);
    if (config.rank_pattern.empty()) continue;
    EXPECT_EQ(saved.rank_pattern, (std::vector<std::pair<std::string, int64_t>>{
                                      {"layers.1.mlp.down_proj", 12}, {"q_proj", 4}}));
    EXPECT_EQ(saved.alpha_pattern[0].second, 3 * std::sqrt(2.0));
  }
}

TEST(ResidualBase, IsTheSameBytesForAnyNumberOfThreads) {
  LoraConfig fast = config_of(Init::Pissa);
  fast.pissa_niter = 2;
  for (const LoraConfig& config : {config_of(Init::Pissa), config_of(Init::Olora), fast}) {
    std::vector<std::vector<double>> one_thread;
    for (const int threads : {1, 2, 3, 8}) {
      set_num_threads(threads);
      const auto model = begun("qwen3_tied", config, DType::BF16);
      std::vector<std::vector<double>> all;
      for (const NamedLinear& layer : linear_layers(*model))
        if (const auto& pair = layer.linear->lora)
          for (const Variable& part : {layer.linear->weight, pair->a, pair->b})
            all.push_back(part.value().to_doubles());
      if (threads == 1) one_thread = all;
      EXPECT_TRUE(all == one_thread) << threads << " threads, " << init_name(config);
    }
  }
  set_num_threads(0);
}

// Where the randomised SVD begins is the seed's; the others take none.
TEST(ResidualBase, TakesTheSeedForTheRandomisedSvdAlone) {
  LoraConfig fast = config_of(Init::Pissa);
  fast.pissa_niter = 0;
  const auto a_of = [](const LoraConfig& config, uint64_t seed) {
    const auto model = load_model(kModels + "qwen3_tied");
    attach_lora(*model, config, seed);
    take_out_adapters(*model, config, seed);
    return model->layers[1].mlp.down_proj.lora->a.value().to_doubles();
  };
  EXPECT_EQ(a_of(config_of(Init::Pissa), 1), a_of(config_of(Init::Pissa), 2));
  EXPECT_EQ(a_of(config_of(Init::Olora), 1), a_of(config_of(Init::Olora), 2));
  EXPECT_NE(a_of(fast, 1), a_of(fast, 2));
  EXPECT_EQ(a_of(fast, 1), a_of(fast, 1));
}

// --- what is refused -------------------------------------------------------------------------

TEST(ResidualBase, RefusesARankBeyondTheWeightByItsName) {
  LoraConfig config = config_of(Init::Pissa);
  config.r = 20;
  EXPECT_EQ(error_of([&] { begun("llama_gqa", config); }),
            "lora: init_lora_weights pissa with r 20, but model.layers.0.self_attn.k_proj is (16, "
            "32); choose a smaller r, or one for this module in rank_pattern");
  config.rank_pattern = {{"k_proj", 16}, {"v_proj", 16}};
  EXPECT_EQ(error_of([&] { begun("llama_gqa", config); }), "");
}

TEST(ResidualBase, AnAdapterThatIsNotConvertedIsRefused) {
  for (const char* init : {"pissa", "pissa_niter_4", "olora"}) {
    const ScratchFolder folder;
    std::filesystem::copy("tests/golden/adapters/qwen3_tied", folder / "a");
    nlohmann::json config = golden_json(folder / "a/adapter_config.json");
    config["init_lora_weights"] = init;
    std::ofstream(folder / "a/adapter_config.json") << config;
    const std::string error = error_of([&] { read_adapter(folder / "a"); });
    EXPECT_NE(
        error.find("init_lora_weights is \"" + std::string(init) + "\": the adapter belongs to"),
        std::string::npos)
        << error;
  }
}

TEST(ResidualBase, OptionsThatContradictItAreRefused) {
  const auto error = [](std::vector<std::string> flags) {
    return error_of([&] {
      TrainOptions options;
      flags.insert(flags.end(), {"--model", "m", "--output-dir", "o"});
      read_flags(options, flags);
      validate(options);
    });
  };
  for (const char* init : {"pissa", "pissa_niter_16", "olora"}) {
    EXPECT_EQ(error({"--init-lora-weights", init}), "");
    EXPECT_EQ(error({"--init-lora-weights", init, "--method", "dora"}), "");
    for (const auto& [flag, value] : {std::pair{"--method", "qlora"},
                                      {"--method", "qdora"},
                                      {"--adapter", "a"},
                                      {"--base-adapters", "a"}})
      EXPECT_TRUE(error({"--init-lora-weights", init, flag, value})
                      .starts_with("train: init_lora_weights is " + std::string(init)))
          << flag;
    EXPECT_NE(error({"--init-lora-weights", init, "--method", "full"}), "");
  }
  for (const char* init : {"pissa_niter_", "pissa_niter_-1", "pissa_niter_1.5", "pissa_niter_1001",
                           "pissa_niter_99999999999999999999", "Pissa", "olora_4", "eva", ""})
    EXPECT_NE(error({"--init-lora-weights", init}).find("expected true, gaussian, false, pissa"),
              std::string::npos)
        << init;
}

TEST(ResidualBase, TheResolvedConfigurationNamesIt) {
  for (const char* init : {"pissa", "pissa_niter_16", "olora"}) {
    TrainOptions options;
    read_flags(options, {"--model", "m", "--output-dir", "o", "--init-lora-weights", init});
    EXPECT_NE(resolved_yaml(options).find(concat("  init_lora_weights: \"", init, "\"\n")),
              std::string::npos);
    EXPECT_EQ(init_name(options.lora), init);
  }
}

}  // namespace
}  // namespace graft
