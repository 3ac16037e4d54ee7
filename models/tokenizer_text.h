// Text that remembers where it came from, UTF-8 walking, and the character classes that the
// tokenizer's parts share.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace graft::text {

// Bytes [begin, end) of the original text.
struct Span {
  uint32_t begin = 0;
  uint32_t end = 0;
};

// UTF-8 text and, for each of its bytes, the original bytes it stands for. All bytes of one
// character have the same span; spans never go backwards.
struct AlignedText {
  std::string text;
  std::vector<Span> spans;

  // Bytes that are not UTF-8 become U+FFFD, aligned with the bytes it replaces.
  static AlignedText from(std::string_view original);

  void append(std::string_view bytes, Span span);                   // all bytes get span
  void append(const AlignedText& other, size_t begin, size_t end);  // a copy of a range
  AlignedText slice(size_t begin, size_t end) const;
};

// A part [begin, end) of a text: a stretch that matched a pattern or lies between matches.
struct Match {
  size_t begin = 0;
  size_t end = 0;
  bool is_match = false;
};

// The code point at text[at] and its length in bytes. The text must be valid UTF-8.
uint32_t decode_at(std::string_view text, size_t at, size_t* length);
// The start of the character that ends before `at`, at > 0.
size_t previous(std::string_view text, size_t at);
void append_utf8(std::string& out, uint32_t code_point);

// What stands at the start of bytes (not empty).
enum class Utf8 { valid, broken, incomplete };
// `length` is that of the character; of the maximal broken sequence, which one U+FFFD stands for;
// or, for incomplete (the bytes end before the character does), of all that is there.
Utf8 classify_utf8(std::string_view bytes, size_t* length);
bool is_valid_utf8(std::string_view bytes);
// Broken and incomplete sequences replaced by U+FFFD.
std::string to_valid_utf8(std::string_view bytes);

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

bool is_white_space(uint32_t code_point);  // Unicode White_Space
bool is_word(uint32_t code_point);         // \w of UTS 18: letters, marks, digits, connectors
bool is_numeric(uint32_t code_point);      // categories Nd, Nl, No

}  // namespace graft::text
