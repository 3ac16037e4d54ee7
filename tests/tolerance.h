// How all tests compare tensors: one table of tolerances by dtype, and a message that names the
// worst element and its error as a share of the tolerance.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "tensor/tensor.h"

namespace graft {

inline double tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::F64:
      return 1e-6;
    case DType::BF16:
      return 2e-2;
    default:
      return 1e-4;
  }
}

// Every |actual - expected| is at most tolerance times the largest |expected| (times 1 if all of
// expected is 0). Tensors of any float dtypes, on the CPU.
inline void expect_close(const Tensor& actual, const Tensor& expected, double tolerance,
                         const std::string& what) {
  ASSERT_TRUE(actual.defined()) << what << ": no tensor";
  ASSERT_TRUE(expected.defined()) << what << ": nothing to compare with";
  ASSERT_EQ(actual.shape(), expected.shape()) << what;
  const std::vector<double> a = actual.to_doubles(), e = expected.to_doubles();
  double largest = 0, worst = 0;
  size_t at = 0;
  for (double value : e) largest = std::max(largest, std::abs(value));
  const double allowed = tolerance * (largest > 0 ? largest : 1);
  for (size_t i = 0; i < e.size(); ++i) {
    const double error = std::abs(a[i] - e[i]);
    if (error > worst || std::isnan(error)) {
      worst = error;
      at = i;
      if (std::isnan(error)) break;
    }
  }
  EXPECT_LE(worst, allowed) << what << ": element " << at << " of " << expected.shape() << " is "
                            << a[at] << ", expected " << e[at] << "; error is "
                            << 100 * worst / allowed << " % of the tolerance " << tolerance << " x "
                            << largest;
}

inline bool same_bytes(const Tensor& a, const Tensor& b) {
  if (a.shape() != b.shape() || a.dtype() != b.dtype()) return false;
  const size_t row_bytes = size_t(a.cols() * dtype_size(a.dtype()));
  for (int64_t row = 0; row < a.num_rows(); ++row) {
    const auto at = [row](const Tensor& t) {
      return static_cast<const char*>(t.raw()) + row * t.row_stride() * dtype_size(t.dtype());
    };
    if (std::memcmp(at(a), at(b), row_bytes) != 0) return false;
  }
  return true;
}

// Bit for bit, with the first element that differs.
inline void expect_same_bytes(const Tensor& actual, const Tensor& expected,
                              const std::string& what) {
  ASSERT_TRUE(actual.defined() && expected.defined()) << what;
  if (same_bytes(actual, expected)) return;
  ASSERT_EQ(actual.shape(), expected.shape()) << what;
  const std::vector<double> a = actual.to_doubles(), e = expected.to_doubles();
  for (size_t i = 0; i < e.size(); ++i)
    if (a[i] != e[i])
      FAIL() << what << ": element " << i << " of " << expected.shape() << " is " << a[i]
             << ", expected the bits of " << e[i];
  ADD_FAILURE() << what << ": the bytes differ (dtype " << dtype_name(actual.dtype()) << " and "
                << dtype_name(expected.dtype()) << ")";
}

}  // namespace graft
