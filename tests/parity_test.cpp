// Whole models against transformers: logits, losses per token and greedy ids of tiny random models
// of every family and rope type (tests/golden), and of two real ones (shared data, when there).
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "models/generate.h"
#include "models/weights.h"
#include "tensor/backend.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Ids = std::vector<int32_t>;

const fs::path kModels = "tests/golden/models";

Json read_json(const fs::path& path) { return Json::parse(std::ifstream(path)); }

fs::path shared_data() {
  const char* given = std::getenv("GRAFT_SHARED_DATA");
  return given ? given : "../shared/data";
}

std::vector<std::string> golden_models() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(kModels))
    if (fs::exists(entry.path() / "golden.json")) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<double> flatten(const Json& json) {
  std::vector<double> values;
  if (json.is_number()) return {json.get<double>()};
  for (const Json& part : json) {
    const std::vector<double> inner = flatten(part);
    values.insert(values.end(), inner.begin(), inner.end());
  }
  return values;
}

// The largest difference as a share of the largest expected magnitude must be within `tolerance`.
void expect_close(const std::vector<double>& got, const std::vector<double>& wanted,
                  double tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), wanted.size()) << what;
  double largest = 0, worst = 0;
  size_t at = 0;
  for (const double w : wanted) largest = std::max(largest, std::fabs(w));
  for (size_t i = 0; i < got.size(); ++i)
    if (const double error = std::fabs(got[i] - wanted[i]); !(error <= worst)) {
      worst = error;
      at = i;
    }
  EXPECT_LE(worst, tolerance * largest)
      << what << ": worst element " << at << " is " << got[at] << ", wanted " << wanted[at] << ", "
      << 100 * worst / (tolerance * largest) << " % of the tolerance";
}

std::vector<double> logits_of(Decoder& model, const std::vector<Ids>& rows) {
  NoRecord off;
  return model.logits(model.forward(pack(rows), {}).value()).to_doubles();
}

// Losses of the rows, each token but the last of a row predicting the next one.
std::vector<double> losses_of(Decoder& model, const std::vector<Ids>& rows) {
  NoRecord off;
  Tensor losses;
  model.loss(pack(rows, rows), {}, 1, false, &losses);
  const std::vector<double> all = losses.to_doubles();
  std::vector<double> labelled;
  size_t at = 0;
  for (const Ids& row : rows) {
    labelled.insert(labelled.end(), all.begin() + at, all.begin() + at + row.size() - 1);
    at += row.size();
  }
  return labelled;
}

Ids greedy(Decoder& model, const Ids& prompt, size_t count) {
  GenerationConfig config;
  config.do_sample = false;
  config.max_new_tokens = int64_t(count);
  return generate(model, prompt, config);
}

class Golden : public testing::TestWithParam<std::string> {
 protected:
  std::string directory() const { return (kModels / GetParam()).string(); }
  Json golden() const { return read_json(kModels / GetParam() / "golden.json"); }
};

// Rows of a batch do not see each other: both rows are packed into one forward.
TEST_P(Golden, LogitsAgreeInF32) {
  const Json expected = golden();
  const auto model = load_model(directory(), DType::F32);
  expect_close(logits_of(*model, expected["input_ids"]), flatten(expected["logits"]), 1e-4,
               "logits");
}

TEST_P(Golden, LogitsAgreeInF32OnTheReferenceBackend) {
  UseReferenceBackend reference;
  const Json expected = golden();
  const auto model = load_model(directory(), DType::F32);
  expect_close(logits_of(*model, expected["input_ids"]), flatten(expected["logits"]), 1e-4,
               "logits");
}

TEST_P(Golden, LogitsAgreeInBF16) {
  const Json expected = golden();
  const auto model = load_model(directory(), DType::BF16);
  const std::vector<Ids> rows = expected["input_ids"];
  expect_close(logits_of(*model, {rows[0]}), flatten(expected["logits_bf16"]), 2e-2, "logits");
}

TEST_P(Golden, TokenLossesAgree) {
  const Json expected = golden();
  const auto model = load_model(directory(), DType::F32);
  expect_close(losses_of(*model, expected["input_ids"]), flatten(expected["token_losses"]), 1e-4,
               "losses");
}

TEST_P(Golden, GreedyIdsAgree) {
  const Json expected = golden();
  const auto model = load_model(directory(), DType::F32);
  const Ids wanted = expected["greedy_ids"];
  EXPECT_EQ(greedy(*model, expected["greedy_prompt"], wanted.size()), wanted);
}

TEST_P(Golden, ParameterCountAgrees) {
  EXPECT_EQ(num_parameters(ModelConfig::load(directory())), golden()["parameters"].get<int64_t>());
}

INSTANTIATE_TEST_SUITE_P(Models, Golden, testing::ValuesIn(golden_models()),
                         [](const auto& info) { return info.param; });

// The tokens of a row one by one through the cache, and all at once: the same hidden states.
TEST(KvCache, GivesTheLogitsOfTheWholeRow) {
  const Json expected = read_json(kModels / "qwen3_rope_yarn" / "golden.json");
  const auto model = load_model((kModels / "qwen3_rope_yarn").string(), DType::F32);
  const Ids row = expected["input_ids"][0];
  KvCache cache = model->make_cache(int64_t(row.size()));
  std::vector<double> got;
  for (size_t begin = 0; begin < row.size();) {
    const size_t end = std::min(row.size(), begin + (begin == 0 ? 7 : 1));
    const Tensor hidden = model->forward_cached(Ids(row.begin() + begin, row.begin() + end), cache);
    const std::vector<double> part = model->logits(hidden).to_doubles();
    got.insert(got.end(), part.begin(), part.end());
    begin = end;
  }
  expect_close(got, flatten(expected["logits"][0]), 1e-4, "logits");
}

void expect_real_case(Decoder& model, const Json& expected, const char* losses) {
  const Ids prompt = expected["prompt_ids"], wanted = expected["greedy_ids"];
  ASSERT_GE(wanted.size(), 16u);
  EXPECT_EQ(greedy(model, prompt, wanted.size()), wanted);

  const std::vector<double> logits = logits_of(model, {prompt});
  const size_t vocabulary = size_t(model.config().vocab_size);
  expect_close({logits.begin(), logits.begin() + vocabulary},
               flatten(expected["logits_first_prompt_position"]), 1e-4, "first position");
  expect_close({logits.end() - vocabulary, logits.end()},
               flatten(expected["logits_last_prompt_position"]), 1e-4, "last position");

  Ids all = prompt;
  all.insert(all.end(), wanted.begin(), wanted.end());
  expect_close(losses_of(model, {all}), flatten(expected[losses]), 1e-4, "losses");
}

TEST(RealModel, Stories260KAgreesWithItsGolden) {
  const fs::path directory = shared_data() / "stories260K";
  if (!fs::exists(directory)) GTEST_SKIP() << directory << " is not there";
  const Json expected = read_json(directory / "golden.json");
  const auto model = load_model(directory.string());
  EXPECT_EQ(model->compute_dtype(), DType::F32);
  ASSERT_EQ(expected["greedy_ids"].size(), 64u);
  expect_real_case(*model, expected, "nll_per_position_prompt_plus_greedy");
  const Json& loss_case = expected["loss_case"];
  expect_close(losses_of(*model, {loss_case["ids"].get<Ids>()}),
               flatten(loss_case["nll_per_position"]), 1e-4, "losses of the story");
  const Json& zoo = expected["greedy_zoo"];
  const Ids prompt = zoo["prompt_ids"];
  Ids whole = prompt;
  for (const int32_t id : greedy(*model, prompt, zoo["ids"].size() - prompt.size()))
    whole.push_back(id);
  EXPECT_EQ(whole, zoo["ids"].get<Ids>());
}

TEST(RealModel, TinyStories656KAgreesWithItsGolden) {
  const fs::path directory = shared_data() / "TinyStories-656K";
  if (!fs::exists(directory)) GTEST_SKIP() << directory << " is not there";
  const Json expected = read_json(directory / "golden.json");
  const auto model = load_model(directory.string());
  ASSERT_EQ(expected["cases"].size(), 3u);
  ASSERT_EQ(expected["cases"][0]["greedy_ids"].size(), 64u);
  for (const Json& one : expected["cases"]) expect_real_case(*model, one, "nll_per_position");
}

}  // namespace
}  // namespace graft
