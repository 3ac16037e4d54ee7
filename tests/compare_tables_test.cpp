// The README's tables of methods, and the three tasks that they are measured on.
#include "bench/compare_tables.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "train/demo_data.h"

namespace graft {
namespace {

Json cost(const std::string& method, double rate, double memory) {
  return {{"who", "graft"}, {"method", method}, {"tok_s", rate}, {"peak_rss_gib", memory}};
}
Json quality(const std::string& method, int64_t rank, uint64_t seed, double exact, double loss) {
  return {{"task", "entities"}, {"method", method}, {"rank", rank},
          {"seed", seed},       {"exact", exact},   {"loss", loss}};
}

TEST(CompareTables, CostIsTheMedianBesideFullAndThePromise) {
  EXPECT_EQ(cost_table({cost("full", 50, 10), cost("lora", 90, 2), cost("lora", 110, 3),
                        cost("lora", 100, 2.5), cost("qlora", 75, 1)}),
            "| method | peak memory, GiB | of full | a guide's promise | tokens/s | of full |\n"
            "| --- | --- | --- | --- | --- | --- |\n"
            "| full | 10.00 | 100 % | 100 % | 50.0 | 100 % |\n"
            "| LoRA | 2.50 | 25 % | 20 % | 100.0 | 200 % |\n"
            "| QLoRA | 1.00 | 10 % | 10 % | 75.0 | 150 % |\n");
}

TEST(CompareTables, AMethodThatFailedSaysWhyAndNothingIsDividedByIt) {
  const Json failed = {{"who", "graft"}, {"method", "full"}, {"error", "out of memory"}};
  const std::string table = cost_table({failed, cost("lora", 100, 2)});
  EXPECT_NE(table.find("| full | out of memory | | 100 % | | |\n"), std::string::npos) << table;
  EXPECT_NE(table.find("| LoRA | 2.00 |  | 20 % | 100.0 |  |\n"), std::string::npos) << table;
}

TEST(CompareTables, QualityIsTheMeanAndTheRangeOverSeeds) {
  EXPECT_EQ(quality_tables({quality("lora", 16, 1, 1.0, 0.01), quality("lora", 2, 1, 0.5, 0.2),
                            quality("lora", 2, 2, 0.75, 0.4), quality("full", 0, 1, 0.99, 0.02),
                            quality("none", 0, 1, 0.0, 3.0)}),
            "| entities | no adapter | rank 2 | rank 16 |\n"
            "| --- | --- | --- | --- |\n"
            "| base | 0.0 (0.0-0.0), 3.000 |  |  |\n"
            "| full | 99.0 (99.0-99.0), 0.020 |  |  |\n"
            "| LoRA |  | 62.5 (50.0-75.0), 0.300 | 100.0 (100.0-100.0), 0.010 |\n"
            "| QLoRA |  |  |  |\n"
            "| DoRA |  |  |  |\n");
}

TEST(CompareTables, APageWithoutThePlaceIsAnError) {
  EXPECT_EQ(with_section("a\n<!-- methods -->\nold\n<!-- /methods -->\nb", "methods", "new\n"),
            "a\n<!-- methods -->\nnew\n<!-- /methods -->\nb");
  EXPECT_THROW(with_section("a", "methods", "new"), Error);
  EXPECT_THROW(with_section("<!-- methods -->\n", "methods", "new"), Error);
}

TEST(DemoTasks, DifferInTheAnswerAloneAndHoldOutFactsThatWereNotTrained) {
  const DemoSplit entities = demo_split(5, 300, 100);
  std::set<std::string> labels;
  for (const DemoTask task : kDemoTasks) {
    const DemoSplit split = demo_split(5, 300, 100, task);
    ASSERT_EQ(split.train.size(), 300u);
    ASSERT_EQ(split.held_out.size(), 100u);
    std::set<std::string> trained;
    for (size_t i = 0; i < split.train.size(); ++i) {
      EXPECT_EQ(split.train[i].prompt, entities.train[i].prompt);
      trained.insert(split.train[i].prompt);
      if (task == DemoTask::Classification) labels.insert(split.train[i].completion);
    }
    for (const DemoItem& item : split.held_out) EXPECT_FALSE(trained.contains(item.prompt));
  }
  EXPECT_EQ(labels, (std::set<std::string>{" Cairo", " Delhi", " Lima", " Paris", " Perth"}));
}

TEST(DemoTasks, AGenerationTellsTheFactOfItsPrompt) {
  const DemoSplit records = demo_split(6, 20, 0),
                  texts = demo_split(6, 20, 0, DemoTask::Generation);
  for (size_t i = 0; i < texts.train.size(); ++i) {
    const auto record = Json::parse(records.train[i].completion);
    const auto field = [&](const char* key) { return record[key].get<std::string>(); };
    EXPECT_EQ(texts.train[i].completion, " " + field("name") + ", who is a " + field("job") +
                                             " from " + field("city") + ", works in " +
                                             field("city") + " and has a " + field("thing") + ".");
  }
}

}  // namespace
}  // namespace graft
