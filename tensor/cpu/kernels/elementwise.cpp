// Elementwise loops over n elements in a row, and column sums.
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

void copy(void* y, DType y_dtype, const void* x, DType x_dtype, int64_t n) {
  with_weight(y_dtype, [&]<class Y>(Y) {
    with_weight(x_dtype, [&]<class X>(X) {
      for_each_vector(n, [&](int64_t i, auto lanes) {
        store(static_cast<Y*>(y) + i, load(static_cast<const X*>(x) + i, lanes), lanes);
      });
    });
  });
}

void add(void* y, const void* a, const void* b, DType dtype, int64_t n) {
  with_activation(dtype, [&]<class T>(T) {
    for_each_vector(n, [&](int64_t i, auto lanes) {
      store(static_cast<T*>(y) + i,
            load(static_cast<const T*>(a) + i, lanes) + load(static_cast<const T*>(b) + i, lanes),
            lanes);
    });
  });
}

void axpy(void* y, DType y_dtype, const void* x, DType x_dtype, float alpha, int64_t n) {
  with_activation(y_dtype, [&]<class Y>(Y) {
    with_weight(x_dtype, [&]<class X>(X) {
      for_each_vector(n, [&](int64_t i, auto lanes) {
        const Vec old = load(static_cast<const Y*>(y) + i, lanes);
        store(static_cast<Y*>(y) + i, old + alpha * load(static_cast<const X*>(x) + i, lanes),
              lanes);
      });
    });
  });
}

void scale(void* y, const void* x, DType dtype, float alpha, int64_t n) {
  with_activation(dtype, [&]<class T>(T) {
    for_each_vector(n, [&](int64_t i, auto lanes) {
      store(static_cast<T*>(y) + i, alpha * load(static_cast<const T*>(x) + i, lanes), lanes);
    });
  });
}

// Blocks of 32 rows are summed on their own first, so that the error does not grow with the rows.
void sum_rows(float* db, const void* dy, DType dtype, int64_t rows, int64_t cols, int64_t stride,
              bool accumulate) {
  with_activation(dtype, [&]<class T>(T) {
    for_each_vector(cols, [&](int64_t i, auto lanes) {
      Vec total = accumulate ? load(db + i, lanes) : Vec{};
      for (int64_t begin = 0; begin < rows; begin += 32) {
        Vec block{};
        for (int64_t r = begin; r < rows && r < begin + 32; ++r)
          block += load(static_cast<const T*>(dy) + r * stride + i, lanes);
        total += block;
      }
      store(db + i, total, lanes);
    });
  });
}

}  // namespace

void install_elementwise(CpuKernels& kernels) {
  kernels.copy = copy;
  kernels.add = add;
  kernels.axpy = axpy;
  kernels.scale = scale;
  kernels.sum_rows = sum_rows;
}

}  // namespace graft::GRAFT_ISA
