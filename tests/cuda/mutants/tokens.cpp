#include "tests/cuda/mutants/tokens.h"

#include <cctype>

namespace graft::mutants {
namespace {

bool word_char(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }
bool space_char(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

constexpr const char* kSymbols[] = {
    "<<=", ">>=", "...", "->", "::", "++", "--", "<=", ">=", "==", "!=", "&&",
    "||",  "+=",  "-=",  "*=", "/=", "%=", "&=", "|=", "^=", "<<", ">>"};

// Which branches of #if the emulated build compiles, as far as the condition names CUDA_EMU or
// __CUDA_ARCH__; any other condition counts as true in all of its branches.
class Conditions {
 public:
  void read(const std::string& line) {
    const auto starts = [&](const char* word) { return line.rfind(word, 0) == 0; };
    if (starts("#if")) {
      const bool emulated = line.find("CUDA_EMU") != std::string::npos;
      const bool device = line.find("__CUDA_ARCH") != std::string::npos;
      const bool negated = line.find('!') != std::string::npos || starts("#ifndef");
      open_.push_back({emulated || device, emulated ? !negated : device ? negated : true});
    } else if (starts("#el") && !open_.empty()) {
      if (open_.back().decides) open_.back().active = !open_.back().active;
    } else if (starts("#endif") && !open_.empty()) {
      open_.pop_back();
    }
  }
  bool active() const {
    for (const Branch& branch : open_)
      if (!branch.active) return false;
    return true;
  }

 private:
  struct Branch {
    bool decides, active;
  };
  std::vector<Branch> open_;
};

class Lexer {
 public:
  explicit Lexer(const std::string& text) : text_(text) {}

  std::vector<Token> run() {
    while (at_ < text_.size()) {
      if (space_char(text_[at_])) {
        at_ += 1;
      } else if (text_[at_] == '#') {
        preprocessor_line();
      } else if (text_.compare(at_, 2, "//") == 0) {
        skip_to(text_.find('\n', at_));
      } else if (text_.compare(at_, 2, "/*") == 0) {
        skip_to(text_.find("*/", at_), 2);
      } else if (text_[at_] == '"' || text_[at_] == '\'') {
        quoted(text_[at_]);
      } else {
        token();
      }
    }
    return tokens_;
  }

 private:
  void skip_to(size_t end, size_t more = 0) {
    at_ = end == std::string::npos ? text_.size() : end + more;
  }
  void preprocessor_line() {
    size_t end = text_.find('\n', at_);
    while (end != std::string::npos && text_[end - 1] == '\\') end = text_.find('\n', end + 1);
    conditions_.read(text_.substr(at_, end == std::string::npos ? end : end - at_));
    skip_to(end);
  }
  void quoted(char quote) {
    for (++at_; at_ < text_.size() && text_[at_] != quote; ++at_)
      if (text_[at_] == '\\') ++at_;
    ++at_;
  }
  size_t token_length(Token::Kind& kind) const {
    const char c = text_[at_];
    size_t end = at_ + 1;
    if (word_char(c) && !std::isdigit(static_cast<unsigned char>(c))) {
      kind = Token::kWord;
      while (end < text_.size() && word_char(text_[end])) ++end;
    } else if (std::isdigit(static_cast<unsigned char>(c))) {
      kind = Token::kNumber;
      const bool hex = text_.compare(at_, 2, "0x") == 0;
      while (end < text_.size() &&
             (word_char(text_[end]) || text_[end] == '.' || text_[end] == '\'' ||
              (!hex && (text_[end] == '-' || text_[end] == '+') && text_[end - 1] == 'e')))
        ++end;
    } else {
      kind = Token::kSymbol;
      for (const std::string symbol : kSymbols)
        if (text_.compare(at_, symbol.size(), symbol) == 0) return symbol.size();
    }
    return end - at_;
  }
  void token() {
    Token::Kind kind;
    const size_t length = token_length(kind), end = at_ + length;
    for (; counted_ < at_; ++counted_) line_ += text_[counted_] == '\n';
    if (conditions_.active())
      tokens_.push_back({kind, text_.substr(at_, length), at_, line_,
                         at_ > 0 && space_char(text_[at_ - 1]),
                         end < text_.size() && space_char(text_[end])});
    at_ = end;
  }

  const std::string& text_;
  size_t at_ = 0, counted_ = 0;
  int line_ = 1;
  Conditions conditions_;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokens_of(const std::string& text) { return Lexer(text).run(); }

size_t closing(const std::vector<Token>& tokens, size_t open) {
  int depth = 0;
  for (size_t i = open; i < tokens.size(); ++i) {
    if (tokens[i].is("(") || tokens[i].is("[") || tokens[i].is("{")) ++depth;
    if (tokens[i].is(")") || tokens[i].is("]") || tokens[i].is("}"))
      if (--depth == 0) return i;
  }
  return tokens.size();
}

}  // namespace graft::mutants
