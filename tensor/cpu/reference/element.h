// How the reference kernels read and write: any float dtype as double, by row and column. The dtype
// is looked up at every element, which is slow and leaves nothing to hide behind.
#pragma once

#include "tensor/nf4.h"

namespace graft::reference {

inline double load(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::F32:
      return static_cast<const float*>(data)[i];
    case DType::F64:
      return static_cast<const double*>(data)[i];
    case DType::BF16:
      return to_float(static_cast<const BFloat16*>(data)[i]);
    case DType::F16:
      return to_float(static_cast<const Float16*>(data)[i]);
    case DType::I32:
      return static_cast<const int32_t*>(data)[i];
    case DType::U8:
      return static_cast<const uint8_t*>(data)[i];
    default:
      break;  // NF4: In
  }
  fail("reference: unknown dtype");
}

inline void store(DType dtype, void* data, int64_t i, double value) {
  switch (dtype) {
    case DType::F32:
      static_cast<float*>(data)[i] = float(value);
      return;
    case DType::F64:
      static_cast<double*>(data)[i] = value;
      return;
    case DType::BF16:
      static_cast<BFloat16*>(data)[i] = to_bfloat16(float(value));
      return;
    case DType::F16:
      static_cast<Float16*>(data)[i] = to_float16(float(value));
      return;
    case DType::I32:
      static_cast<int32_t*>(data)[i] = int32_t(value);
      return;
    case DType::U8:
      static_cast<uint8_t*>(data)[i] = uint8_t(value);
      return;
    default:
      break;
  }
  fail("reference: unknown dtype");
}

// A tensor as the matrix num_rows() x cols() (tensor.h). Views share the bytes of the tensor.
class In {
 public:
  explicit In(const Tensor& t) : data_(t.raw()), dtype_(t.dtype()), stride_(t.row_stride()) {
    if (is_nf4(dtype_)) nf4_ = nf4_view(t);
  }
  double operator()(int64_t row, int64_t col) const {
    if (nf4_.codes) return nf4_value(nf4_, row * stride_ + col);
    return load(dtype_, data_, row * stride_ + col);
  }

 private:
  const void* data_;
  DType dtype_;
  int64_t stride_;
  Nf4View nf4_;
};

class Out {
 public:
  explicit Out(Tensor& t) : data_(t.raw()), dtype_(t.dtype()), stride_(t.row_stride()) {}
  double get(int64_t row, int64_t col) const { return load(dtype_, data_, row * stride_ + col); }
  void set(int64_t row, int64_t col, double value) {
    store(dtype_, data_, row * stride_ + col, value);
  }
  void add(int64_t row, int64_t col, double value) { set(row, col, get(row, col) + value); }

 private:
  void* data_;
  DType dtype_;
  int64_t stride_;
};

}  // namespace graft::reference
