// From a run-time dtype to a C++ type: calls the generic lambda with a value of that type.
//   dispatch_float(x.dtype(), [&]<class T>(T) { loop(x.data<T>()); });
#pragma once

#include <type_traits>

#include "tensor/check.h"
#include "tensor/dtype.h"

namespace graft {

template <class F>
decltype(auto) dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::F32:
      return f(float{});
    case DType::BF16:
      return f(BFloat16{});
    case DType::F16:
      return f(Float16{});
    case DType::F64:
      return f(double{});
    default:
      fail("dtype ", dtype_name(dtype), " is not a floating-point type");
  }
}

template <class T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return to_bfloat16(value);
  else if constexpr (std::is_same_v<T, Float16>)
    return to_float16(value);
  else
    return T(value);
}

template <class T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, double>)
    return value;
  else
    return from_float<T>(float(value));
}

inline double to_double(double x) { return x; }
inline double to_double(float x) { return x; }
inline double to_double(BFloat16 x) { return to_float(x); }
inline double to_double(Float16 x) { return to_float(x); }

}  // namespace graft
