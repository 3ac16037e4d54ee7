// Just enough of C++'s grammar to find the operators of a kernel.
#pragma once

#include <string>
#include <vector>

namespace graft::mutants {

struct Token {
  enum Kind { kWord, kNumber, kSymbol } kind;
  std::string text;
  size_t begin;
  int line;
  bool space_before, space_after;

  bool is(const char* what) const { return text == what; }
  bool spaced() const { return space_before && space_after; }
};

// Without comments, strings, characters, preprocessor lines, and what `#if` keeps from the emulated
// build.
std::vector<Token> tokens_of(const std::string& text);

// The index of the bracket that closes tokens[open], or tokens.size().
size_t closing(const std::vector<Token>& tokens, size_t open);

}  // namespace graft::mutants
