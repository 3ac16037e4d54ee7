// Logits processors against transformers' (tests/golden/sampling.json), and what decoding promises.
#include "models/generate.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "models/weights.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Ids = std::vector<int32_t>;

constexpr float kFiltered = -std::numeric_limits<float>::infinity();

TEST(ProcessLogits, AgreesWithTransformers) {
  const Json golden = Json::parse(std::ifstream("tests/golden/sampling.json"));
  ASSERT_FALSE(golden["cases"].empty());
  for (const Json& one : golden["cases"]) {
    const Json& row = golden["rows"][one["row"].get<size_t>()];
    const Json& settings = one["settings"];
    GenerationConfig config;
    config.temperature = settings.value("temperature", 1.0);
    config.top_k = settings.value("top_k", 0);
    config.top_p = settings.value("top_p", 1.0);
    config.min_p = settings.value("min_p", 0.0);
    config.repetition_penalty = settings.value("repetition_penalty", 1.0);
    std::vector<float> logits = row["logits"];
    process_logits(logits, row["previous_ids"].get<Ids>(), config);
    for (size_t i = 0; i < logits.size(); ++i) {
      if (one["scores"][i].is_null()) {
        EXPECT_EQ(logits[i], kFiltered) << settings << " token " << i;
      } else {
        const double wanted = one["scores"][i];
        EXPECT_NEAR(logits[i], wanted, 1e-5 * std::max(1.0, std::fabs(wanted)))
            << settings << " token " << i;
      }
    }
  }
}

class Generate : public testing::Test {
 protected:
  Generate() : model_(load_model("tests/golden/models/llama_gqa")) {
    const Json golden = Json::parse(std::ifstream("tests/golden/models/llama_gqa/golden.json"));
    prompt_ = golden["greedy_prompt"].get<Ids>();
    greedy_ids_ = golden["greedy_ids"].get<Ids>();
    config_.max_new_tokens = int64_t(greedy_ids_.size());
  }
  std::unique_ptr<Decoder> model_;
  Ids prompt_, greedy_ids_;
  GenerationConfig config_;
};

TEST_F(Generate, IsGreedyAtTemperatureZero) {
  config_.temperature = 0;
  config_.top_k = 3;
  config_.seed = 99;
  EXPECT_EQ(generate(*model_, prompt_, config_), greedy_ids_);
}

TEST_F(Generate, DrawsTheSameFromTheSameSeedAndOtherFromAnother) {
  config_.temperature = 2;
  config_.seed = 1;
  const Ids one = generate(*model_, prompt_, config_);
  EXPECT_EQ(generate(*model_, prompt_, config_), one);
  config_.seed = 2;
  EXPECT_NE(generate(*model_, prompt_, config_), one);
}

TEST_F(Generate, StopsAtAnEosAndKeepsIt) {
  config_.do_sample = false;
  config_.eos_token_ids = {-1, greedy_ids_[3]};
  const Ids wanted(greedy_ids_.begin(),
                   std::find(greedy_ids_.begin(), greedy_ids_.end(), greedy_ids_[3]) + 1);
  EXPECT_EQ(generate(*model_, prompt_, config_), wanted);
}

TEST_F(Generate, HandsOutEveryTokenAndStopsWhenTold) {
  config_.do_sample = false;
  Ids seen;
  const Ids made = generate(*model_, prompt_, config_, [&](int32_t id) {
    seen.push_back(id);
    return seen.size() < 5;
  });
  EXPECT_EQ(seen.size(), 5u);
  EXPECT_EQ(made, seen);
  EXPECT_TRUE(std::equal(seen.begin(), seen.end(), greedy_ids_.begin()));
}

// Past the first 128 tokens the cache has been grown; the logits must not notice.
TEST_F(Generate, GoesOnAsIfTheCacheHadAlwaysBeenLargeEnough) {
  config_.do_sample = false;
  config_.max_new_tokens = 300;
  const Ids made = generate(*model_, prompt_, config_);
  ASSERT_EQ(made.size(), 300u);
  KvCache cache = model_->make_cache(400);
  Ids next = prompt_;
  for (const int32_t id : made) {
    const Tensor hidden = model_->forward_cached(next, cache);
    const int64_t last = hidden.size(0) - 1;
    const std::vector<double> logits =
        model_->logits(hidden.slice_rows(last, last + 1)).to_doubles();
    ASSERT_EQ(std::max_element(logits.begin(), logits.end()) - logits.begin(), id);
    next = {id};
  }
}

// The share of each token among many draws is its probability, within four standard deviations.
TEST_F(Generate, DrawsInProportionToTheProbabilities) {
  KvCache cache = model_->make_cache(16);
  const Tensor hidden = model_->forward_cached(prompt_, cache);
  const int64_t last = hidden.size(0) - 1;
  const std::vector<double> logits = model_->logits(hidden.slice_rows(last, last + 1)).to_doubles();
  double sum = 0;
  std::vector<double> probability;
  const double largest = *std::max_element(logits.begin(), logits.end());
  for (const double logit : logits) probability.push_back(std::exp(logit - largest));
  for (const double p : probability) sum += p;
  constexpr int kDraws = 2000;
  std::vector<int> count(logits.size());
  config_.max_new_tokens = 1;
  for (config_.seed = 0; config_.seed < kDraws; ++config_.seed)
    ++count[size_t(generate(*model_, prompt_, config_)[0])];
  for (size_t i = 0; i < count.size(); ++i) {
    const double p = probability[i] / sum;
    EXPECT_NEAR(count[i], kDraws * p, 4 * std::sqrt(kDraws * p * (1 - p)) + 1) << "token " << i;
  }
}

TEST_F(Generate, RefusesAnEmptyPromptAndUnknownIds) {
  EXPECT_THROW(generate(*model_, {}, config_), Error);
  EXPECT_THROW(generate(*model_, {96}, config_), Error);
  EXPECT_THROW(generate(*model_, {-1}, config_), Error);
}

class GenerationFile : public testing::Test {
 protected:
  GenerationFile()
      : directory_(fs::temp_directory_path() / ("graft_generation_" + std::to_string(getpid()))) {
    fs::create_directories(directory_);
  }
  ~GenerationFile() override { fs::remove_all(directory_); }
  GenerationConfig load(const std::string& generation, const std::string& model = "{}") {
    std::ofstream(directory_ / "config.json") << model;
    std::ofstream(directory_ / "generation_config.json") << generation;
    return GenerationConfig::load(directory_.string());
  }
  fs::path directory_;
};

// The values of Qwen2.5-0.5B-Instruct's file.
TEST_F(GenerationFile, GivesTheDefaults) {
  const GenerationConfig config = load(R"({"do_sample": true, "temperature": 0.7, "top_k": 20,
    "top_p": 0.8, "repetition_penalty": 1.1, "eos_token_id": [151645, 151643]})");
  EXPECT_TRUE(config.do_sample);
  EXPECT_EQ(config.temperature, 0.7);
  EXPECT_EQ(config.top_k, 20);
  EXPECT_EQ(config.top_p, 0.8);
  EXPECT_EQ(config.repetition_penalty, 1.1);
  EXPECT_EQ(config.eos_token_ids, (Ids{151645, 151643}));
}

TEST_F(GenerationFile, TakesTheEosOfTheModelWhereItHasNone) {
  EXPECT_EQ(load("{}", R"({"eos_token_id": 7})").eos_token_ids, Ids{7});
  EXPECT_EQ(load(R"({"eos_token_id": 8})", R"({"eos_token_id": 7})").eos_token_ids, Ids{8});
  EXPECT_FALSE(load("{}").do_sample);
  fs::remove(directory_ / "generation_config.json");
  EXPECT_EQ(GenerationConfig::load(directory_.string()).max_new_tokens, 128);
}

TEST_F(GenerationFile, RefusesValuesOfTheWrongTypeOrRange) {
  for (const char* text :
       {"", "[]", R"({"temperature": "hot"})", R"({"temperature": -1})", R"({"top_p": -0.5})",
        R"({"repetition_penalty": 0})", R"({"eos_token_id": "x"})", R"({"eos_token_id": [-1]})"})
    EXPECT_THROW(load(text), Error) << text;
}

}  // namespace
}  // namespace graft
