// The demo's text: the same for a seed everywhere, held-out answers that were never trained on, and
// a base that never saw the notation of the task.
#include "train/demo_data.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "tensor/random.h"

namespace graft {
namespace {

TEST(DemoData, GivesTheSameItemsForTheSameSeed) {
  const DemoSplit a = demo_split(7, 200, 50), b = demo_split(7, 200, 50);
  ASSERT_EQ(a.train.size(), 200u);
  ASSERT_EQ(a.held_out.size(), 50u);
  for (size_t i = 0; i < a.train.size(); ++i) {
    EXPECT_EQ(a.train[i].prompt, b.train[i].prompt);
    EXPECT_EQ(a.train[i].completion, b.train[i].completion);
  }
  for (size_t i = 0; i < a.held_out.size(); ++i)
    EXPECT_EQ(a.held_out[i].prompt, b.held_out[i].prompt);
}

TEST(DemoData, DrawsOtherHeldOutItemsForAnotherSeed) {
  std::set<std::string> first;
  for (const DemoItem& item : demo_split(1, 0, 100).held_out) first.insert(item.prompt);
  int shared = 0;
  for (const DemoItem& item : demo_split(2, 0, 100).held_out)
    shared += int(first.count(item.prompt));
  EXPECT_LE(shared, 5);
}

TEST(DemoData, HoldsOutAnswersThatNoTrainingItemHas) {
  const DemoSplit split = demo_split(3, 2000, 200);
  std::set<std::string> trained;
  for (const DemoItem& item : split.train) trained.insert(item.completion);
  EXPECT_EQ(trained.size(), split.train.size());
  for (const DemoItem& item : split.held_out) EXPECT_EQ(trained.count(item.completion), 0u);
}

TEST(DemoData, AnswersWithValuesThatStandInTheSentence) {
  for (const DemoItem& item : demo_split(4, 300, 0).train) {
    ASSERT_TRUE(item.prompt.ends_with(". =>")) << item.prompt;
    ASSERT_TRUE(item.completion.starts_with(" {\"name\": \"")) << item.completion;
    int values = 0;
    const std::string& text = item.completion;
    for (size_t at = text.find(": \""); at != std::string::npos; at = text.find(": \"", at + 1)) {
      const std::string value = text.substr(at + 3, text.find('"', at + 3) - at - 3);
      EXPECT_NE(item.prompt.find(value), std::string::npos) << value << " in " << item.prompt;
      ++values;
    }
    EXPECT_EQ(values, 4);
  }
}

TEST(DemoData, NeverShowsTheNotationOfTheTaskToTheBase) {
  Random random(5);
  int braces = 0;
  for (int i = 0; i < 20000; ++i) {
    const std::string text = demo_base_text(random);
    for (size_t at = text.find('{'); at != std::string::npos; at = text.find('{', at + 1)) {
      const std::string record = text.substr(at, text.find('}', at) + 1 - at);
      ASSERT_FALSE(nlohmann::json::accept(record)) << text;
      ++braces;
    }
  }
  EXPECT_GT(braces, 2000);
}

TEST(DemoData, PutsEveryKindOfValueIntoEverySentence) {
  Random random(6);
  for (int i = 0; i < 2000; ++i) {
    const DemoFact fact = demo_fact(random);
    for (const std::string& value : {fact.name, fact.job, fact.city, fact.thing})
      ASSERT_NE(fact.sentence.find(value), std::string::npos) << value << " in " << fact.sentence;
    ASSERT_EQ(fact.sentence.find('@'), std::string::npos) << fact.sentence;
  }
}

}  // namespace
}  // namespace graft
