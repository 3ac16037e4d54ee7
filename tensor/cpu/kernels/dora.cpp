// DoRA: columns of a matrix times a factor each, alone and inside SwiGLU. The sums of columns go
// over all rows of a piece, in blocks of 32 rows (as sum_rows in elementwise.cpp).
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

constexpr int64_t kBlockRows = 32;
constexpr int kSlab = 4;  // vectors of columns that are taken together: neighbours in memory

template <class T>
T* at(DoraRows m, int64_t row, int64_t col) {
  return static_cast<T*>(m.data) + row * m.stride + col;
}

inline Vec factor(const float* scale, int64_t col, auto lanes) {
  return scale ? load(scale + col, lanes) : broadcast(1.0f);
}

void dora_scale(DoraRows y, DoraRows h, DType dtype, const float* scale, const float* bias,
                int64_t rows, int64_t cols, bool accumulate) {
  with_activation(dtype, [&]<class T>(T) {
    for (int64_t r = 0; r < rows; ++r)
      for_each_vector(cols, [&](int64_t c, auto lanes) {
        Vec sum = load(scale + c, lanes) * load(at<T>(h, r, c), lanes);
        if (bias) sum += load(bias + c, lanes);
        if (accumulate) sum += load(at<T>(y, r, c), lanes);
        store(at<T>(y, r, c), sum, lanes);
      });
  });
}

// body(row, col, lanes) gives what is added to each of its kSums sums, for every row; write(col,
// lanes, totals) gets the sums. Slabs of kSlab whole vectors, then vector by vector.
template <int kSums, class Body, class Write>
inline __attribute__((always_inline)) void sum_columns(int64_t rows, int64_t cols, Body body,
                                                       Write write) {
  struct Sums {
    Vec v[kSums];
  };
  int64_t c = 0;
  for (; c + kSlab * kLanes <= cols; c += kSlab * kLanes) {
    Sums total[kSlab] = {};
    for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
      Sums block[kSlab] = {};
      for (int64_t r = begin; r < rows && r < begin + kBlockRows; ++r)
        for (int v = 0; v < kSlab; ++v) body(r, c + v * kLanes, block[v].v, Full{});
      for (int v = 0; v < kSlab; ++v)
        for (int s = 0; s < kSums; ++s) total[v].v[s] += block[v].v[s];
    }
    for (int v = 0; v < kSlab; ++v) write(c + v * kLanes, total[v].v, Full{});
  }
  const auto one = [&](int64_t col, auto lanes) {
    Sums total = {};
    for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
      Sums block = {};
      for (int64_t r = begin; r < rows && r < begin + kBlockRows; ++r) body(r, col, block.v, lanes);
      for (int s = 0; s < kSums; ++s) total.v[s] += block.v[s];
    }
    write(col, total.v, lanes);
  };
  for_each_vector(cols - c, [&](int64_t i, auto lanes) { one(c + i, lanes); });
}

void dora_scale_backward(DoraRows dh, float* sums, DoraRows dy, DoraRows h, DType dtype,
                         const float* scale, int64_t rows, int64_t cols) {
  with_activation(dtype, [&]<class T>(T) {
    sum_columns<1>(
        rows, cols,
        [&](int64_t r, int64_t c, Vec* sum, auto lanes) {
          const Vec d = load(at<T>(dy, r, c), lanes);
          if (sums) sum[0] += d * load(at<T>(h, r, c), lanes);
          if (dh.data) store(at<T>(dh, r, c), load(scale + c, lanes) * d, lanes);
        },
        [&](int64_t c, const Vec* sum, auto lanes) {
          if (sums) store(sums + c, sum[0], lanes);
        });
  });
}

inline Vec sigmoid(Vec g) { return 1.0f / (1.0f + exp(-g)); }

void dora_swiglu_forward(DoraRows y, const DoraSwiglu& in) {
  with_activation(in.dtype, [&]<class T>(T) {
    for (int64_t r = 0; r < in.rows; ++r)
      for_each_vector(in.cols, [&](int64_t c, auto lanes) {
        const Vec g = factor(in.gate_scale, c, lanes) * load(at<T>(in.gate, r, c), lanes);
        const Vec u = factor(in.up_scale, c, lanes) * load(at<T>(in.up, r, c), lanes);
        store(at<T>(y, r, c), g * sigmoid(g) * u, lanes);
      });
  });
}

void dora_swiglu_backward(DoraRows dgate, DoraRows dup, float* gate_sums, float* up_sums,
                          DoraRows dy, const DoraSwiglu& in) {
  with_activation(in.dtype, [&]<class T>(T) {
    sum_columns<2>(
        in.rows, in.cols,
        [&](int64_t r, int64_t c, Vec* sum, auto lanes) {
          const Vec g1 = factor(in.gate_scale, c, lanes), g2 = factor(in.up_scale, c, lanes);
          const Vec d = load(at<T>(dy, r, c), lanes);
          const Vec h1 = load(at<T>(in.gate, r, c), lanes);
          const Vec h2 = load(at<T>(in.up, r, c), lanes);
          const Vec g = g1 * h1, s = sigmoid(g);
          const Vec d1 = d * g2 * h2 * (s + g * s * (1.0f - s)), d2 = d * g * s;
          sum[0] += d1 * h1;
          sum[1] += d2 * h2;
          if (dgate.data) store(at<T>(dgate, r, c), g1 * d1, lanes);
          if (dup.data) store(at<T>(dup, r, c), g2 * d2, lanes);
        },
        [&](int64_t c, const Vec* sum, auto lanes) {
          if (gate_sums) store(gate_sums + c, sum[0], lanes);
          if (up_sums) store(up_sums + c, sum[1], lanes);
        });
  });
}

void row_squares(float* squares, DoraRows w, DType dtype, int64_t rows, int64_t cols) {
  with_weight(dtype, [&]<class T>(T) {
    for (int64_t r = 0; r < rows; ++r) {
      Vec sum{};
      // Blocks are summed on their own first, so that the error does not grow with the row.
      for (int64_t begin = 0; begin < cols; begin += 512) {
        Vec block{};
        for_each_vector(cols - begin < 512 ? cols - begin : 512, [&](int64_t c, auto lanes) {
          const Vec x = load(at<const T>(w, r, begin + c), lanes);
          block += x * x;
        });
        sum += block;
      }
      float total = 0;
      for (int i = 0; i < kLanes; ++i) total += sum[i];
      squares[r] = total;
    }
  });
}

}  // namespace

void install_dora(CpuKernels& kernels) {
  kernels.dora_scale = dora_scale;
  kernels.dora_scale_backward = dora_scale_backward;
  kernels.dora_swiglu_forward = dora_swiglu_forward;
  kernels.dora_swiglu_backward = dora_swiglu_backward;
  kernels.row_squares = row_squares;
}

}  // namespace graft::GRAFT_ISA
