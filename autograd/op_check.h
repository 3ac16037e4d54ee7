// What every op asks before it touches a kernel. Private to autograd/.
#pragma once

#include "autograd/tape.h"
#include "tensor/backend.h"

namespace graft::ops {

// Statistics and gradients of parameters: F64 in a gradient check, else F32.
inline DType wide(DType dtype) { return dtype == DType::F64 ? DType::F64 : DType::F32; }

// u = x A^T and its gradient: F32, but on the GPU in the dtype of x, for tensor cores want their
// operands in one.
inline DType low_rank_dtype(const Tensor& x) {
  return x.device() == Device::CUDA ? x.dtype() : wide(x.dtype());
}

// An activation: F32, BF16 or F64, of the given rank (0: any).
inline void check_activation(const char* op, const char* what, const Variable& x, int rank) {
  CHECK(x.defined(), op, ": ", what, " is undefined");
  const DType dtype = x.value().dtype();
  CHECK(dtype == DType::F32 || dtype == DType::BF16 || dtype == DType::F64, op, ": ", what, " is ",
        dtype_name(dtype), ", wanted F32, BF16 or F64");
  CHECK(rank == 0 || x.value().rank() == rank, op, ": ", what, " is ", x.shape(), ", wanted rank ",
        rank);
}

// Most kernels take dense rows alone (backend.h says which take strided ones).
inline void check_dense(const char* op, const char* what, const Variable& x) {
  CHECK(x.value().is_contiguous(), op, ": the rows of ", what, " ", x.shape(), " are ",
        x.value().row_stride(), " elements apart; clone it first");
}

// A weight of any float dtype on the device of x.
inline void check_weight(const char* op, const char* what, const Variable& weight,
                         const Shape& shape, const Variable& x) {
  const DType dtype = weight.value().dtype();
  CHECK(dtype != DType::I32 && dtype != DType::U8 && !is_nf4(dtype), op, ": ", what, " is ",
        dtype_name(dtype), ", wanted a float type");
  CHECK(weight.shape() == shape, op, ": ", what, " is ", weight.shape(), ", wanted ", shape);
  CHECK(weight.value().device() == x.value().device(), op, ": ", what, " is on ",
        device_name(weight.value().device()), " but x is on ", device_name(x.value().device()));
}

// A matrix of a product: what check_weight takes, or frozen NF4.
inline void check_matrix(const char* op, const char* what, const Variable& weight,
                         const Shape& shape, const Variable& x) {
  if (!is_nf4(weight.value().dtype())) return check_weight(op, what, weight, shape, x);
  CHECK(!needs_grad(weight), op, ": ", what, " is NF4, which cannot be trained; freeze it");
  CHECK(weight.shape() == shape && weight.value().device() == x.value().device(), op, ": ", what,
        " is ", weight.shape(), " on ", device_name(weight.value().device()), ", wanted ", shape,
        " on ", device_name(x.value().device()));
}

inline void check_same(const char* op, const char* what, const Variable& b, const Variable& a) {
  CHECK(b.value().dtype() == a.value().dtype() && b.value().device() == a.value().device(), op,
        ": ", what, " is ", dtype_name(b.value().dtype()), " on ", device_name(b.value().device()),
        ", wanted ", dtype_name(a.value().dtype()), " on ", device_name(a.value().device()));
}

// Indices stay on the CPU for CPU and Meta.
inline void check_indices(const char* op, const char* what, const Tensor& indices,
                          const Tensor& like) {
  CHECK(indices.defined() && indices.dtype() == DType::I32 && indices.rank() == 1, op, ": ", what,
        " must be I32 of rank 1");
  CHECK(like.device() == Device::CUDA || indices.device() == Device::CPU, op, ": ", what, " is on ",
        device_name(indices.device()), ", wanted cpu");
}

inline Tensor empty_like(const Tensor& x, Scope scope = Scope::Activations) {
  return Tensor::empty(x.shape(), x.dtype(), x.device(), scope);
}

inline Tensor zeros_like(const Tensor& x, DType dtype, Scope scope = Scope::Activations) {
  Tensor zeros = Tensor::empty(x.shape(), dtype, x.device(), scope);
  backend_of(x).fill(zeros, 0);
  return zeros;
}

// The bytes of t where nobody else can see them (a saved tensor whose variable is gone, a dy that
// the tape alone holds), else new ones: for a gradient that may overwrite what it is made from.
inline Tensor reuse_or_empty(const Tensor& t) {
  const bool ours = t.use_count() == 1 && t.is_contiguous() && !t.storage()->is_borrowed();
  return ours ? t : empty_like(t);
}

}  // namespace graft::ops
