// The BPE model: characters (or bytes) of a word become symbols, and the pair of neighbours with
// the lowest rank merges until none is left; of equal ranks the leftmost first.
#include <algorithm>
#include <bit>
#include <queue>

#include "models/tokenizer_parts.h"
#include "tensor/check.h"

namespace graft {
namespace {

// Below this many symbols a plain scan for the lowest rank beats a heap.
constexpr size_t kShortWord = 48;
constexpr size_t kLongWord = 32;  // bytes
constexpr size_t kLongestCachedWord = 256;
constexpr size_t kCachedWords = 1 << 16;

std::string byte_token(int byte) {
  constexpr char kHex[] = "0123456789ABCDEF";
  return {'<', '0', 'x', kHex[byte >> 4], kHex[byte & 15], '>'};
}

}  // namespace

Bpe::Bpe(const Json& model, ModelTables tables, const std::string& file) {
  const auto refuse = [&](const char* key) {
    const auto it = model.find(key);
    const bool absent = it == model.end() || it->is_null() || (it->is_string() && *it == "");
    CHECK(absent, file, ": model: ", key, " is not supported, got ",
          it == model.end() ? "" : it->dump());
  };
  refuse("continuing_subword_prefix");
  refuse("end_of_word_suffix");
  const auto dropout = model.find("dropout");
  CHECK(dropout == model.end() || dropout->is_null() || (dropout->is_number() && *dropout == 0),
        file, ": model: dropout is not supported, got ", dropout->dump());
  fuse_unk_ = json_bool(model, "fuse_unk", false, file);
  byte_fallback_ = json_bool(model, "byte_fallback", false, file);
  ignore_merges_ = json_bool(model, "ignore_merges", false, file);
  read_vocab(tables, file);
  if (const auto unk = model.find("unk_token"); unk != model.end() && !unk->is_null()) {
    unk_ = token_to_id(json_string(model, "unk_token", file));
    CHECK(unk_, file, ": model: unk_token ", unk->dump(), " is not in the vocabulary");
  }
  // Not where a whole word may be a token, nor where characters vanish, which shifts offsets.
  cuts_long_words_ = unk_ && !ignore_merges_;
  read_merges(tables, file);
}

void Bpe::read_vocab(ModelTables& tables, const std::string& file) {
  CHECK(tables.has_vocab, file, ": model: vocab is missing, expected an object from token to id");
  int32_t largest = -1;
  for (const auto& [token, id] : tables.vocab) largest = std::max(largest, id);
  tokens_.resize(size_t(largest + 1));
  ids_.reserve(tables.vocab.size());
  character_ids_.assign(65536, -1);
  for (auto& [token, id] : tables.vocab) {
    std::string& place = tokens_[size_t(id)];
    CHECK(place.empty(), file, ": model: vocab: tokens '", token, "' and '", place,
          "' have the same id ", id);
    place = std::move(token);
    if (place.empty()) continue;
    ids_.emplace(place, id);
    size_t length = 0;
    const uint32_t code_point = text::decode_at(place, 0, &length);
    if (length == place.size() && code_point < 65536) character_ids_[code_point] = id;
  }
  for (int byte = 0; byte < 256; ++byte) {
    byte_ids_[size_t(byte)] = token_to_id(byte_token(byte)).value_or(-1);
  }
}

void Bpe::read_merges(const ModelTables& tables, const std::string& file) {
  CHECK(tables.has_merges, file, ": model: merges is missing, expected an array");
  const size_t slots = std::bit_ceil(std::max<size_t>(16, tables.merges.size() * 2));
  merges_.assign(slots, Merge{kNoPair, 0, 0});
  merges_shift_ = 64 - std::countr_zero(slots);
  std::string merged;
  int32_t rank = 0;
  for (const auto& [left, right] : tables.merges) {
    merged.assign(left).append(right);
    const auto left_id = token_to_id(left), right_id = token_to_id(right);
    const auto merged_id = token_to_id(merged);
    CHECK(left_id && right_id && merged_id, file, ": model: merge ", rank, " makes '", merged,
          "' of '", left, "' and '", right, "', but '",
          !left_id    ? left
          : !right_id ? right
                      : merged,
          "' is not in the vocabulary");
    insert_merge(uint64_t(uint32_t(*left_id)) << 32 | uint32_t(*right_id), rank++, *merged_id);
    if (!cuts_long_words_) continue;
    size_t length = 0;
    const uint32_t last = text::decode_at(left, text::previous(left, left.size()), &length);
    bridges_.insert(uint64_t(last) << 32 | text::decode_at(right, 0, &length));
  }
}

// A pair that is listed twice takes its last rank, as the library's hash map does.
void Bpe::insert_merge(uint64_t pair, int32_t rank, int32_t id) {
  size_t slot = size_t(pair * 0x9E3779B97F4A7C15u >> merges_shift_);
  while (merges_[slot].pair != kNoPair && merges_[slot].pair != pair) {
    slot = (slot + 1) & (merges_.size() - 1);
  }
  merges_[slot] = {pair, rank, id};
}

const Bpe::Merge* Bpe::find_merge(int32_t left, int32_t right) const {
  const uint64_t pair = uint64_t(uint32_t(left)) << 32 | uint32_t(right);
  size_t slot = size_t(pair * 0x9E3779B97F4A7C15u >> merges_shift_);
  while (merges_[slot].pair != pair) {
    if (merges_[slot].pair == kNoPair) return nullptr;
    slot = (slot + 1) & (merges_.size() - 1);
  }
  return &merges_[slot];
}

std::optional<int32_t> Bpe::token_to_id(std::string_view token) const {
  const auto it = ids_.find(token);
  return it == ids_.end() ? std::nullopt : std::optional(it->second);
}

const std::string* Bpe::id_to_token(int64_t id) const {
  if (id < 0 || id >= int64_t(tokens_.size()) || tokens_[size_t(id)].empty()) return nullptr;
  return &tokens_[size_t(id)];
}

// -1 if the character is no token.
int32_t Bpe::character_id(uint32_t code_point, std::string_view bytes) const {
  if (code_point < 65536) return character_ids_[code_point];
  return token_to_id(bytes).value_or(-1);
}

// A character that is no token becomes its bytes if all of them are tokens, else the unknown token;
// without one it vanishes. The order is the library's: an unknown token waits for the next
// character that is known, so it comes after the bytes that follow it.
void Bpe::split_to_symbols(std::vector<Symbol>& out, std::string_view word) const {
  uint32_t unknown = 0;  // bytes of the unknown characters that wait
  size_t length = 0;
  for (size_t at = 0; at < word.size(); at += length) {
    const uint32_t code_point = text::decode_at(word, at, &length);
    const int32_t id = character_id(code_point, word.substr(at, length));
    if (id >= 0) {
      if (unknown > 0) out.push_back({*unk_, unknown});
      unknown = 0;
      out.push_back({id, uint32_t(length)});
      continue;
    }
    const auto bytes = word.substr(at, length);
    if (byte_fallback_ && std::all_of(bytes.begin(), bytes.end(),
                                      [&](char byte) { return byte_ids_[uint8_t(byte)] >= 0; })) {
      for (const char byte : bytes) out.push_back({byte_ids_[uint8_t(byte)], 1});
      continue;
    }
    if (!unk_) continue;
    if (unknown > 0 && !fuse_unk_) {
      out.push_back({*unk_, unknown});
      unknown = 0;
    }
    unknown += uint32_t(length);
  }
  if (unknown > 0) out.push_back({*unk_, unknown});
}

void Bpe::merge_short(std::vector<Symbol>& symbols) const {
  constexpr int32_t kNone = INT32_MAX;
  int32_t ranks[kShortWord];   // of the pair (i, i + 1)
  int32_t merged[kShortWord];  // and the id it merges to
  const auto look_up = [&](size_t i) {
    const Merge* merge = find_merge(symbols[i].id, symbols[i + 1].id);
    ranks[i] = merge ? merge->rank : kNone;
    merged[i] = merge ? merge->id : -1;
  };
  size_t count = symbols.size();
  for (size_t i = 0; i + 1 < count; ++i) look_up(i);
  while (count > 1) {
    const size_t best = size_t(std::min_element(ranks, ranks + count - 1) - ranks);
    if (ranks[best] == kNone) break;
    symbols[best] = {merged[best], symbols[best].length + symbols[best + 1].length};
    std::copy(symbols.begin() + best + 2, symbols.begin() + count, symbols.begin() + best + 1);
    if (best + 2 < count) {
      std::copy(ranks + best + 2, ranks + count - 1, ranks + best + 1);
      std::copy(merged + best + 2, merged + count - 1, merged + best + 1);
    }
    --count;
    if (best > 0) look_up(best - 1);
    if (best + 1 < count) look_up(best);
  }
  symbols.resize(count);
}

// A heap of candidate merges over a doubly linked list: n log n, whatever the word.
void Bpe::merge_long(std::vector<Symbol>& symbols) const {
  struct Candidate {
    int32_t rank;
    uint32_t at;
    int32_t id;
    bool operator<(const Candidate& other) const {  // the heap's top is its largest element
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  constexpr uint32_t kEnd = ~0u;
  const uint32_t count = uint32_t(symbols.size());
  std::vector<uint32_t> previous(count), next(count);
  std::vector<Candidate> initial;
  const auto candidate = [&](uint32_t at, uint32_t right) -> std::optional<Candidate> {
    const Merge* merge = find_merge(symbols[at].id, symbols[right].id);
    if (!merge) return std::nullopt;
    return Candidate{merge->rank, at, merge->id};
  };
  for (uint32_t i = 0; i < count; ++i) {
    previous[i] = i == 0 ? kEnd : i - 1;
    next[i] = i + 1 == count ? kEnd : i + 1;
    if (i + 1 == count) break;
    if (const auto found = candidate(i, i + 1)) initial.push_back(*found);
  }
  std::priority_queue<Candidate> queue(std::less<Candidate>{}, std::move(initial));
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    const uint32_t right = next[top.at];
    if (symbols[top.at].length == 0 || right == kEnd) continue;
    // One of the two may have merged with another neighbour since.
    const Merge* merge = find_merge(symbols[top.at].id, symbols[right].id);
    if (!merge || merge->id != top.id) continue;
    symbols[top.at] = {top.id, symbols[top.at].length + symbols[right].length};
    symbols[right].length = 0;
    next[top.at] = next[right];
    if (next[right] != kEnd) previous[next[right]] = top.at;
    if (previous[top.at] != kEnd) {
      if (const auto found = candidate(previous[top.at], top.at)) queue.push(*found);
    }
    if (next[top.at] != kEnd) {
      if (const auto found = candidate(top.at, next[top.at])) queue.push(*found);
    }
  }
  std::erase_if(symbols, [](const Symbol& symbol) { return symbol.length == 0; });
}

void Bpe::merge_word(std::vector<Symbol>& out, std::string_view word) const {
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  split_to_symbols(symbols, word);
  if (symbols.size() <= kShortWord) {
    merge_short(symbols);
  } else {
    merge_long(symbols);
  }
  out.insert(out.end(), symbols.begin(), symbols.end());
}

void Bpe::tokenize_part(std::vector<Symbol>& out, std::string_view word, WordCache& cache) const {
  if (const auto it = cache.words.find(word); it != cache.words.end()) {
    out.insert(out.end(), it->second.begin(), it->second.end());
    return;
  }
  const size_t begin = out.size();
  const auto whole = ignore_merges_ ? token_to_id(word) : std::nullopt;
  if (whole) {
    out.push_back({*whole, uint32_t(word.size())});
  } else {
    merge_word(out, word);
  }
  if (word.size() > kLongestCachedWord) return;
  if (cache.words.size() >= kCachedWords) cache.words.clear();
  cache.words.emplace(word, std::vector<Symbol>(out.begin() + begin, out.end()));
}

// Without a pre-tokenizer the whole text is one word; cut, its parts are short and often met
// before. A cut is safe between two characters of the vocabulary that no merge brings together.
void Bpe::tokenize(std::vector<Symbol>& out, std::string_view word, WordCache& cache) const {
  size_t begin = 0;
  if (cuts_long_words_ && word.size() > kLongWord) {
    size_t length = 0;
    uint64_t left = 0;
    bool left_known = false;
    for (size_t at = 0; at < word.size(); at += length) {
      const uint32_t right = text::decode_at(word, at, &length);
      const bool right_known = character_id(right, word.substr(at, length)) >= 0;
      if (left_known && right_known && !bridges_.contains(left << 32 | right)) {
        tokenize_part(out, word.substr(begin, at - begin), cache);
        begin = at;
      }
      left = right;
      left_known = right_known;
    }
  }
  tokenize_part(out, word.substr(begin), cache);
}

}  // namespace graft
