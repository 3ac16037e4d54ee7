// What kernels share: conversions, sums over a warp, 16-byte vectors, and the step from
// a run-time dtype to the device's type.
#pragma once

#include <type_traits>

#include "cuda/gpu.cuh"
#include "tensor/dtype.h"

namespace graft {

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float as_float(__half x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
__device__ inline T round_to(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(x);
  else
    return x;
}

// N elements that are read and written at once; sizeof is 16 for full width.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T v[N];
};

// How many elements a thread moves at once: 16 bytes of the narrowest type.
template <class... T>
constexpr int kVectorWidth = (... || (sizeof(T) == 2)) ? 8 : 4;

// N elements at p as floats, by loads of at most 16 bytes; p is aligned to such a load.
template <int N, class T>
__device__ inline void load_floats(float (&out)[N], const T* p) {
  constexpr int kChunk = N * int(sizeof(T)) > 16 ? 16 / int(sizeof(T)) : N;
  for (int i = 0; i < N; i += kChunk) {
    const auto chunk = *reinterpret_cast<const Vector<T, kChunk>*>(p + i);
    for (int j = 0; j < kChunk; ++j) out[i + j] = as_float(chunk.v[j]);
  }
}
// The same for stores; each element is rounded to nearest even.
template <int N, class T>
__device__ inline void store_floats(T* p, const float (&in)[N]) {
  constexpr int kChunk = N * int(sizeof(T)) > 16 ? 16 / int(sizeof(T)) : N;
  for (int i = 0; i < N; i += kChunk) {
    Vector<T, kChunk> chunk;
    for (int j = 0; j < kChunk; ++j) chunk.v[j] = round_to<T>(in[i + j]);
    *reinterpret_cast<Vector<T, kChunk>*>(p + i) = chunk;
  }
}

// Host: whether the rows of every tensor can be read `width` elements at a time by 16-byte loads.
template <class... Tensors>
bool vector_rows(int width, const Tensors&... tensors) {
  const auto fits = [width](const auto& t) {
    return t.cols() % width == 0 && (t.row_stride() % width == 0 || t.num_rows() <= 1) &&
           reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0;
  };
  return (... && fits(tensors));
}

// A grid over the elements of a matrix: every thread owns `width` neighbours of one row, and no
// block spans two rows, so that the row is found by one division per block.
struct RowGrid {
  unsigned blocks_per_row = 0;
  unsigned blocks = 0;
  unsigned threads = 0;
};
inline RowGrid row_grid(int64_t rows, int64_t cols, int width) {
  RowGrid grid;
  const int64_t per_row = (cols + width - 1) / width;  // threads that have work
  grid.threads = per_row >= 256 ? 256u : 32 * ceil_div(per_row, 32);
  if (rows == 0 || cols == 0) return grid;
  grid.blocks_per_row = ceil_div(per_row, grid.threads);
  CHECK(rows <= INT32_MAX / int64_t(grid.blocks_per_row), "cuda: ", rows, " rows of ", cols,
        " need more than 2^31 blocks");
  grid.blocks = unsigned(rows) * grid.blocks_per_row;
  return grid;
}
struct RowPlace {
  int64_t row, col;
};
// Where the calling thread's elements begin; col may lie at or past the end of the row.
template <int N>
__device__ inline RowPlace row_place(unsigned blocks_per_row) {
  const unsigned row = blockIdx.x / blocks_per_row;
  const unsigned block = blockIdx.x - row * blocks_per_row;
  return {int64_t(row), (int64_t(block) * blockDim.x + threadIdx.x) * N};
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

constexpr unsigned kAllLanes = 0xffffffffu;

// Every lane gets the result; all 32 lanes must call.
__device__ inline float warp_sum(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bits));
  return x;
}

// Host: dispatch_device(x.dtype(), [&]<class T>(T) { launch(kernel<T>, ...); }) with T one of
// float, bf16 and __half.
template <class F>
void dispatch_device(DType dtype, F&& f) {
  switch (dtype) {
    case DType::F32:
      return f(float{});
    case DType::BF16:
      return f(bf16{});
    case DType::F16:
      return f(__half{});
    default:
      fail("cuda: no kernel for dtype ", dtype_name(dtype));
  }
}

// The same where activations are computed: F32 or BF16. `op` names the caller in the error.
template <class F>
void dispatch_activation(const char* op, DType dtype, F&& f) {
  if (dtype == DType::F32) return f(float{});
  if (dtype == DType::BF16) return f(bf16{});
  fail(op, ": dtype is ", dtype_name(dtype), ", wanted F32 or BF16 on the GPU");
}

// The bytes of a tensor as the device's type.
template <class T, class TensorType>
T* device_data(const TensorType& tensor) {
  return static_cast<T*>(tensor.raw());
}

// A matrix as a kernel takes it, rows strided; data null: absent.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
};
template <class T, class TensorType>
Rows<T> rows_of(const TensorType& t) {
  if (!t.defined()) return {nullptr, 0};
  return {device_data<T>(t), t.row_stride()};
}

}  // namespace graft
