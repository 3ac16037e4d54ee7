#include "tensor/finite.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor/check.h"
#include "tensor/thread_pool.h"

namespace graft {
namespace {

constexpr int64_t kPiece = 1 << 20;  // elements that one thread takes at a time

// Whether any element is infinite or NaN: its exponent is all ones. OR over a piece keeps the loop
// free of branches, so that it runs at the speed of memory.
template <class Word>
bool has_non_finite(const Word* words, int64_t count, Word exponent) {
  Word found = 0;
  for (int64_t i = 0; i < count; ++i) found |= Word((words[i] & exponent) == exponent);
  return found != 0;
}

}  // namespace

bool all_finite(const Tensor& tensor) {
  const int64_t count = tensor.num_elements(), pieces = (count + kPiece - 1) / kPiece;
  std::vector<uint8_t> bad(size_t(std::max<int64_t>(pieces, 1)), 0);
  const auto scan = [&]<class Word>(const Word* words, Word exponent) {
    const auto piece_scan = [&](int64_t piece, int) {
      const int64_t begin = piece * kPiece, length = std::min(kPiece, count - begin);
      bad[size_t(piece)] = has_non_finite<Word>(words + begin, length, exponent);
    };
    if (pieces == 1)
      piece_scan(0, 0);
    else
      thread_pool().run(pieces, piece_scan);
  };
  switch (tensor.dtype()) {
    case DType::F32:
      scan(static_cast<const uint32_t*>(tensor.raw()), uint32_t(0x7f800000));
      break;
    case DType::BF16:
      scan(static_cast<const uint16_t*>(tensor.raw()), uint16_t(0x7f80));
      break;
    case DType::F16:
      scan(static_cast<const uint16_t*>(tensor.raw()), uint16_t(0x7c00));
      break;
    default:
      fail("all_finite: dtype ", dtype_name(tensor.dtype()));
  }
  return std::none_of(bad.begin(), bad.end(), [](uint8_t b) { return b != 0; });
}

}  // namespace graft
