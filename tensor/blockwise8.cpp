#include "tensor/blockwise8.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace graft {
namespace {

using Map = std::array<float, 256>;

// torch.linspace(0.1, 1, n) in F32: from both ends towards the middle, by fused multiply-adds,
// which double stands in for: it holds product and sum exactly, so that they are rounded once.
float boundary(int i, int n) {
  const double step = (1.0f - 0.1f) / float(n - 1);
  return i < n / 2 ? float(0.1f + step * i) : float(1.0f - step * (n - 1 - i));
}

// Seven decades from 1e-6 to 1, each cut into twice as many parts as the one below it; an element
// is the middle of its part. Unsigned maps have the sign's bit for the fraction.
Map make_map(bool is_signed) {
  static const float decades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  std::vector<float> values{0.0f, 1.0f};
  for (int i = 0; i < 7; ++i) {
    const int n = (is_signed ? 1 << i : 2 << i) + 1;
    for (int part = 0; part + 1 < n; ++part) {
      const float mean = (boundary(part, n) + boundary(part + 1, n)) / 2.0f;
      values.push_back(decades[i] * mean);
      if (is_signed) values.push_back(-decades[i] * mean);
    }
  }
  std::sort(values.begin(), values.end());
  Map map;
  std::copy(values.begin(), values.end(), map.begin());
  return map;
}

std::vector<uint8_t> make_codes(const float* map) {
  std::vector<uint8_t> codes(65536);
  int code = 0;
  for (int i = 0; i < 65536; ++i) {
    const float point = -1.0f + (2.0f * float(i)) / 65535.0f;
    while (code < 255 && 0.5f * (map[code] + map[code + 1]) < point) ++code;
    codes[size_t(i)] = uint8_t(code);
  }
  return codes;
}

}  // namespace

const float* dynamic_map(bool is_signed) {
  static const Map with_sign = make_map(true), without = make_map(false);
  return (is_signed ? with_sign : without).data();
}

const uint8_t* dynamic_codes(bool is_signed) {
  static const std::vector<uint8_t> with_sign = make_codes(dynamic_map(true)),
                                    without = make_codes(dynamic_map(false));
  return (is_signed ? with_sign : without).data();
}

void quantise_block8(uint8_t* codes, float* absmax, const float* x, int64_t n, bool is_signed) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  *absmax = largest;
  if (largest == 0) return void(std::fill(codes, codes + n, uint8_t(0)));
  const uint8_t* const table = dynamic_codes(is_signed);
  const float inverse = 1.0f / largest;
  for (int64_t i = 0; i < n; ++i) codes[i] = table[point_of8(x[i] * inverse)];
}

}  // namespace graft
