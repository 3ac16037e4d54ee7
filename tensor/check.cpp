#include "tensor/check.h"

#include <sstream>

namespace graft {

std::string concat_parts(std::initializer_list<MessagePart> parts) {
  std::ostringstream out;
  for (const MessagePart& part : parts) part.write(out, part.value);
  return out.str();
}

}  // namespace graft
