// Pre-tokenizers: they cut pieces into words, which merges never cross, and may rewrite them.
#include <algorithm>

#include "models/tokenizer_parts.h"
#include "tensor/check.h"

namespace graft {
namespace {

// What happens to the parts that match, here '-' in "a--b":
enum class Behavior {
  removed,               // a, b
  isolated,              // a, -, -, b
  merged_with_previous,  // a-, -, b
  merged_with_next,      // a, -, -b
  contiguous,            // a, --, b
};

Behavior read_behavior(const std::string& name, const std::string& file) {
  if (name == "Removed") return Behavior::removed;
  if (name == "Isolated") return Behavior::isolated;
  if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
  if (name == "MergedWithNext") return Behavior::merged_with_next;
  if (name == "Contiguous") return Behavior::contiguous;
  fail(file, ": pre_tokenizer: behavior '", name, "' is not supported");
}

void merge_with_next(std::vector<Match>& parts) {
  std::vector<Match> out;
  bool previous_match = false;
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    if (part->is_match && !previous_match && !out.empty()) {
      out.back().begin = part->begin;
    } else {
      out.push_back(*part);
    }
    previous_match = part->is_match;
  }
  std::reverse(out.begin(), out.end());
  parts = std::move(out);
}

void merge_forward(std::vector<Match>& parts, bool contiguous) {
  std::vector<Match> out;
  bool previous_match = false;
  for (const Match& part : parts) {
    const bool joins =
        contiguous ? part.is_match == previous_match : part.is_match && !previous_match;
    if (joins && !out.empty()) {
      out.back().end = part.end;
    } else {
      out.push_back(part);
    }
    previous_match = part.is_match;
  }
  parts = std::move(out);
}

// Turns the parts of one piece into those that stay.
void settle(std::vector<Match>& parts, Behavior behavior) {
  switch (behavior) {
    case Behavior::isolated:
      break;
    case Behavior::removed:
      std::erase_if(parts, [](const Match& part) { return part.is_match; });
      break;
    case Behavior::merged_with_next:
      merge_with_next(parts);
      break;
    case Behavior::merged_with_previous:
      merge_forward(parts, false);
      break;
    case Behavior::contiguous:
      merge_forward(parts, true);
      break;
  }
}

// find(out, text) appends the parts of one piece's text.
template <class Find>
void split_pieces(Pieces& pieces, Behavior behavior, const Find& find) {
  std::vector<Piece> out;
  out.reserve(pieces.list.size());
  std::vector<Match> parts;
  for (const Piece& piece : pieces.list) {
    if (piece.token >= 0) {
      out.push_back(piece);
      continue;
    }
    parts.clear();
    find(parts, std::string_view(pieces.buffer.text).substr(piece.begin, piece.end - piece.begin));
    settle(parts, behavior);
    for (const Match& part : parts) {
      if (part.begin < part.end) out.push_back({piece.begin + part.begin, piece.begin + part.end});
    }
  }
  pieces.list = std::move(out);
}

// Every character for which is_match(code_point) holds is a match of its own.
template <class IsMatch>
auto find_characters(const IsMatch& is_match) {
  return [is_match](std::vector<Match>& out, std::string_view text) {
    size_t last = 0, length = 0;
    for (size_t at = 0; at < text.size(); at += length) {
      if (!is_match(text::decode_at(text, at, &length))) continue;
      if (at > last) out.push_back({last, at, false});
      out.push_back({at, at + length, true});
      last = at + length;
    }
    if (last < text.size()) out.push_back({last, text.size(), false});
  };
}

// write(out, buffer, begin, end) appends a piece's new text to the new buffer.
template <class Write>
void rewrite_pieces(Pieces& pieces, const Write& write) {
  AlignedText out;
  out.text.reserve(pieces.buffer.text.size() * 5 / 4 + 16);
  out.spans.reserve(pieces.buffer.text.size() * 5 / 4 + 16);
  for (Piece& piece : pieces.list) {
    const size_t begin = out.text.size();
    if (piece.token >= 0) {
      out.append(pieces.buffer, piece.begin, piece.end);
    } else {
      write(out, pieces.buffer, piece.begin, piece.end);
    }
    piece.begin = begin;
    piece.end = out.text.size();
  }
  pieces.buffer = std::move(out);
}

class ByteLevel : public PreTokenizer {
 public:
  ByteLevel(bool add_prefix_space, bool use_regex, const std::string& file)
      : add_prefix_space_(add_prefix_space) {
    if (!use_regex) return;
    words_ = Pattern::regex(  // GPT-2's
        R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)", file);
  }

  void apply(Pieces& pieces) const override {
    if (add_prefix_space_) {
      rewrite_pieces(pieces, [](AlignedText& out, const AlignedText& in, size_t begin, size_t end) {
        if (in.text[begin] != ' ') out.append(" ", in.spans[begin]);
        out.append(in, begin, end);
      });
    }
    if (words_) {
      split_pieces(pieces, Behavior::isolated, [&](std::vector<Match>& out, std::string_view text) {
        words_->find_all(out, text);
      });
    }
    const auto& alphabet = byte_level_alphabet();
    rewrite_pieces(pieces, [&](AlignedText& out, const AlignedText& in, size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        out.append(alphabet[uint8_t(in.text[i])], in.spans[i]);
      }
    });
  }

 private:
  bool add_prefix_space_;
  std::optional<Pattern> words_;
};

class Split : public PreTokenizer {
 public:
  Split(Pattern pattern, Behavior behavior, bool invert)
      : pattern_(std::move(pattern)), behavior_(behavior), invert_(invert) {}
  void apply(Pieces& pieces) const override {
    split_pieces(pieces, behavior_, [&](std::vector<Match>& out, std::string_view text) {
      pattern_.find_all(out, text);
      if (!invert_) return;
      for (Match& part : out) part.is_match = !part.is_match;
    });
  }

 private:
  Pattern pattern_;
  Behavior behavior_;
  bool invert_;
};

class Metaspace : public PreTokenizer {
 public:
  enum class Prepend { never, first, always };
  Metaspace(std::string replacement, Prepend prepend, bool split)
      : replacement_(std::move(replacement)), prepend_(prepend), split_(split) {
    size_t length = 0;
    code_point_ = text::decode_at(replacement_, 0, &length);
  }

  void apply(Pieces& pieces) const override {
    rewrite_pieces(pieces, [&](AlignedText& out, const AlignedText& in, size_t begin, size_t end) {
      const std::string_view text(in.text.data() + begin, end - begin);
      const bool marked = text[0] == ' ' || text.starts_with(replacement_);
      const bool wanted =
          prepend_ == Prepend::always || (prepend_ == Prepend::first && in.spans[begin].begin == 0);
      if (wanted && !marked) out.append(replacement_, in.spans[begin]);
      for (size_t i = begin; i < end; ++i) {
        if (in.text[i] == ' ') {
          out.append(replacement_, in.spans[i]);
        } else {
          out.append(in, i, i + 1);
        }
      }
    });
    if (!split_) return;
    const uint32_t mark = code_point_;
    split_pieces(pieces, Behavior::merged_with_next,
                 find_characters([mark](uint32_t code_point) { return code_point == mark; }));
  }

 private:
  std::string replacement_;
  uint32_t code_point_ = 0;
  Prepend prepend_;
  bool split_;
};

class Digits : public PreTokenizer {
 public:
  explicit Digits(bool individual) : individual_(individual) {}
  void apply(Pieces& pieces) const override {
    split_pieces(pieces, individual_ ? Behavior::isolated : Behavior::contiguous,
                 find_characters(text::is_numeric));
  }

 private:
  bool individual_;
};

class WhitespaceSplit : public PreTokenizer {
 public:
  void apply(Pieces& pieces) const override {
    split_pieces(pieces, Behavior::removed, find_characters(text::is_white_space));
  }
};

// Words, and runs of what is neither word nor space; spaces are dropped.
class Whitespace : public PreTokenizer {
 public:
  void apply(Pieces& pieces) const override {
    split_pieces(pieces, Behavior::removed, [](std::vector<Match>& out, std::string_view text) {
      size_t length = 0;
      int last_kind = -1;
      for (size_t at = 0; at < text.size(); at += length) {
        const uint32_t code_point = text::decode_at(text, at, &length);
        const int kind = text::is_word(code_point) ? 0 : text::is_white_space(code_point) ? 1 : 2;
        if (kind == last_kind) {
          out.back().end = at + length;
        } else {
          out.push_back({at, at + length, kind == 1});
        }
        last_kind = kind;
      }
    });
  }
};

class PreTokenizerSequence : public PreTokenizer {
 public:
  PreTokenizerSequence(const Json& list, const std::string& file) {
    CHECK(list.is_array(), file, ": pretokenizers of a Sequence must be an array");
    for (const Json& json : list) steps_.push_back(make_pre_tokenizer(json, file));
  }
  void apply(Pieces& pieces) const override {
    for (const auto& step : steps_) {
      if (step) step->apply(pieces);
    }
  }

 private:
  std::vector<std::unique_ptr<PreTokenizer>> steps_;
};

std::unique_ptr<PreTokenizer> make_metaspace(const Json& json, const std::string& file) {
  const std::string replacement = json_string(json, "replacement", file);
  CHECK(!replacement.empty(), file, ": Metaspace: replacement is empty");
  std::string scheme = json.contains("prepend_scheme") ? json_string(json, "prepend_scheme", file)
                                                       : std::string("always");
  if (!json_bool(json, "add_prefix_space", true, file)) {  // the spelling of older files
    CHECK(!json.contains("prepend_scheme") || scheme == "never", file,
          ": Metaspace: add_prefix_space false does not go with prepend_scheme ", scheme);
    scheme = "never";
  }
  CHECK(scheme == "always" || scheme == "first" || scheme == "never", file,
        ": Metaspace: prepend_scheme '", scheme, "' is not supported");
  const auto prepend = scheme == "always"  ? Metaspace::Prepend::always
                       : scheme == "first" ? Metaspace::Prepend::first
                                           : Metaspace::Prepend::never;
  return std::make_unique<Metaspace>(replacement, prepend, json_bool(json, "split", true, file));
}

}  // namespace

std::unique_ptr<PreTokenizer> make_pre_tokenizer(const Json& json, const std::string& file) {
  if (json.is_null()) return nullptr;
  const std::string type = json_type(json, "pre_tokenizer", file);
  if (type == "Sequence") {
    return std::make_unique<PreTokenizerSequence>(json_member(json, "pretokenizers", file), file);
  }
  if (type == "ByteLevel") {
    return std::make_unique<ByteLevel>(json_bool(json, "add_prefix_space", true, file),
                                       json_bool(json, "use_regex", true, file), file);
  }
  if (type == "Split") {
    return std::make_unique<Split>(Pattern(json_member(json, "pattern", file), file),
                                   read_behavior(json_string(json, "behavior", file), file),
                                   json_bool(json, "invert", false, file));
  }
  if (type == "Metaspace") return make_metaspace(json, file);
  if (type == "Digits") {
    return std::make_unique<Digits>(json_bool(json, "individual_digits", false, file));
  }
  if (type == "Whitespace") return std::make_unique<Whitespace>();
  if (type == "WhitespaceSplit") return std::make_unique<WhitespaceSplit>();
  fail(file, ": pre_tokenizer ", type,
       " is not supported, expected one of Sequence, ByteLevel, Split, Metaspace, Digits, "
       "Whitespace, WhitespaceSplit");
}

}  // namespace graft
