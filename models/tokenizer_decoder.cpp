// Decoders as stages that tokens pass one after the other. One implementation serves decode and
// the streaming decoder, so that both say the same.
#include <algorithm>

#include "models/tokenizer_parts.h"
#include "tensor/check.h"

namespace graft {
namespace {

class ReplaceStage : public DecodeStage {
 public:
  ReplaceStage(Pattern pattern, std::string content)
      : pattern_(std::move(pattern)), content_(std::move(content)) {}
  void push(std::string_view token, const Sink& sink) override {
    std::vector<Match> parts;
    pattern_.find_all(parts, token);
    std::string out;
    for (const Match& part : parts) {
      out += part.is_match ? std::string_view(content_)
                           : token.substr(part.begin, part.end - part.begin);
    }
    sink(out);
  }

 private:
  Pattern pattern_;
  std::string content_;
};

// Joins everything; eager, it lets text through as it comes.
class FuseStage : public DecodeStage {
 public:
  explicit FuseStage(bool eager) : eager_(eager) {}
  void push(std::string_view token, const Sink& sink) override {
    if (eager_) return sink(token);
    joined_ += token;
  }
  void finish(const Sink& sink) override {
    if (!eager_) sink(joined_);
    joined_.clear();
  }

 private:
  bool eager_;
  std::string joined_;
};

// Characters of the byte-level alphabet to bytes, joined; bytes that are no UTF-8 to U+FFFD. A
// token with any other character stands for its own bytes.
class ByteLevelStage : public DecodeStage {
 public:
  explicit ByteLevelStage(bool eager) : eager_(eager) {}
  void push(std::string_view token, const Sink& sink) override {
    const size_t before = bytes_.size();
    size_t length = 0;
    for (size_t at = 0; at < token.size(); at += length) {
      const int byte = byte_level_byte(text::decode_at(token, at, &length));
      if (byte < 0) {
        bytes_.resize(before);
        bytes_ += token;
        break;
      }
      bytes_ += char(byte);
    }
    if (eager_) release(sink);
  }
  void finish(const Sink& sink) override {
    sink(text::to_valid_utf8(bytes_));
    bytes_.clear();
  }

 private:
  // Lets go of all but an unfinished character at the end.
  void release(const Sink& sink) {
    size_t ready = 0, length = 0;
    const std::string_view bytes = bytes_;
    while (ready < bytes.size() &&
           text::classify_utf8(bytes.substr(ready), &length) != text::Utf8::incomplete) {
      ready += length;
    }
    if (ready == 0) return;
    const std::string text = text::to_valid_utf8(bytes.substr(0, ready));
    bytes_.erase(0, ready);
    sink(text);
  }
  bool eager_;
  std::string bytes_;
};

// Runs of tokens like <0xE2> to the text that their bytes spell, or to one U+FFFD per byte if the
// run as a whole is not UTF-8. Eager, characters leave as soon as they are whole.
class ByteFallbackStage : public DecodeStage {
 public:
  explicit ByteFallbackStage(bool eager) : eager_(eager) {}
  void push(std::string_view token, const Sink& sink) override {
    const int byte = value(token);
    if (byte < 0) {
      finish(sink);
      return sink(token);
    }
    bytes_ += char(byte);
    if (eager_ && text::is_valid_utf8(bytes_)) finish(sink);
  }
  void finish(const Sink& sink) override {
    if (bytes_.empty()) return;
    if (text::is_valid_utf8(bytes_)) {
      sink(bytes_);
    } else {
      for (size_t i = 0; i < bytes_.size(); ++i) sink(text::kReplacement);
    }
    bytes_.clear();
  }

 private:
  static int value(std::string_view token) {
    if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
    const auto digit = [](char c) {
      return c >= '0' && c <= '9'   ? c - '0'
             : c >= 'A' && c <= 'F' ? c - 'A' + 10
             : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                    : -1;
    };
    const int high = digit(token[3]), low = digit(token[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
  }
  bool eager_;
  std::string bytes_;
};

// Cuts up to `start` and `stop` times `content` from the ends of each token, or, fused, of the
// whole text that passes in parts: then what may belong to its end waits.
class StripStage : public DecodeStage {
 public:
  StripStage(std::string content, size_t start, size_t stop, bool fused)
      : content_(std::move(content)), start_(start), stop_(stop), fused_(fused) {}
  void push(std::string_view token, const Sink& sink) override {
    if (!fused_) {
      size_t start = start_;
      std::string_view rest = cut_front(token, &start);
      for (size_t i = 0; i < stop_ && rest.ends_with(content_); ++i) {
        rest.remove_suffix(content_.size());
      }
      return sink(rest);
    }
    if (token.empty()) return;
    const std::string_view text = cut_front(token, &start_);
    if (!text.empty()) start_ = 0;
    waiting_ += text;
    size_t keep = 0;
    while (keep < stop_ && std::string_view(waiting_)
                               .substr(0, waiting_.size() - keep * content_.size())
                               .ends_with(content_)) {
      ++keep;
    }
    const std::string ready = waiting_.substr(0, waiting_.size() - keep * content_.size());
    waiting_.erase(0, ready.size());
    if (!ready.empty()) sink(ready);
  }

 private:
  std::string_view cut_front(std::string_view token, size_t* times) const {
    while (*times > 0 && token.starts_with(content_)) {
      token.remove_prefix(content_.size());
      --*times;
    }
    return token;
  }
  std::string content_;
  size_t start_, stop_;
  bool fused_;
  std::string waiting_;
};

class MetaspaceStage : public DecodeStage {
 public:
  MetaspaceStage(std::string replacement, bool strips_first)
      : replacement_(std::move(replacement)), strips_(strips_first) {}
  void push(std::string_view token, const Sink& sink) override {
    std::string out;
    for (size_t at = 0; at < token.size();) {
      if (token.substr(at).starts_with(replacement_)) {
        if (!strips_) out += ' ';
        at += replacement_.size();
      } else {
        out += token[at++];
      }
    }
    strips_ = false;
    sink(out);
  }

 private:
  std::string replacement_;
  bool strips_;
};

}  // namespace

DecodePipeline::DecodePipeline(const Json& decoder, bool eager, const std::string& file) {
  if (decoder.is_null()) {
    join_with_spaces_ = true;
  } else {
    add(decoder, eager, file);
  }
}

void DecodePipeline::add(const Json& decoder, bool eager, const std::string& file) {
  const std::string type = json_type(decoder, "decoder", file);
  if (type == "Sequence") {
    const Json& list = json_member(decoder, "decoders", file);
    CHECK(list.is_array(), file, ": decoders of a Sequence must be an array");
    for (const Json& step : list) add(step, eager, file);
  } else if (type == "Replace") {
    // A match may lie across the parts that an eager stage lets through: wait for the whole text.
    if (fused_ && eager) stages_.push_back(std::make_unique<FuseStage>(false));
    stages_.push_back(
        std::make_unique<ReplaceStage>(Pattern(json_member(decoder, "pattern", file), file),
                                       json_string(decoder, "content", file)));
  } else if (type == "ByteFallback") {
    stages_.push_back(std::make_unique<ByteFallbackStage>(eager));
  } else if (type == "Fuse") {
    stages_.push_back(std::make_unique<FuseStage>(eager));
    fused_ = true;
  } else if (type == "ByteLevel") {
    stages_.push_back(std::make_unique<ByteLevelStage>(eager));
    fused_ = true;
  } else if (type == "Strip") {
    const auto count = [&](const char* key) {
      const Json& value = json_member(decoder, key, file);
      CHECK(value.is_number_unsigned(), file, ": decoder Strip: ", key, " is ", value.dump());
      return value.get<size_t>();
    };
    const std::string content = json_string(decoder, "content", file);
    CHECK(!content.empty(), file, ": decoder Strip: content is empty");
    stages_.push_back(std::make_unique<StripStage>(content, count("start"), count("stop"), fused_));
  } else if (type == "Metaspace") {
    const std::string replacement = json_string(decoder, "replacement", file);
    CHECK(!replacement.empty(), file, ": decoder Metaspace: replacement is empty");
    const bool never = decoder.contains("prepend_scheme")
                           ? decoder["prepend_scheme"] == "never"
                           : !json_bool(decoder, "add_prefix_space", true, file);
    stages_.push_back(std::make_unique<MetaspaceStage>(replacement, !never));
  } else {
    fail(file, ": decoder ", type,
         " is not supported, expected one of Sequence, ByteLevel, Replace, ByteFallback, Fuse, "
         "Strip, Metaspace");
  }
}

void DecodePipeline::push(std::string& out, std::string_view token) {
  if (join_with_spaces_ && !first_) out += ' ';
  first_ = false;
  push_from(0, out, token);
}

void DecodePipeline::push_from(size_t stage, std::string& out, std::string_view token) {
  if (stage == stages_.size()) {
    out += token;
    return;
  }
  stages_[stage]->push(token, [&](std::string_view text) { push_from(stage + 1, out, text); });
}

void DecodePipeline::finish(std::string& out) {
  for (size_t i = 0; i < stages_.size(); ++i) {
    stages_[i]->finish([&](std::string_view text) { push_from(i + 1, out, text); });
  }
}

}  // namespace graft
