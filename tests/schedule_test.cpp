// Learning rates against those of transformers (tests/golden/schedules.json).
#include "train/schedule.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

namespace graft {
namespace {

TEST(Schedule, GivesTheLearningRatesOfTransformers) {
  std::ifstream file("tests/golden/schedules.json");
  ASSERT_TRUE(file) << "tests/golden/schedules.json; run from the root of the tree";
  const std::map<std::string, Schedule::Type> types = {
      {"constant", Schedule::Type::Constant},
      {"constant_with_warmup", Schedule::Type::ConstantWithWarmup},
      {"linear", Schedule::Type::Linear},
      {"cosine", Schedule::Type::Cosine},
      {"cosine_with_min_lr", Schedule::Type::Cosine}};
  int cases = 0;
  for (const auto& golden : nlohmann::json::parse(file)) {
    const std::string name = golden["lr_scheduler_type"];
    Schedule schedule;
    schedule.type = types.at(name);
    schedule.learning_rate = golden["learning_rate"];
    schedule.warmup_steps = golden["warmup_steps"];
    schedule.total_steps = golden["max_steps"];
    schedule.min_lr_ratio = golden.value("min_lr_rate", 0.0);
    const std::vector<double> values = golden["values"];
    ASSERT_FALSE(values.empty());
    for (size_t i = 0; i < values.size(); ++i)
      // The golden values have nine significant digits.
      EXPECT_NEAR(schedule.at(int64_t(i) + 1), values[i], 1e-8 * schedule.learning_rate)
          << golden.dump().substr(0, 120) << " at step " << i + 1;
    ++cases;
  }
  EXPECT_GE(cases, 5);
}

// transformers.TrainingArguments.get_warmup_steps.
TEST(Schedule, WarmupStepsWinOverTheRatioWhichRoundsUp) {
  EXPECT_EQ(num_warmup_steps(7, 0.5, 100), 7);
  EXPECT_EQ(num_warmup_steps(0, 0.03, 100), 3);
  EXPECT_EQ(num_warmup_steps(0, 0.03, 101), 4);
  EXPECT_EQ(num_warmup_steps(0, 0.0, 100), 0);
}

}  // namespace
}  // namespace graft
