// Rows and labels from text and JSONL, with a tokenizer simple enough to count by hand.
#include "train/dataset.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "tensor/check.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
constexpr int32_t kBos = 1, kEos = 2, kNone = -100;

// A token per byte (its code), but "xy" is one token (1000) and '$' is eos itself; `with_bos` puts
// kBos in front, as a post-processor does.
TextEncoder byte_encoder(bool with_bos = false) {
  TextEncoder encoder;
  encoder.eos_id = kEos;
  encoder.encode = [with_bos](const std::string& text) {
    TextEncoder::Tokens tokens;
    if (with_bos) {
      tokens.ids.push_back(kBos);
      tokens.offsets.emplace_back(0, 0);
    }
    for (size_t i = 0; i < text.size(); ++i) {
      const bool pair = text.compare(i, 2, "xy") == 0;
      tokens.ids.push_back(pair ? 1000 : text[i] == '$' ? kEos : text[i]);
      tokens.offsets.emplace_back(i, i + (pair ? 2 : 1));
      i += pair;
    }
    return tokens;
  };
  return encoder;
}

class DatasetFiles : public testing::Test {
 protected:
  DatasetFiles() {
    folder_ = fs::temp_directory_path() / ("graft_dataset_" + std::to_string(getpid()));
    fs::create_directories(folder_);
  }
  ~DatasetFiles() override { fs::remove_all(folder_); }
  std::string write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ / name, std::ios::binary) << text;
    return folder_ / name;
  }
  std::string error(const std::vector<std::string>& sources, int64_t max_seq_length = 100) {
    try {
      load_dataset(sources, byte_encoder(), max_seq_length);
    } catch (const Error& error) {
      std::string what = error.what();
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      for (size_t at; (at = what.find(folder_.string() + "/")) != std::string::npos;)
        what.erase(at, folder_.string().size() + 1);
      return what;
    }
    return "no error";
  }
  fs::path folder_;
};

TEST(Dataset, ADocumentIsCutIntoConsecutiveRowsWithEosAtTheEndOfTheLast) {
  Dataset data;
  add_document(data, "abcdefgh", byte_encoder(), 4, "x");
  ASSERT_EQ(data.rows.size(), 3u);
  EXPECT_EQ(data.rows[0].ids, (std::vector<int32_t>{'a', 'b', 'c', 'd'}));
  // One token alone has nothing before it: the row before lends one.
  EXPECT_EQ(data.rows[1].ids, (std::vector<int32_t>{'e', 'f', 'g'}));
  EXPECT_EQ(data.rows[2].ids, (std::vector<int32_t>{'h', kEos}));
  for (const Row& row : data.rows) EXPECT_EQ(row.labels, row.ids);
  EXPECT_EQ(data.num_tokens(), 9);
  EXPECT_EQ(data.num_label_tokens(), 6);
  EXPECT_EQ(data.truncated, 0);
}

TEST(Dataset, OnlyTokensThatBeginInsideTheCompletionAndTheEosAreLabelled) {
  Dataset data;
  add_completion_row(data, "ab", "cd", byte_encoder(/*with_bos=*/true), 100, "x");
  ASSERT_EQ(data.rows.size(), 1u);
  EXPECT_EQ(data.rows[0].ids, (std::vector<int32_t>{kBos, 'a', 'b', 'c', 'd', kEos}));
  EXPECT_EQ(data.rows[0].labels, (std::vector<int32_t>{kNone, kNone, kNone, 'c', 'd', kEos}));
  EXPECT_EQ(data.rows[0].num_label_tokens(), 3);
  EXPECT_EQ(data.straddling, 0);
}

TEST(Dataset, ATokenOnTheBorderIsNotLabelledAndCounted) {
  Dataset data;
  add_completion_row(data, "ax", "yb", byte_encoder(), 100, "x");
  EXPECT_EQ(data.rows[0].ids, (std::vector<int32_t>{'a', 1000, 'b', kEos}));
  EXPECT_EQ(data.rows[0].labels, (std::vector<int32_t>{kNone, kNone, 'b', kEos}));
  EXPECT_EQ(data.straddling, 1);
  EXPECT_NE(data.summary(100).find("1 with a token on the border"), std::string::npos);
}

TEST(Dataset, AnEosThatIsThereAlreadyIsNotDoubled) {
  Dataset data;
  add_completion_row(data, "a", "b$", byte_encoder(), 100, "x");
  add_text_row(data, "ab$", byte_encoder(), 100, "x");
  add_document(data, "ab$", byte_encoder(), 100, "x");
  for (const Row& row : data.rows) EXPECT_EQ(row.ids, (std::vector<int32_t>{'a', 'b', kEos}));
  EXPECT_EQ(data.rows[0].labels, (std::vector<int32_t>{kNone, 'b', kEos}));
}

TEST(Dataset, AnEmptyCompletionStillTeachesTheEos) {
  Dataset data;
  add_completion_row(data, "ab", "", byte_encoder(), 100, "x");
  EXPECT_EQ(data.rows[0].labels, (std::vector<int32_t>{kNone, kNone, kEos}));
}

TEST(Dataset, LongRowsAreTruncatedCountedAndReported) {
  Dataset data;
  add_text_row(data, "abcdef", byte_encoder(), 4, "x");
  add_text_row(data, "abc", byte_encoder(), 4, "x");
  EXPECT_EQ(data.rows[0].ids, (std::vector<int32_t>{'a', 'b', 'c', 'd'}));
  EXPECT_EQ(data.truncated, 1);
  EXPECT_EQ(data.summary(4), "2 rows, 8 tokens (6 trained), 1 truncated to 4");
}

TEST_F(DatasetFiles, ReadsFilesFoldersAndPatternsInOrder) {
  const std::string b = write("b.jsonl", "{\"text\": \"b1\"}\r\n\n{\"text\": \"b2\", \"id\": 7}");
  const std::string a = write("a.txt", "a");
  write("c.md", "not data");
  for (const std::string& source : {folder_.string(), folder_.string() + "/[ab].*"}) {
    const Dataset data = load_dataset({source}, byte_encoder(), 100);
    ASSERT_EQ(data.rows.size(), 3u);
    EXPECT_EQ(data.rows[0].ids, (std::vector<int32_t>{'a', kEos}));
    EXPECT_EQ(data.rows[2].ids, (std::vector<int32_t>{'b', '2', kEos}));
  }
  EXPECT_EQ(load_dataset({b, a}, byte_encoder(), 100).rows[2].ids[0], 'a');
}

TEST_F(DatasetFiles, BadDataIsNamedByFileAndLine) {
  const std::string good = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
  const std::string example =
      "{\"text\": \"...\"} or {\"prompt\": \"...\", \"completion\": \"...\"}";
  EXPECT_EQ(error({write("a.jsonl", good + "\n{\"prompt\": \n")}),
            "a.jsonl:3: not JSON (byte 12); expected one object per line, such as " + example);
  EXPECT_EQ(error({write("a.jsonl", "[1]")}),
            "a.jsonl:1: got array, expected an object such as " + example);
  EXPECT_EQ(error({write("a.jsonl", "{\"messages\": [], \"id\": 1}")}),
            "a.jsonl:1: has neither text nor prompt and completion (keys: id, messages); expected "
            "an object such as " +
                example);
  EXPECT_EQ(error({write("a.jsonl", "{\"prompt\": \"a\"}")}),
            "a.jsonl:1: completion is missing; expected an object such as " + example);
  EXPECT_EQ(error({write("a.jsonl", "{\"text\": 3}")}),
            "a.jsonl:1: text: got number, expected a string");
  EXPECT_EQ(error({write("a.jsonl", good + "{\"text\": \"a\"}")}),
            "a.jsonl:2: has text, but a.jsonl:1 has prompt and completion; all rows must be of one "
            "kind");
  EXPECT_EQ(error({write("a.jsonl", "{\"text\": \"a\", \"prompt\": \"\"}")}),
            "a.jsonl:1: has text and prompt or completion; leave one of the two");
  EXPECT_EQ(error({write("a.jsonl", " \n\n")}),
            "data: a.jsonl: is empty; expected an object per line");
  EXPECT_EQ(error({write("a.txt", "")}), "data: a.txt: is empty; expected text");
  EXPECT_EQ(error({write("a.txt", "good\n\xff\xfe a")}),
            "data: a.txt:2: is not UTF-8; convert the file, for instance with iconv -t UTF-8");
  EXPECT_EQ(error({folder_ / "missing.txt"}),
            "data: missing.txt: no such file; expected *.txt or *.jsonl");
  EXPECT_EQ(error({write("a.csv", "a,b")}),
            "data: a.csv: unknown kind of file; expected *.txt (text) or *.jsonl (an object per "
            "line)");
  EXPECT_EQ(error({}), "data: no files are given");
}

TEST_F(DatasetFiles, ARowWithoutATrainedTokenIsAnErrorThatSaysWhatToDo) {
  EXPECT_EQ(error({write("a.jsonl", "{\"prompt\": \"abcdef\", \"completion\": \"g\"}")}, 6),
            "a.jsonl:1: no token of this row is trained once it is cut from 8 to max_seq_length 6 "
            "tokens; raise max_seq_length or shorten the prompt");
  EXPECT_EQ(error({write("a.jsonl", "{\"text\": \"\"}")}),
            "a.jsonl:1: the row is empty: no token of it is worth training; give it text or remove "
            "it");
  EXPECT_EQ(error({write("a.jsonl", "{\"prompt\": \"\", \"completion\": \"\"}")}),
            "a.jsonl:1: the row is empty: no token of it is worth training; give it text or remove "
            "it");
}

TEST(Dataset, ASplitIsDeterministicAndDisjoint) {
  const auto rows = [] {
    Dataset data;
    for (int i = 0; i < 50; ++i) data.rows.push_back({{i, i}, {i, i}});
    return data;
  };
  const auto firsts = [](const Dataset& data) {
    std::set<int32_t> ids;
    for (const Row& row : data.rows) ids.insert(row.ids[0]);
    return ids;
  };
  Dataset train = rows(), again = rows(), other = rows(), counted = rows();
  const Dataset eval = split_off(train, 0.1, 5);
  EXPECT_EQ(eval.rows.size(), 5u);
  EXPECT_EQ(train.rows.size(), 45u);
  std::set<int32_t> all = firsts(train);
  all.merge(firsts(eval));
  EXPECT_EQ(all.size(), 50u);
  EXPECT_EQ(firsts(split_off(again, 0.1, 5)), firsts(eval));
  EXPECT_NE(firsts(split_off(other, 0.1, 6)), firsts(eval));
  EXPECT_EQ(split_off(counted, 7, 5).rows.size(), 7u);
  EXPECT_THROW(split_off(counted, 100, 5), Error);
}

TEST(Dataset, TheFingerprintSeesIdsLabelsAndOrder) {
  Dataset a, b;
  a.rows = {{{1, 2}, {1, 2}}, {{3, 4}, {3, 4}}};
  b = a;
  EXPECT_EQ(a.fingerprint(), b.fingerprint());
  std::swap(b.rows[0], b.rows[1]);
  EXPECT_NE(a.fingerprint(), b.fingerprint());
  b = a;
  b.rows[0].labels[0] = kNone;
  EXPECT_NE(a.fingerprint(), b.fingerprint());
}

}  // namespace
}  // namespace graft
