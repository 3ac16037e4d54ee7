// Added tokens: found in the text before the model sees it, longest first at each place.
#include <algorithm>

#include "models/tokenizer_parts.h"
#include "tensor/check.h"

namespace graft {

void AddedTokens::Trie::insert(std::string_view word, int32_t token) {
  if (word.empty()) return;
  first[uint8_t(word[0])] = true;
  uint32_t node = 0;
  for (const char byte : word) {
    const auto [edge, fresh] =
        edges.try_emplace(uint64_t(node) << 8 | uint8_t(byte), uint32_t(tokens.size()));
    if (fresh) tokens.push_back(-1);
    node = edge->second;
  }
  if (tokens[node] < 0) tokens[node] = token;
}

int32_t AddedTokens::Trie::longest(std::string_view text, size_t at, size_t* length) const {
  if (!first[uint8_t(text[at])]) return -1;
  int32_t found = -1;
  uint32_t node = 0;
  for (size_t i = at; i < text.size(); ++i) {
    const auto edge = edges.find(uint64_t(node) << 8 | uint8_t(text[i]));
    if (edge == edges.end()) break;
    node = edge->second;
    if (tokens[node] < 0) continue;
    found = tokens[node];
    *length = i + 1 - at;
  }
  return found;
}

// As in the library the vocabulary decides: a token that it has keeps that id, another takes the
// next free one after the vocabulary. In a file that the library wrote both are the id in the file.
AddedTokens::AddedTokens(const Json& json, const Bpe& bpe, const Normalizer* normalizer,
                         const std::string& file) {
  CHECK(json.is_array(), file, ": added_tokens must be an array");
  int64_t next_id = bpe.size();
  for (const Json& entry : json) {
    AddedToken token;
    token.content = json_string(entry, "content", file);
    token.single_word = json_bool(entry, "single_word", false, file);
    token.lstrip = json_bool(entry, "lstrip", false, file);
    token.rstrip = json_bool(entry, "rstrip", false, file);
    token.normalized = json_bool(entry, "normalized", true, file);
    token.special = json_bool(entry, "special", false, file);
    if (token.content.empty()) continue;
    const auto known = by_content_.find(token.content);
    if (known != by_content_.end()) {
      token.id = tokens_[known->second].id;
    } else {
      const auto id = bpe.token_to_id(token.content);
      token.id = id ? *id : int32_t(next_id++);
    }
    AlignedText text = AlignedText::from(token.content);
    if (token.normalized && normalizer) normalizer->apply(text);
    token.normalized_content = text.text;
    largest_id_ = std::max<int64_t>(largest_id_, token.id);
    if (known != by_content_.end()) {
      tokens_[known->second] = std::move(token);
      continue;
    }
    by_content_[token.content] = tokens_.size();
    by_id_[token.id] = tokens_.size();
    tokens_.push_back(std::move(token));
  }
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const AddedToken& token = tokens_[i];
    (token.normalized ? normalized_ : raw_).insert(token.normalized_content, int32_t(i));
  }
}

namespace {

bool word_before(std::string_view text, size_t at) {
  size_t length = 0;
  return at > 0 && text::is_word(text::decode_at(text, text::previous(text, at), &length));
}

bool word_after(std::string_view text, size_t at) {
  size_t length = 0;
  return at < text.size() && text::is_word(text::decode_at(text, at, &length));
}

size_t strip_left(std::string_view text, size_t at) {
  size_t length = 0;
  while (at > 0) {
    const size_t before = text::previous(text, at);
    if (!text::is_white_space(text::decode_at(text, before, &length))) break;
    at = before;
  }
  return at;
}

size_t strip_right(std::string_view text, size_t at) {
  size_t length = 0;
  while (at < text.size() && text::is_white_space(text::decode_at(text, at, &length))) at += length;
  return at;
}

}  // namespace

void AddedTokens::split(std::vector<Piece>& out, const AlignedText& buffer, size_t begin,
                        size_t end, bool normalized) const {
  const std::string_view text(buffer.text.data() + begin, end - begin);
  const Trie& trie = normalized ? normalized_ : raw_;
  size_t last = 0;  // where the text that belongs to no token yet starts
  for (size_t at = 0; at < text.size();) {
    size_t length = 0;
    const int32_t index = trie.longest(text, at, &length);
    if (index < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[size_t(index)];
    size_t start = at, stop = at + length;
    at = stop;
    if (token.single_word && (word_before(text, start) || word_after(text, stop))) continue;
    if (token.lstrip) start = std::max(strip_left(text, start), last);
    if (token.rstrip) stop = strip_right(text, stop);
    if (last < start) out.push_back({begin + last, begin + start});
    out.push_back({begin + start, begin + stop, token.id});
    last = stop;
  }
  if (last < text.size()) out.push_back({begin + last, begin + text.size()});
}

const AddedToken* AddedTokens::find(int32_t id) const {
  const auto it = by_id_.find(id);
  return it == by_id_.end() ? nullptr : &tokens_[it->second];
}

const AddedToken* AddedTokens::find(std::string_view content) const {
  const auto it = by_content_.find(std::string(content));
  return it == by_content_.end() ? nullptr : &tokens_[it->second];
}

}  // namespace graft
