// Eight bits an element, by bitsandbytes' dynamic map: blocks of 256 elements, each with the
// largest magnitude in it as its scale. NF4's own scales are kept so (nf4.h), and the state of the
// 8-bit optimizer (nn/parameter_buffer.h).
#pragma once

#include <cstdint>

namespace graft {

constexpr int64_t kBlock8 = 256;
inline int64_t num_blocks8(int64_t elements) { return (elements + kBlock8 - 1) / kBlock8; }

// 256 values, rising to 1: a sign, an exponent of ten whose length varies, and a linear fraction in
// the bits that are left (Dettmers 2015). Signed from -0.993, unsigned from 0.
const float* dynamic_map(bool is_signed);

// The code that bitsandbytes' CPU backend gives a value x in [-1, 1]: x is moved to the nearest of
// 65536 points, (point i) = 2 i / 65535 - 1, and the point to the nearest value of the map, the
// lower of two. `table` (65536) has the codes of the points.
const uint8_t* dynamic_codes(bool is_signed);
inline int32_t point_of8(float x) {
  x = x < -1 ? -1 : x > 1 ? 1 : x;
  return int32_t((x + 1.0f) * 0.5f * 65535.0f + 0.5f);
}

// codes and *absmax of one block of n <= 256 values. A block of zeros has codes 0 and scale 0.
void quantise_block8(uint8_t* codes, float* absmax, const float* x, int64_t n, bool is_signed);

}  // namespace graft
