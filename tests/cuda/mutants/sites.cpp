// The changes, and where they apply. Read before: tokens.h.
#include "tests/cuda/mutants/sites.h"

#include <algorithm>

#include "tests/cuda/mutants/tokens.h"

namespace graft::mutants {
namespace {

struct Exchange {
  const char *change, *from, *to;
};

// Binary operators, which clang-format surrounds with spaces.
constexpr Exchange kOperators[] = {
    {"bound", "<", "<="},    {"bound", "<=", "<"},    {"bound", ">", ">="},   {"bound", ">=", ">"},
    {"compare", "==", "!="}, {"compare", "!=", "=="}, {"sign", "+", "-"},     {"sign", "-", "+"},
    {"factor", "*", "+"},    {"factor", "/", "*"},    {"factor", "%", "/"},   {"logic", "&&", "||"},
    {"logic", "||", "&&"},   {"bits", "^", "|"},      {"bits", "&", "|"},     {"bits", "|", "&"},
    {"bits", "<<", ">>"},    {"bits", ">>", "<<"},    {"sign", "+=", "-="},   {"sign", "-=", "+="},
    {"sum", "+=", "="},      {"factor", "*=", "="},   {"factor", "/=", "*="},
};
constexpr Exchange kWords[] = {
    {"extreme", "min", "max"},
    {"extreme", "max", "min"},
    {"extreme", "fminf", "fmaxf"},
    {"extreme", "fmaxf", "fminf"},
    {"reduction", "warp_sum", "warp_max"},
    {"reduction", "warp_max", "warp_sum"},
    {"reduction", "quad_sum", "quad_max"},
    {"reduction", "quad_max", "quad_sum"},
    {"mask", "kAllLanes", "(kAllLanes >> 1)"},
    {"flag", "true", "false"},
    {"flag", "false", "true"},
};

class Finder {
 public:
  Finder(const std::string& file, const std::string& text)
      : file_(file), text_(text), tokens_(tokens_of(text)) {}

  std::vector<Site> run() {
    for (size_t i = 0; i < tokens_.size(); ++i) {
      if (!tokens_[i].is("__global__") && !tokens_[i].is("__device__")) continue;
      const size_t open = body_after(i);
      if (open == tokens_.size()) continue;
      const size_t close = closing(tokens_, open);
      body(open + 1, close);
      i = close;
    }
    return sites_;
  }

 private:
  // The brace that opens the function's body; tokens_.size() for declarations and variables.
  size_t body_after(size_t i) const {
    for (; i < tokens_.size(); ++i) {
      if (tokens_[i].is("(")) i = closing(tokens_, i);
      if (i >= tokens_.size() || tokens_[i].is(";") || tokens_[i].is("=")) break;
      if (tokens_[i].is("{")) return i;
    }
    return tokens_.size();
  }

  const Token& next(size_t i) const { return tokens_[i + 1 < tokens_.size() ? i + 1 : i]; }
  const Token& previous(size_t i, size_t by = 1) const { return tokens_[i >= by ? i - by : 0]; }

  void add(const char* name, size_t first, size_t last, const std::string& replacement,
           bool synchronizes = false) {
    const size_t begin = tokens_[first].begin;
    const size_t length = tokens_[last].begin + tokens_[last].text.size() - begin;
    const std::string from = text_.substr(begin, length);
    if (from.find('\n') != std::string::npos) return;
    sites_.push_back(
        {file_, tokens_[first].line, begin, length, replacement,
         std::string(name) + ": " + from + " to " + (replacement.empty() ? "nothing" : replacement),
         synchronizes});
  }

  void body(size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const Token& token = tokens_[i];
      if (next(i).is("(") && (token.is("CHECK") || token.is("static_assert"))) {
        i = closing(tokens_, i + 1);
      } else if (token.is("SHARED_ARRAY") || token.is("DYNAMIC_SHARED")) {
        const size_t close = closing(tokens_, i + 1);
        if (token.is("SHARED_ARRAY")) add("shared array", close, close, " - 1)");
        i = close;
      } else if (token.kind == Token::kNumber) {
        number(i);
      } else if (token.kind == Token::kWord) {
        word(i);
      } else {
        symbol(i);
      }
    }
  }

  void word(size_t i) {
    const Token& token = tokens_[i];
    for (const Exchange& e : kWords)
      if (token.is(e.from)) add(e.change, i, i, e.to);
    if ((token.is("return") || token.is("continue")) && next(i).is(";")) add("guard", i, i, "");
    if (next(i).is("(")) {
      const size_t close = closing(tokens_, i + 1);
      if (token.is("__syncthreads") || token.is("__syncwarp")) add("barrier", i, close, "", true);
      if (token.is("cp_async_commit")) add("commit", qualified(i), close, "", true);
    }
    // cp_async_wait<N>(): one group more may be unfinished, or all of them.
    if (token.is("cp_async_wait") && next(i).is("<")) {
      size_t close = i + 1;
      while (close < tokens_.size() && !tokens_[close].is(">")) ++close;
      add("wait", i + 1, close, between(i + 1, close) + " + 1>", true);
      add("wait", qualified(i), closing(tokens_, close + 1), "", true);
    }
  }
  std::string between(size_t open, size_t close) const {
    return text_.substr(tokens_[open].begin, tokens_[close].begin - tokens_[open].begin);
  }
  size_t qualified(size_t i) const { return previous(i).is("::") ? i - 2 : i; }

  void symbol(size_t i) {
    const Token& token = tokens_[i];
    if (token.spaced())
      for (const Exchange& e : kOperators)
        if (token.is(e.from)) add(e.change, i, i, e.to);
    if (token.space_after) return;
    const Token& before = previous(i);
    const bool operand_before =
        before.kind != Token::kSymbol ? !before.is("return") : before.is(")") || before.is("]");
    if (token.is("-") && !operand_before) add("sign", i, i, "");
    if (token.is("!")) add("logic", i, i, "");
  }

  // N in `float a[N]`: one more element changes nothing, and one less is rarely C++ any more.
  bool declares_size(size_t i) const {
    if (!previous(i).is("[") || !next(i).is("]")) return false;
    const Token& after = tokens_[i + 2 < tokens_.size() ? i + 2 : i];
    if (!after.is(";") && !after.is(",") && !after.is("=") && !after.is("[")) return false;
    size_t start = i;
    while (start > 0 && !previous(start).is(";") && !previous(start).is("{") &&
           !previous(start).is("}"))
      --start;
    const Token& owner = previous(i, 3);  // of `owner name [ N`
    return tokens_[start].kind == Token::kWord && next(start).kind == Token::kWord &&
           (owner.kind == Token::kWord || owner.is(",") || owner.is("]"));
  }

  // The 0 and the 32 of `threadIdx.x % 32 == 0` and the 0 of `lane == 0`: after a sum over a warp
  // or a block everybody has the result, and which of them stores it is of no account.
  bool elects(size_t i) const {
    const auto who = [&](size_t at) {
      return tokens_[at].is("lane") || (tokens_[at].is("x") && tokens_[at - 2].is("threadIdx"));
    };
    const size_t zero = previous(i).is("%") ? i + 2 : i;  // of `% 32 == 0`
    if (zero >= tokens_.size() || !tokens_[zero].is("0") || !tokens_[zero - 1].is("=="))
      return false;
    return who(zero - 2) || (tokens_[zero - 3].is("%") && who(zero - 4));
  }

  void number(size_t i) {
    const std::string& text = tokens_[i].text;
    if (declares_size(i) || elects(i) || previous(i, 2).is("cp_async_wait")) return;
    if (text.find_first_of(".'") != std::string::npos) {
      add("constant", i, i, "(" + text + " + 1)");
      return;
    }
    size_t used = 0;
    const unsigned long long value = std::stoull(text, &used, 0);
    const std::string suffix = text.substr(used);
    if (suffix.find_first_not_of("uUlL") != std::string::npos) return;
    add("constant", i, i, std::to_string(value + 1) + suffix);
    if (value > 0) add("constant", i, i, std::to_string(value - 1) + suffix);
  }

  const std::string &file_, &text_;
  const std::vector<Token> tokens_;
  std::vector<Site> sites_;
};

}  // namespace

std::vector<Site> find_sites(const std::string& file, const std::string& text) {
  return Finder(file, text).run();
}

std::string changed_text(const std::string& text, const Site& site) {
  return text.substr(0, site.begin) + site.replacement + text.substr(site.begin + site.length);
}

std::string line_around(const std::string& text, size_t at) {
  const size_t newline = at == 0 ? std::string::npos : text.rfind('\n', at - 1);
  size_t begin = newline == std::string::npos ? 0 : newline + 1;
  size_t end = std::min(text.find('\n', at), text.size());
  while (begin < end && text[begin] == ' ') ++begin;
  while (end > begin && text[end - 1] == ' ') --end;
  return text.substr(begin, end - begin);
}

}  // namespace graft::mutants
