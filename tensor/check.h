// Errors. Inside graft every error is an exception of type Error; train/main.cpp turns it into one
// line on standard error and a non-zero exit. A message says what, where, what was expected and,
// if that is known, what to do; lower case, no full stop.
#pragma once

#include <initializer_list>
#include <ostream>
#include <stdexcept>
#include <string>

namespace graft {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A part of a message and how a stream is given it.
struct MessagePart {
  const void* value;
  void (*write)(std::ostream&, const void*);
};
template <class T>
MessagePart message_part(const T& value) {
  return {&value, [](std::ostream& out, const void* p) { out << *static_cast<const T*>(p); }};
}
std::string concat_parts(std::initializer_list<MessagePart> parts);

// The parts, written one after the other as std::ostream writes them. Every CHECK has such a list
// of its own; what is compiled for each is kept to a call.
template <class... Parts>
std::string concat(const Parts&... parts) {
  return concat_parts({message_part(parts)...});
}

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
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
