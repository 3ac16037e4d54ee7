// Where a kernel can be changed, one place at a time, so that it is still C++ but most likely
// wrong.
#pragma once

#include <string>
#include <vector>

namespace graft::mutants {

struct Site {
  std::string file;
  int line = 0;
  size_t begin = 0, length = 0;  // the bytes of the file that `replacement` takes the place of
  std::string replacement;
  std::string change;         // "bound: < to <="
  bool synchronizes = false;  // a barrier, a commit or a wait
};

// The sites of one .cu or .cuh file, in the order of the text: inside functions that are marked
// __global__ or __device__, outside comments, strings, CHECKs, static_asserts, and code that the
// emulated build does not see. Expects the spaces that clang-format puts around binary operators,
// which is how `a < b` and `f<b>` are told apart.
std::vector<Site> find_sites(const std::string& file, const std::string& text);

// The text with the site changed, and the line of `text` that holds byte `at`, without the spaces
// at its ends. A change keeps to its line, so that line numbers stay.
std::string changed_text(const std::string& text, const Site& site);
std::string line_around(const std::string& text, size_t at);

}  // namespace graft::mutants
