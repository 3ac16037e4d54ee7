// Pages with places that programs renew: what stands between <!-- NAME --> and <!-- /NAME -->.
#pragma once

#include <fstream>
#include <string>

#include "tensor/check.h"

namespace graft {

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good(), path, ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_text(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  CHECK(file.good(), path, ": cannot be written");
}

// The page with another text in its place `name`; an Error where it has none.
inline std::string with_section(const std::string& page, const std::string& name,
                                const std::string& text) {
  const std::string open = "<!-- " + name + " -->\n", close = "<!-- /" + name + " -->";
  const size_t begin = page.find(open);
  CHECK(begin != std::string::npos, "results: the page has no line <!-- ", name, " -->");
  const size_t from = begin + open.size(), to = page.find(close, from);
  CHECK(to != std::string::npos, "results: <!-- ", name, " --> is not closed by ", close);
  return page.substr(0, from) + text + page.substr(to);
}

// The same of a file.
inline void replace_section(const std::string& path, const std::string& name,
                            const std::string& text) {
  write_text(path, with_section(read_text(path), name, text));
}

}  // namespace graft
