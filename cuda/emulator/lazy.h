// Whether streams keep their work until something orders it (streams.cpp): the host waits for it,
// or another stream does that is waited for, or memory is freed. Then a wait that is missing shows,
// between streams and before memory that is pinned is read or written again.
#pragma once

#include <cstdlib>
#include <cstring>

namespace emu {

// At first as the environment has it: EMU_LAZY=1.
inline bool& lazy() {
  static bool on = [] {
    const char* wanted = std::getenv("EMU_LAZY");
    return wanted && !std::strcmp(wanted, "1");
  }();
  return on;
}

}  // namespace emu
