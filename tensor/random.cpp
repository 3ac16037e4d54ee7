#include "tensor/random.h"

#include <cmath>

namespace graft {

uint32_t Random::next_u32() {
  if (used_ == 4) {
    block_ = philox(
        {uint32_t(counter_), uint32_t(counter_ >> 32), uint32_t(stream_), uint32_t(stream_ >> 32)},
        key_);
    ++counter_;
    used_ = 0;
  }
  return block_[used_++];
}

double Random::uniform() {
  const uint64_t high = next_u32() >> 5;  // 27 bits
  const uint64_t low = next_u32() >> 6;   // 26 bits
  return double(high << 26 | low) * 0x1p-53;
}

double Random::normal() {
  const double u = 1.0 - uniform();  // (0, 1]: its logarithm is finite
  const double angle = 2.0 * M_PI * uniform();
  return std::sqrt(-2.0 * std::log(u)) * std::cos(angle);
}

uint64_t Random::below(uint64_t n) {
  // Values at or above the largest multiple of n would favour small remainders: draw again.
  const uint64_t limit = UINT64_MAX - UINT64_MAX % n;
  for (;;) {
    const uint64_t value = uint64_t(next_u32()) << 32 | next_u32();
    if (value < limit) return value % n;
  }
}

}  // namespace graft
