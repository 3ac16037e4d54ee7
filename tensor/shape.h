// A shape: up to four sizes, outermost first. Its own struct, since an alias of std::vector could
// not be streamed from CHECK.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <ostream>

#include "tensor/check.h"

namespace graft {

class Shape {
 public:
  static constexpr int kMaxRank = 4;
  Shape() = default;  // rank 0: a scalar, one element
  Shape(std::initializer_list<int64_t> sizes) {
    CHECK(sizes.size() <= kMaxRank, "shape: rank ", sizes.size(), " is more than ", kMaxRank);
    for (int64_t size : sizes) push_back(size);
  }

  int rank() const { return rank_; }
  // Negative indices count from the end, as in PyTorch.
  int64_t operator[](int i) const {
    const int at = i < 0 ? i + rank_ : i;
    CHECK(at >= 0 && at < rank_, "shape: dimension ", i, " of ", *this);
    return sizes_[at];
  }
  int64_t num_elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= sizes_[i];
    return n;
  }
  void push_back(int64_t size) {
    CHECK(rank_ < kMaxRank, "shape: rank is more than ", kMaxRank);
    CHECK(size >= 0, "shape: negative size ", size);
    sizes_[rank_++] = size;
  }
  bool operator==(const Shape& other) const {
    if (rank_ != other.rank_) return false;
    for (int i = 0; i < rank_; ++i)
      if (sizes_[i] != other.sizes_[i]) return false;
    return true;
  }
  friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    out << '(';
    for (int i = 0; i < shape.rank_; ++i) out << (i ? ", " : "") << shape.sizes_[i];
    return out << ')';
  }

 private:
  std::array<int64_t, kMaxRank> sizes_{};
  int rank_ = 0;
};

}  // namespace graft
