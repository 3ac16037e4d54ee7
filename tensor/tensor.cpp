#include "tensor/tensor.h"

#include <cstring>

#include "tensor/backend.h"
#include "tensor/dispatch.h"
#include "tensor/nf4.h"

namespace graft {
namespace {

int64_t dense_bytes(const Shape& shape, DType dtype) {
  const int64_t elements = shape.num_elements();
  return is_nf4(dtype) ? nf4_bytes(elements, dtype) : elements * dtype_size(dtype);
}

void check_can_slice(const char* op, DType dtype) {
  CHECK(!is_nf4(dtype), op, ": the tensor is ", dtype_name(dtype),
        ", whose blocks run across rows; widen it first");
}

}  // namespace

Storage::Storage(int64_t bytes, Device device, Scope scope)
    : data_(allocator_of(device).allocate(bytes, scope)),
      bytes_(bytes),
      device_(device),
      scope_(scope) {}

Storage::Storage(void* data, int64_t bytes, Device device, std::shared_ptr<const void> owner)
    : data_(data), bytes_(bytes), device_(device), owner_(std::move(owner)) {
  CHECK(owner_ != nullptr, "storage: borrowed bytes need an owner");
}

Storage::~Storage() {
  if (!owner_) allocator_of(device_).free(data_, bytes_, scope_);
}

Tensor Tensor::empty(Shape shape, DType dtype, Device device, Scope scope) {
  Tensor t;
  t.shape_ = shape;
  t.dtype_ = dtype;
  t.storage_ = std::make_shared<Storage>(dense_bytes(shape, dtype), device, scope);
  t.row_stride_ = t.cols();
  return t;
}

Tensor Tensor::zeros(Shape shape, DType dtype, Device device, Scope scope) {
  Tensor t = empty(shape, dtype, device, scope);
  if (device == Device::CUDA) backend_of(device).fill(t, 0);
  if (device == Device::CPU) std::memset(t.raw(), 0, size_t(t.num_bytes()));
  return t;
}

Tensor Tensor::from_floats(Shape shape, const std::vector<double>& values, DType dtype) {
  CHECK(int64_t(values.size()) == shape.num_elements(), "from_floats: ", values.size(),
        " values for shape ", shape);
  Tensor t = empty(shape, dtype);
  dispatch_float(dtype, [&]<class T>(T) {
    for (size_t i = 0; i < values.size(); ++i) t.data<T>()[i] = from_double<T>(values[i]);
  });
  return t;
}

Tensor Tensor::from_ints(Shape shape, const std::vector<int32_t>& values, Device device) {
  CHECK(int64_t(values.size()) == shape.num_elements(), "from_ints: ", values.size(),
        " values for shape ", shape);
  CHECK(device == Device::CPU, "from_ints: device is ", device_name(device), ", wanted cpu");
  Tensor t = empty(shape, DType::I32, device);
  if (!values.empty()) std::memcpy(t.raw(), values.data(), values.size() * 4);
  return t;
}

Tensor Tensor::with_spare_cols(int64_t rows, int64_t cols, int64_t spare, DType dtype,
                               Device device, Scope scope) {
  const int64_t stride = spare == 0 ? cols : (cols + spare + 63) / 64 * 64;
  Tensor t = empty({rows, stride}, dtype, device, scope).slice_cols(0, cols);
  t.spare_cols_ = spare;
  return t;
}

Tensor Tensor::borrow(const void* data, Shape shape, DType dtype,
                      std::shared_ptr<const void> owner) {
  Tensor t;
  t.shape_ = shape;
  t.dtype_ = dtype;
  t.storage_ = std::make_shared<Storage>(const_cast<void*>(data), dense_bytes(shape, dtype),
                                         Device::CPU, std::move(owner));
  t.row_stride_ = t.cols();
  return t;
}

int64_t Tensor::num_bytes() const { return dense_bytes(shape_, dtype_); }

Tensor Tensor::reshape(Shape shape) const {
  CHECK(shape.num_elements() == num_elements(), "reshape: ", shape_, " to ", shape);
  CHECK(is_contiguous(), "reshape: the rows of ", shape_, " are ", row_stride_,
        " elements apart; clone it first");
  Tensor t = *this;
  t.shape_ = shape;
  t.row_stride_ = t.cols();
  t.spare_cols_ = 0;
  return t;
}

Tensor Tensor::slice_rows(int64_t begin, int64_t end) const {
  CHECK(rank() >= 1 && 0 <= begin && begin <= end && end <= size(0), "slice_rows: [", begin, ", ",
        end, ") of ", shape_);
  check_can_slice("slice_rows", dtype_);
  Tensor t = *this;
  // Elements from an index of dimension 0 to the next; dimensions between 0 and the rows are dense.
  int64_t stride = rank() == 1 ? 1 : row_stride_;
  Shape shape{end - begin};
  for (int i = 1; i < rank(); ++i) {
    if (i < rank() - 1) stride *= size(i);
    shape.push_back(size(i));
  }
  t.shape_ = shape;
  t.byte_offset_ += begin * stride * dtype_size(dtype_);
  if (rank() == 1) t.row_stride_ = end - begin;
  return t;
}

Tensor Tensor::slice_cols(int64_t begin, int64_t end) const {
  CHECK(rank() == 2 && 0 <= begin && begin <= end && end <= size(1), "slice_cols: [", begin, ", ",
        end, ") of ", shape_);
  check_can_slice("slice_cols", dtype_);
  Tensor t = *this;
  t.shape_ = {size(0), end - begin};
  t.byte_offset_ += begin * dtype_size(dtype_);
  t.spare_cols_ = 0;
  return t;
}

Tensor Tensor::widen_cols(int64_t more) const {
  CHECK(rank() == 2 && 0 <= more && more <= spare_cols_, "widen_cols: by ", more, ", but ", shape_,
        " has ", spare_cols_, " spare columns");
  Tensor t = *this;
  t.shape_ = {size(0), size(1) + more};
  t.spare_cols_ -= more;
  return t;
}

Tensor Tensor::clone(Scope scope) const {
  Tensor t = empty(shape_, dtype_, device(), scope);
  if (device() == Device::Meta) return t;
  if (device() == Device::CUDA) {
    backend_of(device()).copy(t, *this);
    return t;
  }
  if (is_nf4(dtype_)) {
    std::memcpy(t.raw(), raw(), size_t(num_bytes()));
    return t;
  }
  const int64_t row_bytes = cols() * dtype_size(dtype_);
  for (int64_t row = 0; row < num_rows(); ++row)
    std::memcpy(static_cast<char*>(t.raw()) + row * row_bytes,
                static_cast<const char*>(raw()) + row * row_stride_ * dtype_size(dtype_),
                size_t(row_bytes));
  return t;
}

Tensor Tensor::to(DType dtype, Scope scope) const {
  if (dtype == dtype_) return *this;
  CHECK(!is_nf4(dtype), "to: ", dtype_name(dtype), " is made by nf4_quantise");
  Tensor t = empty(shape_, dtype, device(), scope);
  if (device() == Device::Meta) return t;
  if (device() == Device::CUDA || is_nf4(dtype_)) {
    backend_of(device()).copy(t, *this);
    return t;
  }
  const int64_t columns = cols();
  dispatch_float(dtype_, [&]<class From>(From) {
    dispatch_float(dtype, [&]<class To>(To) {
      for (int64_t row = 0; row < num_rows(); ++row) {
        const From* from = data<From>() + row * row_stride_;
        To* to = t.data<To>() + row * columns;
        for (int64_t c = 0; c < columns; ++c) {
          // From a narrow type through float, so that BF16 is rounded once; from F64 directly.
          if constexpr (std::is_same_v<From, double>)
            to[c] = from_double<To>(from[c]);
          else
            to[c] = from_float<To>(to_float(from[c]));
        }
      }
    });
  });
  return t;
}

Tensor Tensor::to(Device to_device, Scope scope) const {
  if (to_device == device()) return *this;
  Tensor t = empty(shape_, dtype_, to_device, scope);
  if (to_device == Device::Meta || device() == Device::Meta) return t;
  backend_of(Device::CUDA).copy(t, *this);
  return t;
}

std::vector<double> Tensor::to_doubles() const {
  if (device() == Device::CUDA) return to(Device::CPU).to_doubles();
  if (is_nf4(dtype_)) return to(DType::F32, Scope::Scratch).to_doubles();
  std::vector<double> values;
  values.reserve(size_t(num_elements()));
  const auto collect = [&]<class T>(T) {
    for (int64_t row = 0; row < num_rows(); ++row)
      for (int64_t c = 0; c < cols(); ++c) {
        const T value = data<T>()[row * row_stride_ + c];
        if constexpr (std::is_same_v<T, double> || std::is_same_v<T, int32_t>)
          values.push_back(double(value));
        else
          values.push_back(to_float(value));
      }
  };
  if (dtype_ == DType::I32)
    collect(int32_t{});
  else
    dispatch_float(dtype_, collect);
  return values;
}

double Tensor::item() const {
  CHECK(num_elements() == 1, "item: ", shape_, " has ", num_elements(), " elements, wanted one");
  return to_doubles()[0];
}

}  // namespace graft
