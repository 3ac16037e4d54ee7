// How much memory this process may still take, so that what cannot fit is refused in one line
// before the kernel ends the process without any.
#pragma once

#include <cstdint>
#include <string>

namespace graft {

// What the machine has free, or the control group of the process (version 1 or 2) leaves, in bytes.
int64_t bytes_available();

// Throws Error "<what>: not enough memory: it takes ... MiB and ... MiB are free; <advice>".
void check_memory(int64_t bytes, const std::string& what, const std::string& advice);

}  // namespace graft
