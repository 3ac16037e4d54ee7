// A regular expression by PCRE2, for target_modules and the patterns of LoRA: Python's `re` and
// PCRE2 agree on what people write there.
#pragma once

#include <memory>
#include <string>

namespace graft {

class Regex {
 public:
  explicit Regex(const std::string& pattern);      // throws Error with the place of the mistake
  bool full_match(const std::string& text) const;  // as Python's re.fullmatch

 private:
  struct Code;
  std::shared_ptr<const Code> code_;
};

}  // namespace graft
