#include "nn/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "tensor/check.h"

namespace graft {

struct Regex::Code {
  pcre2_code* code;
  explicit Code(pcre2_code* c) : code(c) {}
  ~Code() { pcre2_code_free(code); }
};

Regex::Regex(const std::string& pattern) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                    PCRE2_ANCHORED | PCRE2_ENDANCHORED | PCRE2_UTF, &error, &offset, nullptr);
  if (!code) {
    PCRE2_UCHAR message[256];
    pcre2_get_error_message(error, message, sizeof message);
    fail("regular expression '", pattern, "', character ", offset, ": ",
         reinterpret_cast<const char*>(message));
  }
  code_ = std::make_shared<const Code>(code);
}

bool Regex::full_match(const std::string& text) const {
  pcre2_match_data* data = pcre2_match_data_create_from_pattern(code_->code, nullptr);
  const int found = pcre2_match(code_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                0, 0, data, nullptr);
  pcre2_match_data_free(data);
  CHECK(found >= 0 || found == PCRE2_ERROR_NOMATCH, "regular expression: matching '", text,
        "' failed with PCRE2 error ", found);
  return found >= 0;
}

}  // namespace graft
