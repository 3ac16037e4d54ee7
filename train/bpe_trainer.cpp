#include "train/bpe_trainer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "tensor/check.h"

namespace graft {
namespace {

constexpr const char* kWordPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Printable bytes stand for themselves; the others take the code points from 256 on, in order.
std::array<uint32_t, 256> byte_alphabet() {
  std::array<uint32_t, 256> code_points;
  uint32_t next = 256;
  for (uint32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    code_points[b] = printable ? b : next++;
  }
  return code_points;
}

std::string utf8(uint32_t code_point) {  // below 0x800: the byte alphabet ends at U+0143
  if (code_point < 0x80) return {char(code_point)};
  return {char(0xc0 | (code_point >> 6)), char(0x80 | (code_point & 0x3f))};
}

std::map<std::string, int64_t> count_words(const std::vector<std::string>& texts) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  const std::unique_ptr<pcre2_code, void (*)(pcre2_code*)> pattern(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(kWordPattern), PCRE2_ZERO_TERMINATED,
                    PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr),
      pcre2_code_free);
  CHECK(pattern, "train_bpe: the word pattern does not compile at offset ", offset);
  const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> match(
      pcre2_match_data_create_from_pattern(pattern.get(), nullptr), pcre2_match_data_free);

  std::map<std::string, int64_t> counts;
  for (const std::string& text : texts) {
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    for (PCRE2_SIZE at = 0; at < text.size();) {
      const int found =
          pcre2_match(pattern.get(), subject, text.size(), at, 0, match.get(), nullptr);
      CHECK(found > 0, "train_bpe: text is not valid UTF-8 (pcre2 error ", found, ")");
      const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match.get());
      ++counts[text.substr(span[0], span[1] - span[0])];
      at = span[1];
    }
  }
  return counts;
}

struct Word {
  std::vector<int> ids;
  int64_t count;
};

// The most frequent neighbours, the smaller ids among equals; the count is 0 if there are none.
std::pair<std::pair<int, int>, int64_t> best_pair(const std::vector<Word>& words) {
  std::map<std::pair<int, int>, int64_t> counts;
  for (const Word& word : words)
    for (size_t i = 1; i < word.ids.size(); ++i)
      counts[{word.ids[i - 1], word.ids[i]}] += word.count;
  std::pair<std::pair<int, int>, int64_t> best{{0, 0}, 0};
  for (const auto& entry : counts)
    if (entry.second > best.second) best = entry;
  return best;
}

void merge_pair(Word& word, const std::pair<int, int>& pair, int merged) {
  size_t to = 0;
  for (size_t from = 0; from < word.ids.size(); ++from, ++to) {
    const bool here = from + 1 < word.ids.size() && word.ids[from] == pair.first &&
                      word.ids[from + 1] == pair.second;
    word.ids[to] = here ? merged : word.ids[from];
    from += here;
  }
  word.ids.resize(to);
}

void write_json(const std::string& path, const nlohmann::ordered_json& json) {
  std::ofstream file(path, std::ios::binary);
  file << json.dump(1) << "\n";
  file.close();
  CHECK(file.good(), "save_tokenizer: cannot write ", path);
}

}  // namespace

BpeVocabulary train_bpe(const std::vector<std::string>& texts, int vocab_size,
                        const std::vector<std::string>& special_tokens) {
  const int num_special = int(special_tokens.size());
  CHECK(vocab_size >= num_special + 256, "train_bpe: vocab_size is ", vocab_size,
        ", wanted at least ", num_special + 256, ": the special tokens and one for each byte");
  BpeVocabulary vocabulary;
  vocabulary.tokens = special_tokens;
  vocabulary.num_special = num_special;

  const std::array<uint32_t, 256> alphabet = byte_alphabet();
  std::array<int, 256> byte_order;  // bytes by code point, as the library numbers them
  for (int b = 0; b < 256; ++b) byte_order[b] = b;
  std::sort(byte_order.begin(), byte_order.end(),
            [&](int a, int b) { return alphabet[a] < alphabet[b]; });
  std::array<int, 256> byte_id;
  for (int i = 0; i < 256; ++i) {
    byte_id[byte_order[i]] = num_special + i;
    vocabulary.tokens.push_back(utf8(alphabet[byte_order[i]]));
  }

  std::vector<Word> words;
  for (const auto& [text, count] : count_words(texts)) {
    words.push_back({{}, count});
    for (unsigned char byte : text) words.back().ids.push_back(byte_id[byte]);
  }
  while (int(vocabulary.tokens.size()) < vocab_size) {
    const auto [pair, count] = best_pair(words);
    if (count == 0) break;
    const int merged = int(vocabulary.tokens.size());
    for (Word& word : words) merge_pair(word, pair, merged);
    const std::string left = vocabulary.tokens[pair.first], right = vocabulary.tokens[pair.second];
    vocabulary.tokens.push_back(left + right);
    vocabulary.merges.emplace_back(left, right);
  }
  return vocabulary;
}

void save_tokenizer(const std::string& directory, const BpeVocabulary& vocabulary) {
  using Json = nlohmann::ordered_json;
  CHECK(vocabulary.num_special > 0, "save_tokenizer: no special token to serve as eos");
  const std::string& eos = vocabulary.tokens.front();

  Json added = Json::array(), vocab = Json::object(), merges = Json::array();
  for (int id = 0; id < int(vocabulary.tokens.size()); ++id) vocab[vocabulary.tokens[id]] = id;
  for (int id = 0; id < vocabulary.num_special; ++id)
    added.push_back({{"id", id},
                     {"content", vocabulary.tokens[id]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  for (const auto& [left, right] : vocabulary.merges) merges.push_back(left + " " + right);

  const auto byte_level = [](bool trim_offsets) {
    return Json{{"type", "ByteLevel"},
                {"add_prefix_space", false},
                {"trim_offsets", trim_offsets},
                {"use_regex", false}};
  };
  const Json split{{"type", "Split"},
                   {"pattern", {{"Regex", kWordPattern}}},
                   {"behavior", "Isolated"},
                   {"invert", false}};
  const Json model{{"type", "BPE"},
                   {"dropout", nullptr},
                   {"unk_token", nullptr},
                   {"continuing_subword_prefix", nullptr},
                   {"end_of_word_suffix", nullptr},
                   {"fuse_unk", false},
                   {"byte_fallback", false},
                   {"vocab", vocab},
                   {"merges", merges}};
  write_json(directory + "/tokenizer.json",
             {{"version", "1.0"},
              {"truncation", nullptr},
              {"padding", nullptr},
              {"added_tokens", added},
              {"normalizer", nullptr},
              {"pre_tokenizer",
               {{"type", "Sequence"}, {"pretokenizers", Json::array({split, byte_level(false)})}}},
              {"post_processor", nullptr},
              {"decoder", byte_level(false)},
              {"model", model}});
  write_json(directory + "/tokenizer_config.json",
             {{"add_prefix_space", false},
              {"bos_token", nullptr},
              {"eos_token", eos},
              {"pad_token", eos},
              {"tokenizer_class", "PreTrainedTokenizerFast"}});
}

}  // namespace graft
