// Rotary frequencies against a table made in F64 (shared data), against what transformers computed
// (tests/golden) and against the two ends of each stretching.
#include "nn/rotary.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "models/config.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

RopeConfig config_of(const Json& row) {
  RopeConfig config;
  config.rope_theta = row["rope_theta"];
  if (row["rope_scaling"].is_null()) return config;
  const Json& scaling = row["rope_scaling"];
  config.type = RopeConfig::Type::Llama3;
  config.factor = scaling["factor"];
  config.low_freq_factor = scaling["low_freq_factor"];
  config.high_freq_factor = scaling["high_freq_factor"];
  config.original_max_position_embeddings = scaling["original_max_position_embeddings"];
  return config;
}

TEST(Rotary, FrequenciesAgreeWithTheF64TableOfSevenModels) {
  const char* given = std::getenv("GRAFT_SHARED_DATA");
  const fs::path path = fs::path(given ? given : "../shared/data") / "rope" / "inv_freq.json";
  if (!fs::exists(path)) GTEST_SKIP() << path << " is not there";
  const Json rows = Json::parse(std::ifstream(path));
  ASSERT_EQ(rows.size(), 7u);
  for (const Json& row : rows) {
    const RotaryFrequencies got = rotary_frequencies(config_of(row), row["head_dim"]);
    const std::vector<double> wanted = row["inv_freq"];
    ASSERT_EQ(got.inv_freq.size(), wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i)
      EXPECT_NEAR(got.inv_freq[i], wanted[i], 1e-7 * wanted[i]) << row["name"] << " " << i;
    EXPECT_EQ(got.attention_factor, 1);
  }
}

// transformers computes them in F32, whose last digits differ from ours, which round once.
TEST(Rotary, FrequenciesAndAttentionFactorAgreeWithTransformersForEveryType) {
  int types = 0;
  for (const auto& entry : fs::directory_iterator("tests/golden/models")) {
    const Json golden = Json::parse(std::ifstream(entry.path() / "golden.json"));
    const ModelConfig config = ModelConfig::load(entry.path().string());
    const RotaryFrequencies got = rotary_frequencies(config.rope, config.head_dim);
    const std::vector<double> wanted = golden["inv_freq"];
    ASSERT_EQ(got.inv_freq.size(), wanted.size()) << entry.path();
    for (size_t i = 0; i < wanted.size(); ++i)
      EXPECT_NEAR(got.inv_freq[i], wanted[i], 1e-6 * wanted[i]) << entry.path() << " " << i;
    EXPECT_NEAR(got.attention_factor, golden["rope_attention_factor"].get<double>(), 1e-7);
    types |= 1 << int(config.rope.type);
  }
  EXPECT_EQ(types, 0b1111);
}

TEST(Rotary, TableHoldsCosinesThenSinesTimesTheAttentionFactor) {
  const RotaryFrequencies frequencies{{1.0f, 0.25f}, 2.0};
  const std::vector<double> table =
      rotary_table(frequencies, 3, DType::F32, Device::CPU).to_doubles();
  ASSERT_EQ(table.size(), 12u);
  for (int p = 0; p < 3; ++p)
    for (int i = 0; i < 2; ++i) {
      const double angle = p * (i == 0 ? 1.0 : 0.25);
      EXPECT_NEAR(table[size_t(4 * p + i)], 2 * std::cos(angle), 1e-6);
      EXPECT_NEAR(table[size_t(4 * p + 2 + i)], 2 * std::sin(angle), 1e-6);
    }
}

TEST(Rotary, TableHasNoBytesOnMeta) {
  const RotaryFrequencies frequencies{{1.0f}, 1.0};
  EXPECT_EQ(rotary_table(frequencies, 5, DType::F32, Device::Meta).shape(), (Shape{5, 2}));
}

TEST(Rotary, RefusesAnOddHeadDim) { EXPECT_THROW(rotary_frequencies({}, 7), Error); }

}  // namespace
}  // namespace graft
