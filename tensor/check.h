// Errors. Inside graft every error is an exception of type Error; train/main.cpp turns it into one
// line on standard error and a non-zero exit. A message says what, where, what was expected and,
// if that is known, what to do; lower case, no full stop.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace graft {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The parts, written one after the other as std::ostream writes them.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(concat(parts...));
}

}  // namespace graft

// CHECK(k == n, "linear: x is ", x.shape(), " but ..."): throws Error with the concatenated parts.
// A macro because the parts must not be evaluated, nor formatted, while the condition holds.
#define CHECK(condition, ...)      \
  do {                             \
    if (!(condition)) [[unlikely]] \
      ::graft::fail(__VA_ARGS__);  \
  } while (0)
