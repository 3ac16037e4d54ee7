// DoRA: columns of a matrix times a factor each, alone and inside SwiGLU. The sums of columns go
// over the rows of a piece; cpu_dora.cpp adds up the pieces.
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

constexpr int64_t kBlockRows = 4;

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

// body(row, col, sums, lanes) adds its part to each of kSums sums, which go to out[0][col], ...,
// where that is not null. Few rows at a time, so that memory is read in order.
template <int kSums, class Body>
inline __attribute__((always_inline)) void sum_columns(int64_t rows, int64_t cols,
                                                       float* const (&out)[kSums], Body body) {
  for (int64_t begin = 0; begin < rows; begin += kBlockRows)
    for_each_vector(cols, [&](int64_t c, auto lanes) {
      Vec sums[kSums] = {};
      for (int64_t r = begin; r < rows && r < begin + kBlockRows; ++r) body(r, c, sums, lanes);
      for (int s = 0; s < kSums; ++s) {
        if (!out[s]) continue;
        if (begin > 0) sums[s] += load(out[s] + c, lanes);
        store(out[s] + c, sums[s], lanes);
      }
    });
}

void dora_scale_backward(DoraRows dh, float* sums, DoraRows dy, DoraRows h, DType dtype,
                         const float* scale, int64_t rows, int64_t cols) {
  with_activation(dtype, [&]<class T>(T) {
    float* const out[] = {sums};
    sum_columns<1>(rows, cols, out, [&](int64_t r, int64_t c, Vec* sum, auto lanes) {
      const Vec d = load(at<T>(dy, r, c), lanes);
      if (sums) sum[0] += d * load(at<T>(h, r, c), lanes);
      if (dh.data) store(at<T>(dh, r, c), load(scale + c, lanes) * d, lanes);
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
    float* const out[] = {gate_sums, up_sums};
    sum_columns<2>(in.rows, in.cols, out, [&](int64_t r, int64_t c, Vec* sum, auto lanes) {
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
