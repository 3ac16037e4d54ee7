// The count behind every utilisation that bench/ prints.
#include "bench/step_flops.h"

#include <gtest/gtest.h>

#include "models/decoder.h"

namespace graft {
namespace {

ModelConfig shape_of(const std::string& name) {
  return ModelConfig::load("bench/models/" + name + ".json");
}

// GFLOP per token as worked out by hand from the published shapes: sequence 2048, r 16, every token
// labelled.
TEST(StepFlops, GivesTheFiguresWorkedOutByHand) {
  const struct {
    const char* name;
    double base, adapters, attention, head;
  } rows[] = {
      {"qwen2.5-0.5b", 0.716 + 0.714, 0.053, 0.088 + 0.220, 0.545},
      {"qwen3-0.6b", 0.881 + 0.872, 0.061, 0.235 + 0.587, 0.622},
      {"qwen3-4b", 7.267 + 7.235, 0.198, 0.604 + 1.510, 1.556},
      {"llama-3.1-8b", 13.96 + 13.91, 0.252, 0.537 + 1.342, 2.101},
  };
  for (const auto& row : rows) {
    const StepFlops flops = step_flops_per_token(shape_of(row.name), 2048, 16, 1);
    EXPECT_NEAR(flops.base / 1e9, row.base, 0.001 * row.base) << row.name;
    EXPECT_NEAR(flops.adapters / 1e9, row.adapters, 0.01 * row.adapters) << row.name;
    EXPECT_NEAR(flops.attention / 1e9, row.attention, 0.005 * row.attention) << row.name;
    EXPECT_NEAR(flops.head / 1e9, row.head, 0.001 * row.head) << row.name;
  }
}

// The names promise a size: parameters of the published models, in millions.
TEST(StepFlops, BenchModelsHaveTheParametersOfTheModelsThatTheyStandFor) {
  EXPECT_EQ(num_parameters(shape_of("qwen2.5-0.5b")), 494'032'768);
  EXPECT_EQ(num_parameters(shape_of("qwen3-0.6b")), 596'049'920);
  EXPECT_EQ(num_parameters(shape_of("qwen3-4b")), 4'022'468'096);
  EXPECT_EQ(num_parameters(shape_of("llama-3.1-8b")), 8'030'261'248);
}

}  // namespace
}  // namespace graft
