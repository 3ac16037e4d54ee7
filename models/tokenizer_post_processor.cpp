// Post-processors: what is added around the tokens (TemplateProcessing), and offsets without the
// spaces that byte-level tokens carry (ByteLevel with trim_offsets).
#include <algorithm>

#include "models/tokenizer_parts.h"
#include "tensor/check.h"

namespace graft {
namespace {

class TemplateProcessing : public PostProcessor {
 public:
  TemplateProcessing(const Json& json, const std::string& file) {
    const Json& pieces = json_member(json, "single", file);
    CHECK(pieces.is_array(), file, ": TemplateProcessing: single must be an array");
    bool after = false;
    for (const Json& piece : pieces) {
      if (piece.contains("Sequence")) {
        const std::string id = json_string(piece["Sequence"], "id", file);
        CHECK(id == "A" && !after, file, ": TemplateProcessing: single must have sequence A once");
        after = true;
        continue;
      }
      const std::string id = json_string(json_member(piece, "SpecialToken", file), "id", file);
      const Json& special =
          json_member(json_member(json, "special_tokens", file), id.c_str(), file);
      for (const Json& number : json_member(special, "ids", file)) {
        CHECK(number.is_number_unsigned() && number.get<uint64_t>() <= INT32_MAX, file,
              ": TemplateProcessing: ids of '", id, "' are ", special["ids"].dump());
        (after ? suffix_ : prefix_).push_back(number.get<int32_t>());
      }
    }
    CHECK(after, file, ": TemplateProcessing: single lacks sequence A");
  }

  void apply(std::vector<PlacedToken>& tokens, std::string_view text,
             bool add_special) const override {
    if (!add_special) return;
    std::vector<PlacedToken> front;
    for (const int32_t id : prefix_) front.push_back({id, Span{}, {}});
    tokens.insert(tokens.begin(), front.begin(), front.end());
    const Span end{uint32_t(text.size()), uint32_t(text.size())};
    for (const int32_t id : suffix_) tokens.push_back({id, end, {}});
  }

 private:
  std::vector<int32_t> prefix_, suffix_;
};

// Counts the characters at one end of a byte-level token that stand for spaces.
size_t leading_spaces(std::string_view token) {
  size_t count = 0, length = 0;
  for (size_t at = 0; at < token.size(); at += length, ++count) {
    const uint32_t code_point = text::decode_at(token, at, &length);
    if (code_point != 0x120 && !text::is_white_space(code_point)) break;
  }
  return count;
}
size_t trailing_spaces(std::string_view token) {
  size_t count = 0, length = 0;
  for (size_t at = token.size(); at > 0; ++count) {
    at = text::previous(token, at);
    const uint32_t code_point = text::decode_at(token, at, &length);
    if (code_point != 0x120 && !text::is_white_space(code_point)) break;
  }
  return count;
}

// The start of the next character; the text need not be valid.
size_t next(std::string_view text, size_t at) {
  do {
    ++at;
  } while (at < text.size() && (uint8_t(text[at]) & 0xC0) == 0x80);
  return at;
}

class TrimOffsets : public PostProcessor {
 public:
  explicit TrimOffsets(bool add_prefix_space) : add_prefix_space_(add_prefix_space) {}

  // A space of the token counts as one character of the text, even where the prefix space, which
  // has no place of its own, has the range of the first character.
  void apply(std::vector<PlacedToken>& tokens, std::string_view text, bool) const override {
    for (size_t i = 0; i < tokens.size(); ++i) {
      Span& span = tokens[i].span;
      size_t leading = leading_spaces(tokens[i].text);
      if ((i == 0 || span.begin == 0) && add_prefix_space_ && leading == 1) leading = 0;
      for (; leading > 0 && span.begin < span.end; --leading) {
        span.begin = std::min(uint32_t(next(text, span.begin)), span.end);
      }
      size_t trailing = trailing_spaces(tokens[i].text);
      for (; trailing > 0 && span.end > span.begin; --trailing) {
        span.end = std::max(uint32_t(text::previous(text, span.end)), span.begin);
      }
    }
  }

 private:
  bool add_prefix_space_;
};

class PostProcessorSequence : public PostProcessor {
 public:
  PostProcessorSequence(const Json& list, const std::string& file) {
    CHECK(list.is_array(), file, ": processors of a Sequence must be an array");
    for (const Json& json : list) {
      if (auto step = make_post_processor(json, file)) steps_.push_back(std::move(step));
    }
  }
  void apply(std::vector<PlacedToken>& tokens, std::string_view text,
             bool add_special) const override {
    for (const auto& step : steps_) step->apply(tokens, text, add_special);
  }

 private:
  std::vector<std::unique_ptr<PostProcessor>> steps_;
};

}  // namespace

std::unique_ptr<PostProcessor> make_post_processor(const Json& json, const std::string& file) {
  if (json.is_null()) return nullptr;
  const std::string type = json_type(json, "post_processor", file);
  if (type == "Sequence") {
    return std::make_unique<PostProcessorSequence>(json_member(json, "processors", file), file);
  }
  if (type == "TemplateProcessing") return std::make_unique<TemplateProcessing>(json, file);
  if (type == "ByteLevel") {
    if (!json_bool(json, "trim_offsets", true, file)) return nullptr;
    return std::make_unique<TrimOffsets>(json_bool(json, "add_prefix_space", true, file));
  }
  fail(file, ": post_processor ", type,
       " is not supported, expected one of Sequence, TemplateProcessing, ByteLevel");
}

}  // namespace graft
