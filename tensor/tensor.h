// Tensor: a shape, a dtype and a place in a Storage. A value type; copying shares the bytes.
// Row-major: the last dimension is contiguous, and the one free stride is that of the rows (of
// dimension rank-2, all outer dimensions being dense over it), so views are reshape, a slice of
// dimension 0, and a slice of columns. Tensors know nothing of gradients (autograd/variable.h
// does).
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <vector>

#include "tensor/allocator.h"
#include "tensor/device.h"
#include "tensor/dtype.h"
#include "tensor/shape.h"

namespace graft {

// One allocation. Frees its bytes into the device's allocator, or keeps `owner` (a mapped file,
// say) alive for as long as a tensor points into it.
class Storage {
 public:
  Storage(int64_t bytes, Device device, Scope scope);
  Storage(void* data, int64_t bytes, Device device, std::shared_ptr<const void> owner);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  Device device() const { return device_; }
  bool is_borrowed() const { return owner_ != nullptr; }  // read-only: a mapped file

 private:
  void* data_;
  int64_t bytes_;
  Device device_;
  Scope scope_ = Scope::Activations;
  std::shared_ptr<const void> owner_;
};

class Tensor {
 public:
  Tensor() = default;  // undefined: defined() is false, nothing else may be asked

  // Contents unspecified / zero / given.
  static Tensor empty(Shape shape, DType dtype, Device device = Device::CPU,
                      Scope scope = Scope::Activations);
  static Tensor zeros(Shape shape, DType dtype, Device device = Device::CPU,
                      Scope scope = Scope::Activations);
  static Tensor from_floats(Shape shape, const std::vector<double>& values, DType dtype);  // CPU
  static Tensor from_ints(Shape shape, const std::vector<int32_t>& values,
                          Device device = Device::CPU);  // I32
  // A matrix with `spare` columns behind each row, which belong to this tensor and which nobody
  // else reads or writes (widen_cols): a later product puts what it needs there, so that matrix and
  // addition are one operand. Rows are a multiple of 64 elements apart. spare 0: dense.
  static Tensor with_spare_cols(int64_t rows, int64_t cols, int64_t spare, DType dtype,
                                Device device = Device::CPU, Scope scope = Scope::Activations);
  // Bytes that somebody else owns; read-only by convention.
  static Tensor borrow(const void* data, Shape shape, DType dtype,
                       std::shared_ptr<const void> owner);

  bool defined() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  int rank() const { return shape_.rank(); }
  int64_t size(int i) const { return shape_[i]; }
  int64_t num_elements() const { return shape_.num_elements(); }
  int64_t num_bytes() const;  // dense
  DType dtype() const { return dtype_; }
  Device device() const { return storage_->device(); }

  // The tensor seen as a matrix: everything but the last dimension, by the last.
  int64_t num_rows() const { return rank() == 0 ? 1 : num_elements() / (cols() ? cols() : 1); }
  int64_t cols() const { return rank() == 0 ? 1 : shape_[-1]; }
  int64_t row_stride() const { return row_stride_; }  // elements from a row to the next
  bool is_contiguous() const { return row_stride_ == cols() || num_rows() <= 1; }

  // Views: they share the bytes. Of NF4 (nf4.h) there is reshape alone.
  Tensor reshape(Shape shape) const;                    // this must be contiguous
  Tensor slice_rows(int64_t begin, int64_t end) const;  // of dimension 0
  Tensor slice_cols(int64_t begin, int64_t end) const;  // of the last dimension; rank 2
  // With the first `more` spare columns as columns. Slices of columns have no spare ones.
  Tensor widen_cols(int64_t more) const;
  int64_t spare_cols() const { return spare_cols_; }

  void* raw() const { return static_cast<char*>(storage_->data()) + byte_offset_; }
  template <class T>
  T* data() const {  // T must be the C++ type of dtype(): float, double, BFloat16, Float16, int32_t
    return static_cast<T*>(raw());
  }

  // Copies. `clone` is dense. `to` converts (rounding to nearest even) or moves to another device;
  // it returns *this without a copy when nothing would change. What goes from the GPU to the CPU
  // waits for the GPU. To NF4 there is nf4_quantise.
  Tensor clone(Scope scope = Scope::Activations) const;
  Tensor to(DType dtype, Scope scope = Scope::Activations) const;
  Tensor to(Device device, Scope scope = Scope::Activations) const;
  std::vector<double> to_doubles() const;
  double item() const;  // of a tensor of one element

  // How many tensors share these bytes; the tape accumulates in place only where this is 1.
  long use_count() const { return storage_.use_count(); }
  const std::shared_ptr<Storage>& storage() const { return storage_; }

 private:
  Shape shape_;
  DType dtype_ = DType::F32;
  std::shared_ptr<Storage> storage_;
  int64_t byte_offset_ = 0;
  int64_t row_stride_ = 0;
  int64_t spare_cols_ = 0;
};

}  // namespace graft
