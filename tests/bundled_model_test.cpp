// The model that the repository carries (models/demo, made by `graft demo --rebuild-base`): small
// enough, whole, and unable to do the task of the demo by itself.
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "models/generate.h"
#include "models/tokenizer.h"
#include "models/weights.h"
#include "tensor/random.h"
#include "train/demo_data.h"

namespace graft {
namespace {

const std::string kDirectory = "models/demo";

std::string greedy_answer(Decoder& model, const Tokenizer& tokenizer, const std::string& prompt) {
  GenerationConfig greedy = GenerationConfig::load(kDirectory);
  greedy.temperature = 0;
  greedy.max_new_tokens = 48;
  return tokenizer.decode(generate(model, tokenizer.encode(prompt).ids, greedy));
}

TEST(BundledModel, TakesAtMostFourMegabytes) {
  uintmax_t bytes = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(kDirectory))
    if (entry.is_regular_file()) bytes += entry.file_size();
  EXPECT_GT(bytes, 0u);
  EXPECT_LE(bytes, 4'000'000u);
}

TEST(BundledModel, HasOneTokenForEachValueOfTheTask) {
  const Tokenizer tokenizer = Tokenizer::load(kDirectory);
  Random random(11);
  for (int i = 0; i < 500; ++i) {
    const DemoFact fact = demo_fact(random);
    for (const std::string& value : {fact.name, fact.job, fact.city, fact.thing}) {
      EXPECT_EQ(tokenizer.encode(value).ids.size(), 1u) << value;
      EXPECT_EQ(tokenizer.encode(" " + value).ids.size(), 1u) << value;
    }
  }
}

TEST(BundledModel, TokenizesItsTextsAndBack) {
  const Tokenizer tokenizer = Tokenizer::load(kDirectory);
  Random random(12);
  for (int i = 0; i < 300; ++i) {
    const std::string text = demo_base_text(random);
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text).ids), text);
  }
  ASSERT_TRUE(tokenizer.eos_id().has_value());
  EXPECT_EQ(tokenizer.id_to_token(*tokenizer.eos_id()), "<|endoftext|>");
}

TEST(BundledModel, LooksValuesUp) {
  const std::unique_ptr<Decoder> model = load_model(kDirectory);
  const Tokenizer tokenizer = Tokenizer::load(kDirectory);
  Random random(13);
  int right = 0;
  for (int i = 0; i < 50; ++i) {
    const DemoFact fact = demo_fact(random);
    const std::string answer = greedy_answer(*model, tokenizer, fact.sentence + "\nWhich city?");
    right += answer.starts_with(" " + fact.city);
  }
  EXPECT_GE(right, 48);
}

TEST(BundledModel, CannotDoTheTaskOfTheDemo) {
  const std::unique_ptr<Decoder> model = load_model(kDirectory);
  const Tokenizer tokenizer = Tokenizer::load(kDirectory);
  for (const DemoItem& item : demo_split(14, 0, 50).held_out)
    EXPECT_NE(greedy_answer(*model, tokenizer, item.prompt), item.completion);
}

}  // namespace
}  // namespace graft
