// The BPE trainer against the merges that Hugging Face's `tokenizers` learns from the same text.
#include "train/bpe_trainer.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tensor/check.h"

namespace graft {
namespace {

const std::vector<std::string> kTexts = {"the cat sat on the mat.\nthe cats' hats, at 10:30!",
                                         "a hat that the cat sat at: \"hat\", 101 mats",
                                         "Zürich naïve — the café", "aaaa aaa aa a"};

// BpeTrainer(vocab_size=290, special_tokens=["<|endoftext|>"],
// initial_alphabet=ByteLevel.alphabet()) of tokenizers on kTexts. It merges "a a" after "a t"
// although "aaaa" counts its pairs as they overlap, and breaks ties by the smaller ids.
const std::vector<std::pair<std::string, std::string>> kMerges = {
    {"a", "t"},   {"a", "a"},    {"t", "h"},   {"th", "e"}, {"Ġ", "c"},  {"h", "at"},  {"Ġ", "the"},
    {"Ġc", "at"}, {"1", "0"},    {"m", "at"},  {"s", "at"}, {"Ġ", "at"}, {"Ġ", "aa"},  {"Ġ", "hat"},
    {"Ġ", "10"},  {"Ġ", "mat"},  {"Ġ", "sat"}, {"\"", ","}, {"3", "0"},  {"Z", "Ã"},   {"a", "f"},
    {"a", "Ã"},   {"c", "h"},    {"i", "ch"},  {"n", "aÃ"}, {"o", "n"},  {"r", "ich"}, {"v", "e"},
    {"¯", "ve"},  {"¼", "rich"}, {"Ã", "©"},   {"â", "Ģ"},  {"Ġ", "\""}};

TEST(BpeTrainer, LearnsTheMergesThatHuggingFaceLearns) {
  EXPECT_EQ(train_bpe(kTexts, 290, {"<|endoftext|>"}).merges, kMerges);
}

TEST(BpeTrainer, NumbersBytesAsHuggingFaceDoes) {
  const BpeVocabulary vocabulary = train_bpe(kTexts, 290, {"<|endoftext|>"});
  ASSERT_EQ(vocabulary.tokens.size(), 290u);
  for (const auto& [id, token] : std::vector<std::pair<int, std::string>>{{0, "<|endoftext|>"},
                                                                          {1, "!"},
                                                                          {94, "~"},
                                                                          {95, "¡"},
                                                                          {188, "ÿ"},
                                                                          {189, "Ā"},
                                                                          {221, "Ġ"},
                                                                          {256, "Ń"},
                                                                          {257, "at"}})
    EXPECT_EQ(vocabulary.tokens[id], token) << id;
}

TEST(BpeTrainer, StopsWhenEveryWordIsOneToken) {
  const BpeVocabulary vocabulary = train_bpe({"one two one"}, 1000, {"<eos>"});
  const std::set<std::string> tokens(vocabulary.tokens.begin(), vocabulary.tokens.end());
  EXPECT_EQ(tokens.size(), vocabulary.tokens.size());
  for (const char* word : {"one", "Ġone", "Ġtwo"}) EXPECT_EQ(tokens.count(word), 1u) << word;
  EXPECT_LT(vocabulary.tokens.size(), 270u);
}

TEST(BpeTrainer, RefusesAVocabularyWithoutRoomForTheBytes) {
  EXPECT_THROW(train_bpe(kTexts, 256, {"<eos>"}), Error);
}

TEST(BpeTrainer, RefusesTextThatIsNotUtf8) {
  EXPECT_THROW(train_bpe({"ab\xff"}, 300, {"<eos>"}), Error);
}

TEST(BpeTrainer, WritesEveryTokenWithItsIdAndTheEos) {
  const std::string directory =
      (std::filesystem::temp_directory_path() / "graft_bpe_trainer_test").string();
  std::filesystem::create_directories(directory);
  const BpeVocabulary vocabulary = train_bpe(kTexts, 290, {"<|endoftext|>"});
  save_tokenizer(directory, vocabulary);
  const auto read = [&](const char* name) {
    std::ifstream file(directory + "/" + name);
    return nlohmann::json::parse(file);
  };
  const nlohmann::json tokenizer = read("tokenizer.json");
  ASSERT_EQ(tokenizer["model"]["vocab"].size(), 290u);
  for (int id = 0; id < 290; ++id)
    EXPECT_EQ(tokenizer["model"]["vocab"][vocabulary.tokens[id]], id) << vocabulary.tokens[id];
  EXPECT_EQ(tokenizer["model"]["merges"][3], "th e");
  EXPECT_EQ(tokenizer["added_tokens"][0]["special"], true);
  EXPECT_EQ(read("tokenizer_config.json")["eos_token"], "<|endoftext|>");
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace graft
