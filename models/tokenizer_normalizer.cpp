// Normalizers: they rewrite text and keep, for each byte, where it came from. The Unicode forms
// follow the library's own algorithm step by step, because it decides the offsets.
#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>

#include "models/tokenizer_parts.h"
#include "tensor/check.h"

namespace graft {
namespace {

// A character of the new text. change 0: stands in the place of the next old character; 1: is
// inserted, with the span of what precedes; -n: replaces the next old one and swallows n more.
struct Change {
  uint32_t code_point;
  int change;
  int combining_class;
};

void rewrite(AlignedText& text, const std::vector<Change>& changes) {
  AlignedText out;
  out.text.reserve(text.text.size());
  out.spans.reserve(text.text.size());
  size_t at = 0;  // in the old text
  const auto skip = [&] {
    if (at == text.text.size()) return;
    size_t length = 0;
    text::decode_at(text.text, at, &length);
    at += length;
  };
  std::string bytes;
  for (const Change& change : changes) {
    Span span;
    if (change.change > 0) {
      if (at > 0) span = text.spans[at - 1];
    } else {
      span = text.spans[std::min(at, text.spans.size() - 1)];
      for (int i = 0; i <= -change.change; ++i) skip();
    }
    bytes.clear();
    text::append_utf8(bytes, change.code_point);
    out.append(bytes, span);
  }
  text = std::move(out);
}

// The reference library normalises by the tables of Unicode 9 and takes what came later for
// ordinary characters. So that ids agree, these are ordinary here too: combining marks ...
constexpr Span kNewerMarks[] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},
    {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},
    {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},   {0x10D24, 0x10D27},
    {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85},
    {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
    {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45},
    {0x11D97, 0x11D97}, {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}};
// ... and characters with a decomposition.
constexpr Span kNewerDecompositions[] = {{0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},   {0xAB69, 0xAB69},
                                         {0x10781, 0x10785}, {0x10787, 0x107B0}, {0x107B2, 0x107BA},
                                         {0x11938, 0x11938}, {0x1E030, 0x1E06D}, {0x1F16C, 0x1F16C},
                                         {0x1FBF0, 0x1FBF9}};

// Whether code_point is in one of the sorted ranges (both ends belong to a range).
template <size_t n>
bool contains(const Span (&ranges)[n], uint32_t code_point) {
  const auto range = std::lower_bound(
      ranges, ranges + n, code_point,
      [](const Span& candidate, uint32_t wanted) { return candidate.end < wanted; });
  return range != ranges + n && code_point >= range->begin;
}

int combining_class(uint32_t code_point) {
  const int known = utf8proc_get_property(utf8proc_int32_t(code_point))->combining_class;
  return known != 0 && contains(kNewerMarks, code_point) ? 0 : known;
}

// NFC, NFD, NFKC, NFKD.
class UnicodeForm : public Normalizer {
 public:
  UnicodeForm(bool compatible, bool compose) : compatible_(compatible), compose_(compose) {}

  void apply(AlignedText& text) const override {
    if (is_normal(text.text)) return;
    std::vector<Change> changes = decompose(text.text);
    if (compose_) changes = recompose(changes);
    rewrite(text, changes);
  }

 private:
  bool is_normal(const std::string& text) const {
    // Below U+0300 NFC changes nothing; below U+0080 no form does.
    const uint8_t harmless = compose_ && !compatible_ ? 0xCC : 0x80;
    if (std::all_of(text.begin(), text.end(),
                    [&](char byte) { return uint8_t(byte) < harmless; })) {
      return true;
    }
    const int options = UTF8PROC_STABLE | (compose_ ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) |
                        (compatible_ ? UTF8PROC_COMPAT : 0);
    utf8proc_uint8_t* result = nullptr;
    const auto size =
        utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                     utf8proc_ssize_t(text.size()), &result, utf8proc_option_t(options));
    CHECK(size >= 0, "normalizer: ", utf8proc_errmsg(size));
    const bool same = std::string_view(reinterpret_cast<char*>(result), size_t(size)) == text;
    std::free(result);
    return same;
  }

  std::vector<Change> decompose(const std::string& text) const {
    std::vector<Change> out;
    out.reserve(text.size());
    size_t unordered = 0;  // marks from here on are still to be put in order of combining class
    const auto put_in_order = [&] {
      std::stable_sort(out.begin() + unordered, out.end(), [](const Change& a, const Change& b) {
        return a.combining_class < b.combining_class;
      });
    };
    size_t length = 0;
    for (size_t at = 0; at < text.size(); at += length) {
      const uint32_t code_point = text::decode_at(text, at, &length);
      utf8proc_int32_t parts[32];
      int boundary = 0;
      const int options = UTF8PROC_DECOMPOSE | (compatible_ ? UTF8PROC_COMPAT : 0);
      if (contains(kNewerDecompositions, code_point)) {
        put_in_order();
        unordered = out.size() + 1;
        out.push_back({code_point, 0, 0});
        continue;
      }
      const auto count = utf8proc_decompose_char(utf8proc_int32_t(code_point), parts, 32,
                                                 utf8proc_option_t(options), &boundary);
      for (utf8proc_ssize_t i = 0; i < count; ++i) {
        const int klass = combining_class(uint32_t(parts[i]));
        if (klass == 0) {
          put_in_order();
          unordered = out.size() + 1;
        }
        out.push_back({uint32_t(parts[i]), i > 0, klass});
      }
    }
    put_in_order();
    return out;
  }

  // The primary composite of two characters, or 0.
  static uint32_t composite(uint32_t first, uint32_t second) {
    utf8proc_int32_t pair[2] = {utf8proc_int32_t(first), utf8proc_int32_t(second)};
    const auto count =
        utf8proc_normalize_utf32(pair, 2, utf8proc_option_t(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
    if (count != 1 || contains(kNewerDecompositions, uint32_t(pair[0]))) return 0;
    return uint32_t(pair[0]);
  }

  // A mark is merged into the last starter unless one of its own or a higher class lies between.
  static std::vector<Change> recompose(const std::vector<Change>& decomposed) {
    std::vector<Change> out;
    out.reserve(decomposed.size());
    size_t starter = SIZE_MAX;
    int last_class = -1;  // of what was kept after the starter; -1: nothing
    for (const Change& change : decomposed) {
      if (starter != SIZE_MAX && last_class < change.combining_class) {
        if (const uint32_t merged = composite(out[starter].code_point, change.code_point)) {
          out[starter].code_point = merged;
          out[starter].change += change.change - 1;
          continue;
        }
      }
      if (change.combining_class == 0) {
        starter = out.size();
        last_class = -1;
      } else {
        last_class = change.combining_class;
      }
      out.push_back(change);
    }
    return out;
  }

  bool compatible_;
  bool compose_;
};

// The inserted text takes the span of the first character. Empty text stays empty.
class Prepend : public Normalizer {
 public:
  explicit Prepend(std::string prefix) : prefix_(std::move(prefix)) {}
  void apply(AlignedText& text) const override {
    if (text.text.empty()) return;
    text.spans.insert(text.spans.begin(), prefix_.size(), text.spans[0]);
    text.text.insert(0, prefix_);
  }

 private:
  std::string prefix_;
};

// The new text takes the span of the last character that it replaces.
class Replace : public Normalizer {
 public:
  Replace(Pattern pattern, std::string content)
      : pattern_(std::move(pattern)), content_(std::move(content)) {}
  void apply(AlignedText& text) const override {
    std::vector<Match> matches;
    pattern_.find_all(matches, text.text);
    AlignedText out;
    out.text.reserve(text.text.size());
    out.spans.reserve(text.text.size());
    for (const Match& match : matches) {
      if (match.is_match) {
        out.append(content_, match.end > 0 ? text.spans[match.end - 1] : Span{});
      } else {
        out.append(text, match.begin, match.end);
      }
    }
    text = std::move(out);
  }

 private:
  Pattern pattern_;
  std::string content_;
};

class Lowercase : public Normalizer {
 public:
  void apply(AlignedText& text) const override {
    AlignedText out;
    size_t length = 0;
    std::string bytes;
    for (size_t at = 0; at < text.text.size(); at += length) {
      const uint32_t code_point = text::decode_at(text.text, at, &length);
      bytes.clear();
      if (code_point == 0x130) {
        bytes = "i\xCC\x87";  // the only character that becomes two
      } else {
        text::append_utf8(bytes, uint32_t(utf8proc_tolower(utf8proc_int32_t(code_point))));
      }
      out.append(bytes, text.spans[at]);
    }
    text = std::move(out);
  }
};

class Strip : public Normalizer {
 public:
  Strip(bool left, bool right) : left_(left), right_(right) {}
  void apply(AlignedText& text) const override {
    size_t begin = 0, end = text.text.size(), length = 0;
    while (left_ && begin < end &&
           text::is_white_space(text::decode_at(text.text, begin, &length))) {
      begin += length;
    }
    while (right_ && end > begin) {
      const size_t before = text::previous(text.text, end);
      if (!text::is_white_space(text::decode_at(text.text, before, &length))) break;
      end = before;
    }
    text = text.slice(begin, end);
  }

 private:
  bool left_, right_;
};

class NormalizerSequence : public Normalizer {
 public:
  NormalizerSequence(const Json& list, const std::string& file) {
    CHECK(list.is_array(), file, ": normalizers of a Sequence must be an array");
    for (const Json& json : list) steps_.push_back(make_normalizer(json, file));
  }
  void apply(AlignedText& text) const override {
    for (const auto& step : steps_) {
      if (step && !text.text.empty()) step->apply(text);
    }
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> steps_;
};

}  // namespace

std::unique_ptr<Normalizer> make_normalizer(const Json& json, const std::string& file) {
  if (json.is_null()) return nullptr;
  const std::string type = json_type(json, "normalizer", file);
  if (type == "Sequence") {
    return std::make_unique<NormalizerSequence>(json_member(json, "normalizers", file), file);
  }
  if (type == "NFC") return std::make_unique<UnicodeForm>(false, true);
  if (type == "NFD") return std::make_unique<UnicodeForm>(false, false);
  if (type == "NFKC") return std::make_unique<UnicodeForm>(true, true);
  if (type == "NFKD") return std::make_unique<UnicodeForm>(true, false);
  if (type == "Prepend") return std::make_unique<Prepend>(json_string(json, "prepend", file));
  if (type == "Replace") {
    return std::make_unique<Replace>(Pattern(json_member(json, "pattern", file), file),
                                     json_string(json, "content", file));
  }
  if (type == "Lowercase") return std::make_unique<Lowercase>();
  if (type == "Strip") {
    return std::make_unique<Strip>(json_bool(json, "strip_left", true, file),
                                   json_bool(json, "strip_right", true, file));
  }
  fail(file, ": normalizer ", type,
       " is not supported, expected one of Sequence, NFC, NFD, NFKC, NFKD, Prepend, Replace, "
       "Lowercase, Strip");
}

}  // namespace graft
