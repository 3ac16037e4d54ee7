// The parts of a tokenizer, in the order in which text passes them. Each is made from its object in
// tokenizer.json; `file` is the name that errors give. Private to models/tokenizer*.cpp.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "models/tokenizer_text.h"

namespace graft {

using Json = nlohmann::json;
using text::AlignedText;
using text::Match;
using text::Span;

// A pattern of the file: {"String": ...} is found as it stands, {"Regex": ...} is an expression in
// the dialect of Oniguruma, which the files are written for.
class Pattern {
 public:
  Pattern(const Json& json, const std::string& file);  // throws Error for a pattern it cannot keep
  static Pattern regex(const std::string& expression, const std::string& file);

  // Appends to out parts that cover the text in order: matches, and what lies between them.
  void find_all(std::vector<Match>& out, std::string_view text) const;

 private:
  Pattern() = default;
  struct Compiled;
  std::string literal_;
  std::shared_ptr<const Compiled> compiled_;  // null for a literal
};

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual void apply(AlignedText& text) const = 0;
};
std::unique_ptr<Normalizer> make_normalizer(const Json& json, const std::string& file);

// The text in work: one buffer and the pieces of it that remain, in order, none empty. A piece is
// either text to be split further or an added token that was found (token >= 0).
struct Piece {
  size_t begin = 0;
  size_t end = 0;
  int32_t token = -1;
};
struct Pieces {
  AlignedText buffer;
  std::vector<Piece> list;
};

class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  virtual void apply(Pieces& pieces) const = 0;
};
std::unique_ptr<PreTokenizer> make_pre_tokenizer(const Json& json, const std::string& file);

// The 256 characters that byte-level vocabularies spell bytes with, and back (-1: no such byte).
const std::array<std::string, 256>& byte_level_alphabet();
int byte_level_byte(uint32_t code_point);

// The large tables of the file's model, as they stand there.
struct ModelTables {
  bool has_vocab = false;
  bool has_merges = false;
  std::vector<std::pair<std::string, int32_t>> vocab;
  std::vector<std::pair<std::string, std::string>> merges;
};
inline constexpr int64_t kMaxTokenId = 1 << 24;  // an id beyond is a broken file

// The whole file, with null in place of what went into tables.
Json parse_tokenizer_json(ModelTables& tables, const std::string& file);
std::string read_text_file(const std::string& file);

// Byte-pair encoding of one word.
class Bpe {
 public:
  struct Symbol {
    int32_t id;
    uint32_t length;  // bytes of the word
  };
  // Words that were met before. One thread at a time.
  struct WordCache {
    struct Hash {
      using is_transparent = void;
      size_t operator()(std::string_view word) const { return std::hash<std::string_view>{}(word); }
    };
    std::unordered_map<std::string, std::vector<Symbol>, Hash, std::equal_to<>> words;
  };

  Bpe(const Json& model, ModelTables tables, const std::string& file);

  // Appends to out the symbols of word (valid UTF-8).
  void tokenize(std::vector<Symbol>& out, std::string_view word, WordCache& cache) const;

  std::optional<int32_t> token_to_id(std::string_view token) const;
  const std::string* id_to_token(int64_t id) const;  // null if there is none
  int64_t size() const { return int64_t(ids_.size()); }
  int64_t largest_id() const { return int64_t(tokens_.size()) - 1; }

 private:
  struct Merge {
    uint64_t pair;  // left id << 32 | right id; kNoPair in an empty slot
    int32_t rank;
    int32_t id;
  };
  static constexpr uint64_t kNoPair = ~uint64_t{0};

  void read_vocab(ModelTables& tables, const std::string& file);
  void read_merges(const ModelTables& tables, const std::string& file);
  void insert_merge(uint64_t pair, int32_t rank, int32_t id);
  int32_t character_id(uint32_t code_point, std::string_view bytes) const;
  const Merge* find_merge(int32_t left, int32_t right) const;
  void split_to_symbols(std::vector<Symbol>& out, std::string_view word) const;
  void merge_short(std::vector<Symbol>& symbols) const;
  void merge_long(std::vector<Symbol>& symbols) const;
  void merge_word(std::vector<Symbol>& out, std::string_view word) const;
  void tokenize_part(std::vector<Symbol>& out, std::string_view part, WordCache& cache) const;

  std::vector<std::string> tokens_;                    // by id; empty for an id without token
  std::unordered_map<std::string_view, int32_t> ids_;  // views into tokens_
  std::vector<int32_t> character_ids_;                 // by code point below 65536; -1 for none
  std::array<int32_t, 256> byte_ids_;                  // of <0x00> ...; -1 for none
  std::vector<Merge> merges_;                          // open addressing, a power of two of slots
  int merges_shift_ = 0;
  // Pairs of characters, left << 32 | right, that some merge brings together. Between others a long
  // word may be cut without changing its symbols.
  std::unordered_set<uint64_t> bridges_;
  bool cuts_long_words_ = false;
  std::optional<int32_t> unk_;
  bool fuse_unk_ = false;
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
};

struct AddedToken {
  int32_t id = -1;
  std::string content;
  std::string normalized_content;  // what is looked for when `normalized`
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = true;
  bool special = false;
};

// Tokens that are found in the text before anything else looks at it.
class AddedTokens {
 public:
  AddedTokens() = default;
  AddedTokens(const Json& json, const Bpe& bpe, const Normalizer* normalizer,
              const std::string& file);

  // Splits buffer[begin, end) and appends the pieces to out; `normalized` says which tokens to look
  // for: those matched in the raw text or those matched in the normalised one.
  void split(std::vector<Piece>& out, const AlignedText& buffer, size_t begin, size_t end,
             bool normalized) const;

  const AddedToken* find(int32_t id) const;
  const AddedToken* find(std::string_view content) const;
  int64_t largest_id() const { return largest_id_; }

 private:
  // A trie of bytes; node 0 is the root.
  struct Trie {
    std::unordered_map<uint64_t, uint32_t> edges;  // node << 8 | byte -> node
    std::vector<int32_t> tokens{-1};               // by node: index of a token, or -1
    std::array<bool, 256> first{};                 // bytes that some token starts with
    void insert(std::string_view word, int32_t token);
    int32_t longest(std::string_view text, size_t at, size_t* length) const;
  };
  std::vector<AddedToken> tokens_;
  std::unordered_map<int32_t, size_t> by_id_;
  std::unordered_map<std::string, size_t> by_content_;
  Trie raw_;
  Trie normalized_;
  int64_t largest_id_ = -1;
};

// A token with its range of the original text. `text` is what the token spells, valid while the
// buffer that it was cut from lives.
struct PlacedToken {
  int32_t id;
  Span span;
  std::string_view text;
};

class PostProcessor {
 public:
  virtual ~PostProcessor() = default;
  // `text` is the original one.
  virtual void apply(std::vector<PlacedToken>& tokens, std::string_view text,
                     bool add_special) const = 0;
};
std::unique_ptr<PostProcessor> make_post_processor(const Json& json, const std::string& file);

// One step of decoding: takes tokens as strings, gives strings. Stages of one pipeline keep state.
class DecodeStage {
 public:
  using Sink = std::function<void(std::string_view)>;
  virtual ~DecodeStage() = default;
  virtual void push(std::string_view token, const Sink& sink) = 0;
  virtual void finish(const Sink& sink) { (void)sink; }
};

// The chain of stages that a decoder object describes. Eager: text comes out as soon as it is
// certain; otherwise exactly as the library does it, which may be all at the end.
class DecodePipeline {
 public:
  DecodePipeline(const Json& decoder, bool eager, const std::string& file);
  void push(std::string& out, std::string_view token);
  void finish(std::string& out);

 private:
  void add(const Json& decoder, bool eager, const std::string& file);
  void push_from(size_t stage, std::string& out, std::string_view token);
  std::vector<std::unique_ptr<DecodeStage>> stages_;
  bool fused_ = false;  // while building: the stages so far have joined the tokens into one text
  bool join_with_spaces_ = false;
  bool first_ = true;
};

struct TokenizerParts {
  std::string file;
  std::unique_ptr<Normalizer> normalizer;       // null: none
  std::unique_ptr<PreTokenizer> pre_tokenizer;  // null: none
  std::unique_ptr<Bpe> bpe;
  AddedTokens added;
  std::unique_ptr<PostProcessor> post_processor;  // null: none
  Json decoder;
  std::optional<int32_t> bos_id;
  std::optional<int32_t> eos_id;

  // The token's text for decoding; null for an unknown id.
  const std::string* token_text(int32_t id) const;

  // Word caches are lent to one encode at a time, so that the merge loop takes no lock.
  mutable std::mutex caches_mutex;
  mutable std::vector<std::unique_ptr<Bpe::WordCache>> caches;
};

// The member `key` of an object of the file, or an Error that names both.
const Json& json_member(const Json& json, const char* key, const std::string& file);
bool json_bool(const Json& json, const char* key, bool otherwise, const std::string& file);
std::string json_string(const Json& json, const char* key, const std::string& file);
// The "type" of a component.
std::string json_type(const Json& json, const char* what, const std::string& file);

}  // namespace graft
