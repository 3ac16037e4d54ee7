// Small tokenizers of every supported component, against the ids, byte offsets and texts that the
// Hugging Face tokenizers library gives (tests/golden/make_tokenizer_golden.py), and files that
// must be refused.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "models/tokenizer.h"
#include "tensor/check.h"

namespace graft {
namespace {

using Json = nlohmann::json;

// A directory that goes away with the test.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "graft-tokenizer-XXXXXX").string();
    CHECK(mkdtemp(name.data()), "cannot make ", name);
    path_ = name;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  void write(const std::string& name, const std::string& content) const {
    std::ofstream(path_ + "/" + name, std::ios::binary) << content;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

Tokenizer load(const Json& json) {
  const TemporaryDirectory directory;
  directory.write("tokenizer.json", json.dump());
  return Tokenizer::load(directory.path());
}

Json read_golden(const std::string& name) {
  std::ifstream in("tests/golden/tokenizer/" + name + ".json");
  CHECK(in, "tests/golden/tokenizer/", name, ".json is missing; run from the repository root");
  return Json::parse(in);
}

std::string stream(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  StreamingDecoder decoder(tokenizer, false);
  std::string out;
  for (const int32_t id : ids) out += decoder.push(id);
  return out + decoder.finish();
}

class TokenizerGolden : public testing::TestWithParam<const char*> {};

TEST_P(TokenizerGolden, AgreesWithTheLibrary) {
  const Json golden = read_golden(GetParam());
  const Tokenizer tokenizer = load(golden["tokenizer"]);
  ASSERT_GE(golden["cases"].size(), 31u);
  for (const Json& c : golden["cases"]) {
    const auto encoding = tokenizer.encode(c["text"].get<std::string>(), c["add_special_tokens"]);
    EXPECT_EQ(encoding.ids, c["ids"].get<std::vector<int32_t>>()) << c["text"];
    EXPECT_EQ(Json(encoding.offsets), c["offsets"]) << c["text"];
    EXPECT_EQ(tokenizer.decode(encoding.ids, false), c["decoded"].get<std::string>()) << c["text"];
    EXPECT_EQ(tokenizer.decode(encoding.ids, true),
              c.value("decoded_without_special", c["decoded"].get<std::string>()))
        << c["text"];
    EXPECT_EQ(stream(tokenizer, encoding.ids), c["decoded"].get<std::string>()) << c["text"];
  }
}

INSTANTIATE_TEST_SUITE_P(Fixtures, TokenizerGolden,
                         testing::Values("byte_level_split", "gpt2_prefix", "ignore_merges",
                                         "sentencepiece", "sentencepiece_normalized",
                                         "metaspace_first", "metaspace_whole", "no_unknown",
                                         "whitespace", "nfd_removed", "nfkd_contiguous",
                                         "nfc_previous", "nfkc_next_inverted"),
                         [](const auto& info) { return std::string(info.param); });

// The smallest file that loads; tests change one thing in it.
Json small_file() {
  return Json::parse(R"({
    "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
    "post_processor": null, "decoder": null,
    "model": {"type": "BPE", "unk_token": null, "vocab": {"a": 0, "b": 1, "ab": 2},
              "merges": ["a b"]}})");
}

void expect_refused(const Json& json, const std::string& what) {
  try {
    load(json);
    ADD_FAILURE() << "loaded, expected an error with '" << what << "'";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find(what), message.npos) << message;
    EXPECT_NE(message.find("tokenizer.json"), message.npos) << message;
    EXPECT_EQ(message.find('\n'), message.npos) << message;
  }
}

TEST(Tokenizer, NamesAComponentThatIsNotSupported) {
  for (const char* part : {"normalizer", "pre_tokenizer", "post_processor", "decoder"}) {
    Json file = small_file();
    file[part] = {{"type", "Frobnicate"}};
    expect_refused(file, std::string(part) + " Frobnicate is not supported");
  }
  Json file = small_file();
  file["model"]["type"] = "Unigram";
  expect_refused(file, "model Unigram is not supported");
  file = small_file();
  file["model"]["continuing_subword_prefix"] = "##";
  expect_refused(file, "continuing_subword_prefix");
  file = small_file();
  file["model"]["end_of_word_suffix"] = "</w>";
  expect_refused(file, "end_of_word_suffix");
  file = small_file();
  file["model"]["dropout"] = 0.1;
  expect_refused(file, "dropout");
}

TEST(Tokenizer, RefusesABrokenFile) {
  Json file = small_file();
  file["model"]["merges"] = {"a c"};
  expect_refused(file, "'c' is not in the vocabulary");
  file["model"]["merges"] = {"ab"};
  expect_refused(file, "merge 0");
  file = small_file();
  file["model"]["vocab"]["b"] = 0;
  expect_refused(file, "same id 0");
  file["model"]["vocab"]["b"] = -7;
  expect_refused(file, "-7");
  file["model"]["vocab"]["b"] = 4000000000u;
  expect_refused(file, "4000000000");
  file["model"]["vocab"] = 3;
  expect_refused(file, "vocab");
  file = small_file();
  file["model"].erase("merges");
  expect_refused(file, "merges is missing");
  file = small_file();
  file["model"]["unk_token"] = "<unk>";
  expect_refused(file, "<unk>");
  file = small_file();
  file["added_tokens"] = {{{"id", 3}, {"content", 5}}};
  expect_refused(file, "content");
  file = small_file();
  file["pre_tokenizer"] = {{"type", "Split"},
                           {"pattern", {{"Regex", "(unclosed"}}},
                           {"behavior", "Isolated"},
                           {"invert", false}};
  expect_refused(file, "(unclosed");
  expect_refused(Json::array(), "object");
  const TemporaryDirectory directory;
  EXPECT_THROW(Tokenizer::load(directory.path()), Error);
  directory.write("tokenizer.json", small_file().dump().substr(0, 90));
  EXPECT_THROW(Tokenizer::load(directory.path()), Error);
}

TEST(Tokenizer, TakesInvalidUtf8AsReplacementCharacters) {
  Json file = small_file();
  file["model"]["vocab"]["\xEF\xBF\xBD"] = 3;
  const Tokenizer tokenizer = load(file);
  // A lone continuation byte, a cut sequence of three, a surrogate (three bytes, each broken).
  const auto encoding = tokenizer.encode(
      "a\x80"
      "b\xE2\x82"
      "a\xED\xA0\x80");
  EXPECT_EQ(encoding.ids, (std::vector<int32_t>{0, 3, 1, 3, 0, 3, 3, 3}));
  EXPECT_EQ(Json(encoding.offsets),
            Json::parse("[[0,1],[1,2],[2,3],[3,5],[5,6],[6,7],[7,8],[8,9]]"));
}

TEST(Tokenizer, MergesALongWordInLittleTime) {
  const Tokenizer tokenizer = load(read_golden("byte_level_split")["tokenizer"]);
  // 1 MB of letters is one word, 1 MB of spaces one match of \s+(?!\S). Quadratic time would take
  // hours, which the runner's own limit would notice.
  std::string letters;
  while (letters.size() < 1000000) letters += "thequickbrownfox";
  const auto encoding = tokenizer.encode(letters);
  EXPECT_EQ(tokenizer.decode(encoding.ids), letters);
  const std::string spaces(1000000, ' ');
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(spaces + "x").ids), spaces + "x");
}

TEST(Tokenizer, GivesTheSameIdsFromSeveralThreads) {
  const Tokenizer tokenizer = load(read_golden("sentencepiece")["tokenizer"]);
  const std::string text = "the quick brown fox jumps over the lazy dog, caf\xC3\xA9 \xE4\xBD\xA0";
  const auto expected = tokenizer.encode(text).ids;
  std::vector<std::thread> threads;
  std::array<bool, 4> same{};
  for (bool& result : same) {
    threads.emplace_back([&result, &expected, &text, tokenizer] {
      result = true;
      for (int i = 0; i < 200; ++i) result = result && tokenizer.encode(text).ids == expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const bool result : same) EXPECT_TRUE(result);
}

TEST(Tokenizer, ReadsSpecialTokensOfItsConfig) {
  Json file = small_file();
  file["added_tokens"] = {{{"id", 3}, {"content", "</s>"}, {"special", true}}};
  const TemporaryDirectory directory;
  directory.write("tokenizer.json", file.dump());
  EXPECT_EQ(Tokenizer::load(directory.path()).eos_id(), std::nullopt);
  directory.write("tokenizer_config.json", R"({"eos_token": "</s>", "bos_token": null})");
  const Tokenizer tokenizer = Tokenizer::load(directory.path());
  EXPECT_EQ(tokenizer.eos_id(), 3);
  EXPECT_EQ(tokenizer.bos_id(), std::nullopt);
  EXPECT_EQ(tokenizer.vocab_size(), 4);
  EXPECT_TRUE(tokenizer.is_special(3));
  EXPECT_FALSE(tokenizer.is_special(2));
  EXPECT_EQ(tokenizer.id_to_token(2), "ab");
  EXPECT_THROW(tokenizer.id_to_token(4), Error);
  EXPECT_THROW(tokenizer.id_to_token(-1), Error);
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{2, 77, -1}), "ab");  // unknown ids: passed over
  directory.write("tokenizer_config.json", R"({"eos_token": 3})");
  EXPECT_THROW(Tokenizer::load(directory.path()), Error);
}

}  // namespace
}  // namespace graft
