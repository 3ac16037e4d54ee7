// Patterns by PCRE2. tokenizer.json is written for Oniguruma; where the two dialects differ the
// expression is rewritten, or refused if it cannot be.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "models/tokenizer_parts.h"
#include "tensor/check.h"

namespace graft {
namespace {

// PCRE2's \s has U+180E, which is no White_Space; its \w lacks marks, connectors and more.
constexpr std::string_view kSpaces =
    R"(\x09-\x0d\x20\x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kWords =
    R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\xb2\xb3\xb9\xbc-\xbe\x{24b6}-\x{24e9})"
    R"(\x{1f130}-\x{1f149}\x{1f150}-\x{1f169}\x{1f170}-\x{1f189})";

std::string bracketed(std::string_view open, std::string_view members) {
  return std::string(open).append(members) + "]";
}

std::string to_pcre(const std::string& pattern, const std::string& file) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      if (escaped == 's' || escaped == 'w') {
        const auto members = escaped == 's' ? kSpaces : kWords;
        out += in_class ? std::string(members) : bracketed("[", members);
      } else if ((escaped == 'S' || escaped == 'W') && !in_class) {
        out += bracketed("[^", escaped == 'S' ? kSpaces : kWords);
      } else if (escaped == 'h' || escaped == 'H') {  // hexadecimal digit there, blank here
        CHECK(escaped == 'h' || !in_class, file, ": pattern ", Json(pattern).dump(),
              ": \\H in a set is not supported");
        out += in_class ? "0-9a-fA-F" : escaped == 'h' ? "[0-9a-fA-F]" : "[^0-9a-fA-F]";
      } else {
        out += c;
        out += escaped;
      }
      continue;
    }
    if (in_class) {
      const bool posix = pattern.compare(i, 2, "[:") == 0 && pattern.find(":]", i) != pattern.npos;
      CHECK((c != '[' || posix) && pattern.compare(i, 2, "&&") != 0, file, ": pattern ",
            Json(pattern).dump(), ": sets within sets are not supported");
      if (posix) {
        const size_t close = pattern.find(":]", i) + 1;
        out.append(pattern, i, close - i + 1);
        i = close;
        continue;
      }
      if (c == ']') in_class = false;
    } else if (c == '[') {
      in_class = true;
      out += c;
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') out += pattern[++i];
      continue;
    }
    out += c;
  }
  return out;
}

}  // namespace

struct Pattern::Compiled {
  pcre2_code* code = nullptr;
  ~Compiled() { pcre2_code_free(code); }
};

namespace {

// What one search needs: the place for its result and, once the JIT's own stack was too small, a
// larger one.
class Searcher {
 public:
  explicit Searcher(const pcre2_code* code)
      : code_(code),
        data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)) {
    // A long input must never fail: only time and memory may limit a search.
    pcre2_set_match_limit(context_, UINT32_MAX);
    pcre2_set_depth_limit(context_, UINT32_MAX);
    pcre2_set_heap_limit(context_, UINT32_MAX);
  }
  ~Searcher() {
    pcre2_match_data_free(data_);
    pcre2_match_context_free(context_);
    if (stack_) pcre2_jit_stack_free(stack_);
  }
  Searcher(const Searcher&) = delete;

  bool find(std::string_view text, size_t from, size_t* begin, size_t* end) {
    int result = match(text, from, 0);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT && !stack_) {
      stack_ = pcre2_jit_stack_create(256 << 10, size_t{64} << 20, nullptr);
      pcre2_jit_stack_assign(context_, nullptr, stack_);
      result = match(text, from, 0);
    }
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = match(text, from, PCRE2_NO_JIT);
    if (result == PCRE2_ERROR_NOMATCH) return false;
    CHECK(result >= 0, "tokenizer: searching ", text.size(), " bytes failed with PCRE2 error ",
          result);
    const PCRE2_SIZE* found = pcre2_get_ovector_pointer(data_);
    *begin = found[0];
    *end = found[1];
    return true;
  }

 private:
  int match(std::string_view text, size_t from, uint32_t options) {
    return pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                       PCRE2_NO_UTF_CHECK | options, data_, context_);
  }
  const pcre2_code* code_;
  pcre2_match_data* data_;
  pcre2_match_context* context_;
  pcre2_jit_stack* stack_ = nullptr;
};

void find_literal(std::vector<Match>& out, std::string_view text, std::string_view literal) {
  size_t last = 0;
  while (!literal.empty()) {
    const size_t at = text.find(literal, last);
    if (at == text.npos) break;
    if (at > last) out.push_back({last, at, false});
    out.push_back({at, at + literal.size(), true});
    last = at + literal.size();
  }
  if (last < text.size()) out.push_back({last, text.size(), false});
}

}  // namespace

Pattern::Pattern(const Json& json, const std::string& file) {
  CHECK(json.is_object() && json.size() == 1 && json.begin()->is_string() &&
            (json.contains("String") || json.contains("Regex")),
        file, ": pattern is ", json.dump(), ", expected {\"String\": ...} or {\"Regex\": ...}");
  if (json.contains("Regex")) {
    *this = regex(json["Regex"].get<std::string>(), file);
  } else {
    literal_ = json["String"].get<std::string>();
  }
}

Pattern Pattern::regex(const std::string& expression, const std::string& file) {
  const std::string translated = to_pcre(expression, file);
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto compiled = std::make_shared<Compiled>();
  // In Oniguruma ^ and $ stand at every line.
  compiled->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, nullptr);
  if (!compiled->code) {
    PCRE2_UCHAR message[256] = {};
    pcre2_get_error_message(error, message, sizeof message);
    fail(file, ": pattern ", Json(expression).dump(), ": ", reinterpret_cast<char*>(message));
  }
  pcre2_jit_compile(compiled->code, PCRE2_JIT_COMPLETE);  // where it fails, matching interprets
  Pattern out;
  out.compiled_ = std::move(compiled);
  return out;
}

void Pattern::find_all(std::vector<Match>& out, std::string_view text) const {
  if (!compiled_) return find_literal(out, text, literal_);
  Searcher searcher(compiled_->code);
  size_t last = 0;  // end of the last match
  bool any = false;
  size_t begin = 0, end = 0;
  for (size_t from = 0; from <= text.size() && searcher.find(text, from, &begin, &end);) {
    if (begin == end && any && end == last) {  // an empty match right after a match does not count
      if (from == text.size()) break;
      size_t length = 0;
      text::decode_at(text, from, &length);
      from += length;
      continue;
    }
    if (begin > last) out.push_back({last, begin, false});
    out.push_back({begin, end, true});
    last = from = end;
    any = true;
  }
  if (last < text.size()) out.push_back({last, text.size(), false});
}

}  // namespace graft
