// UTF-8 by the table of well-formed byte sequences (Unicode 3.9, table 3-7), and text with spans.
#include "models/tokenizer_text.h"

#include <utf8proc.h>

namespace graft::text {

AlignedText AlignedText::from(std::string_view original) {
  AlignedText out;
  out.text.reserve(original.size());
  out.spans.reserve(original.size());
  for (size_t at = 0; at < original.size();) {
    size_t length = 0;
    const bool valid = classify_utf8(original.substr(at), &length) == Utf8::valid;
    const Span span{uint32_t(at), uint32_t(at + length)};
    out.append(valid ? original.substr(at, length) : kReplacement, span);
    at += length;
  }
  return out;
}

void AlignedText::append(std::string_view bytes, Span span) {
  text.append(bytes);
  spans.insert(spans.end(), bytes.size(), span);
}

void AlignedText::append(const AlignedText& other, size_t begin, size_t end) {
  text.append(other.text, begin, end - begin);
  spans.insert(spans.end(), other.spans.begin() + begin, other.spans.begin() + end);
}

AlignedText AlignedText::slice(size_t begin, size_t end) const {
  AlignedText out;
  out.append(*this, begin, end);
  return out;
}

uint32_t decode_at(std::string_view text, size_t at, size_t* length) {
  const auto byte = [&](size_t i) { return uint32_t(uint8_t(text[at + i])); };
  const uint32_t first = byte(0);
  if (first < 0x80) return *length = 1, first;
  if (first < 0xE0) return *length = 2, (first & 0x1F) << 6 | (byte(1) & 0x3F);
  if (first < 0xF0) {
    return *length = 3, (first & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
  }
  return *length = 4,
         (first & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
}

size_t previous(std::string_view text, size_t at) {
  do {
    --at;
  } while (at > 0 && (uint8_t(text[at]) & 0xC0) == 0x80);
  return at;
}

void append_utf8(std::string& out, uint32_t cp) {
  if (cp < 0x80) {
    out += char(cp);
  } else if (cp < 0x800) {
    out += {char(0xC0 | cp >> 6), char(0x80 | (cp & 0x3F))};
  } else if (cp < 0x10000) {
    out += {char(0xE0 | cp >> 12), char(0x80 | (cp >> 6 & 0x3F)), char(0x80 | (cp & 0x3F))};
  } else {
    out += {char(0xF0 | cp >> 18), char(0x80 | (cp >> 12 & 0x3F)), char(0x80 | (cp >> 6 & 0x3F)),
            char(0x80 | (cp & 0x3F))};
  }
}

Utf8 classify_utf8(std::string_view bytes, size_t* length) {
  const uint8_t first = uint8_t(bytes[0]);
  *length = 1;
  if (first < 0x80) return Utf8::valid;
  if (first < 0xC2 || first > 0xF4) return Utf8::broken;
  const size_t wanted = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  // The second byte excludes overlong forms, surrogates and what lies above U+10FFFF.
  const uint8_t low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const uint8_t high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < wanted; ++i, ++*length) {
    if (i == bytes.size()) return Utf8::incomplete;
    const uint8_t byte = uint8_t(bytes[i]);
    if (byte < (i == 1 ? low : 0x80) || byte > (i == 1 ? high : 0xBF)) return Utf8::broken;
  }
  return Utf8::valid;
}

bool is_valid_utf8(std::string_view bytes) {
  size_t length = 0;
  for (size_t at = 0; at < bytes.size(); at += length) {
    if (classify_utf8(bytes.substr(at), &length) != Utf8::valid) return false;
  }
  return true;
}

std::string to_valid_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  size_t length = 0;
  for (size_t at = 0; at < bytes.size(); at += length) {
    const bool valid = classify_utf8(bytes.substr(at), &length) == Utf8::valid;
    out.append(valid ? bytes.substr(at, length) : kReplacement);
  }
  return out;
}

bool is_white_space(uint32_t cp) {
  return (cp >= 0x09 && cp <= 0x0D) || cp == 0x20 || cp == 0x85 || cp == 0xA0 || cp == 0x1680 ||
         (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 || cp == 0x202F ||
         cp == 0x205F || cp == 0x3000;
}

bool is_word(uint32_t cp) {
  switch (utf8proc_category(utf8proc_int32_t(cp))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      break;
  }
  // The joiners, and the circled and squared letters, which are symbols yet alphabetic.
  return cp == 0x200C || cp == 0x200D || (cp >= 0x24B6 && cp <= 0x24E9) ||
         (cp >= 0x1F130 && cp <= 0x1F149) || (cp >= 0x1F150 && cp <= 0x1F169) ||
         (cp >= 0x1F170 && cp <= 0x1F189);
}

bool is_numeric(uint32_t cp) {
  const auto category = utf8proc_category(utf8proc_int32_t(cp));
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL ||
         category == UTF8PROC_CATEGORY_NO;
}

}  // namespace graft::text
