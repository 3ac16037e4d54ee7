// Whether streams keep their work until something orders it (streams.cpp): the host waits for it,
// or another stream does that is waited for, or memory is freed. Then a wait that is missing shows,
// between streams and before memory that is pinned is read or written again.
#pragma once

namespace emu {

bool& lazy();  // at first as the environment has it: EMU_LAZY=1

}  // namespace emu
