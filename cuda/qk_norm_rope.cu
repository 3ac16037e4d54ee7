// RMSNorm of every head and then its rotation (Qwen3's queries and keys), forward and backward, in
// one pass over the heads. With n = x rstd and dn = dy turned back by the angle of its position:
//   y = turn(n w)      dx = rstd (w dn - n mean(n w dn))      dw = sum over tokens, heads of dn n
// Without a weight y = turn(x) and dx = dn. Read before: rms_norm.cu, rope.cu.
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"
#include "tensor/heads.h"

namespace graft {
namespace {

constexpr int kThreads = 256;

// Where the heads of a tensor lie: element c of head h of token t at t token + h head + c.
struct HeadStrides {
  int64_t token, head;
};

// What all of this file's kernels read besides activations.
struct Angles {
  const int32_t* positions;  // (T)
  const float* table;        // (table_rows, D), cos in [0, D/2), sin in [D/2, D)
  int64_t table_stride, table_rows;
};

// How (T, heads) is dealt to threads: each head to `lanes` neighbours of one warp.
struct HeadGrid {
  int64_t rows;     // T heads
  int heads, half;  // half = D/2 pairs
  int lanes;        // a power of two, at most 32
};

// A position outside the table turns to NaN: the device cannot throw, and a wrong angle would go
// unseen.
template <int N>
__device__ inline void load_angles(float (&cosine)[N], float (&sine)[N], const Angles& angles,
                                   int64_t token, int i, int half) {
  const int64_t position = angles.positions[token];
  if (position >= 0 && position < angles.table_rows) {
    load_floats<N>(cosine, angles.table + position * angles.table_stride + i);
    load_floats<N>(sine, angles.table + position * angles.table_stride + half + i);
  } else {
    for (int j = 0; j < N; ++j) cosine[j] = sine[j] = NAN;
  }
}

// N pairs (i, i + half) of a head, to be turned by +1 or -1 times their angles.
template <int N>
__device__ inline void turn(float (&first)[N], float (&second)[N], const float (&cosine)[N],
                            const float (&sine)[N], float direction) {
  for (int j = 0; j < N; ++j) {
    const float a = first[j], b = second[j], s = sine[j] * direction;
    first[j] = a * cosine[j] - b * s;
    second[j] = b * cosine[j] + a * s;
  }
}

// The sum over the `lanes` neighbours that share a head; all lanes of the warp take part.
__device__ inline float lanes_sum(float x, int lanes) {
  for (int bits = lanes / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

// qk_norm_rope_forward.
//   y[t,h,:] = turn(x[t,h,:] rstd[t,h] w),   rstd = 1 / sqrt(mean over D of x[t,h,:]^2 + eps)
// Shapes    y, x (T, heads, D) F32 or BF16; w (D) F32, BF16 or F16, or null; rstd (T heads) F32.
// Mapping   a head to D/2N lanes (at most 32), several heads to a warp; a lane owns the N pairs
//           (i, i + D/2) from N l on, then on by N lanes. N is 16 bytes of each half, or one
//           element where D, a stride or a pointer forbid it. y may be x: a lane alone reads and
//           writes its pairs, and the sum comes before the first write.
// Bytes     2 T heads D elements + 4TD of table + 4 T heads. T=16384, 32 heads, D=128, BF16: 279
// MB;
//           the second read of x is expected from cache, and so is the table but once per token.
// Roofline  58 us at 4.8 TB/s (H200 peak); rms_norm and rope by themselves 114. Measured: -
// Numerics  F32, squares summed per lane and then over lanes; one rounding, at the store.
template <class T, class W, int N>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(T* y, HeadStrides y_at, float* rstd, const T* x, HeadStrides x_at, const W* w,
                   Angles angles, HeadGrid grid, float eps) {
  const int lane = int(threadIdx.x) % grid.lanes, half = grid.half;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / grid.lanes;
  // Past the last head there is no work, but the shuffles below want the whole warp.
  const int end = row < grid.rows ? half : 0;
  const int64_t token = row / grid.heads, head = row - token * grid.heads;
  const T* from = x + token * x_at.token + head * x_at.head;
  T* to = y + token * y_at.token + head * y_at.head;
  float first[N], second[N], scale[N], cosine[N], sine[N], inverse = 1;
  if (w) {  // the same for all threads
    float squares = 0;
    for (int i = lane * N; i < end; i += grid.lanes * N) {
      load_floats<N>(first, from + i);
      load_floats<N>(second, from + half + i);
      for (int j = 0; j < N; ++j) squares += first[j] * first[j] + second[j] * second[j];
    }
    inverse = 1.0f / sqrtf(lanes_sum(squares, grid.lanes) / float(2 * half) + eps);
    if (lane == 0 && end > 0) rstd[row] = inverse;
  }
  for (int i = lane * N; i < end; i += grid.lanes * N) {
    load_floats<N>(first, from + i);
    load_floats<N>(second, from + half + i);
    if (w) {
      load_floats<N>(scale, w + i);
      for (int j = 0; j < N; ++j) first[j] = first[j] * inverse * scale[j];
      load_floats<N>(scale, w + half + i);
      for (int j = 0; j < N; ++j) second[j] = second[j] * inverse * scale[j];
    }
    load_angles<N>(cosine, sine, angles, token, i, half);
    turn<N>(first, second, cosine, sine, 1);
    store_floats<N>(to + i, first);
    store_floats<N>(to + half + i, second);
  }
}

// qk_norm_rope_backward (dx).
//   dx[t,h,:] = rstd (w dn - n m),   dn = turn back(dy[t,h,:]),   n = x rstd,   m = mean of n w dn
// Shapes    dx, dy, x (T, heads, D) F32 or BF16; w (D) or null; rstd (T heads) F32.
// Mapping   as the forward. dx may be dy or x, for the same reason.
// Bytes     3 T heads D elements + 4TD of table + 4 T heads. T=16384, 32 heads, D=128, BF16: 413
// MB;
//           the second reads of x and dy are expected from cache.
// Roofline  86 us at 4.8 TB/s (H200 peak); rope and rms_norm by themselves 142. Measured: -
// Numerics  F32, the mean summed per lane and then over lanes; one rounding, at the store.
template <class T, class W, int N>
__global__ void __launch_bounds__(kThreads)
    dx_kernel(T* dx, HeadStrides dx_at, const T* dy, HeadStrides dy_at, const T* x,
              HeadStrides x_at, const W* w, const float* rstd, Angles angles, HeadGrid grid) {
  const int lane = int(threadIdx.x) % grid.lanes, half = grid.half;
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / grid.lanes;
  const int end = row < grid.rows ? half : 0;  // as in the forward
  const int64_t token = row / grid.heads, head = row - token * grid.heads;
  const T* gradient = dy + token * dy_at.token + head * dy_at.head;
  const T* from = x + token * x_at.token + head * x_at.head;
  T* to = dx + token * dx_at.token + head * dx_at.head;
  const float inverse = w && end > 0 ? rstd[row] : 1;
  float first[N], second[N], in[N], scale[N], cosine[N], sine[N], dot = 0, mean = 0;
  if (w) {  // the same for all threads
    for (int i = lane * N; i < end; i += grid.lanes * N) {
      load_floats<N>(first, gradient + i);
      load_floats<N>(second, gradient + half + i);
      load_angles<N>(cosine, sine, angles, token, i, half);
      turn<N>(first, second, cosine, sine, -1);
      load_floats<N>(in, from + i);
      load_floats<N>(scale, w + i);
      for (int j = 0; j < N; ++j) dot += in[j] * inverse * scale[j] * first[j];
      load_floats<N>(in, from + half + i);
      load_floats<N>(scale, w + half + i);
      for (int j = 0; j < N; ++j) dot += in[j] * inverse * scale[j] * second[j];
    }
    mean = lanes_sum(dot, grid.lanes) / float(2 * half);
  }
  for (int i = lane * N; i < end; i += grid.lanes * N) {
    load_floats<N>(first, gradient + i);
    load_floats<N>(second, gradient + half + i);
    load_angles<N>(cosine, sine, angles, token, i, half);
    turn<N>(first, second, cosine, sine, -1);
    if (w) {
      load_floats<N>(in, from + i);
      load_floats<N>(scale, w + i);
      for (int j = 0; j < N; ++j)
        first[j] = inverse * (scale[j] * first[j] - in[j] * inverse * mean);
      load_floats<N>(in, from + half + i);
      load_floats<N>(scale, w + half + i);
      for (int j = 0; j < N; ++j)
        second[j] = inverse * (scale[j] * second[j] - in[j] * inverse * mean);
    }
    store_floats<N>(to + i, first);
    store_floats<N>(to + half + i, second);
  }
}

// qk_norm_rope_backward (dweight), stage 1; stage 2 is sum_rows.
//   partial[k,c] = sum over the heads r of chunk k, in order, of dn[r,c] x[r,c] rstd[r]
// Shapes    dy, x (T, heads, D) F32 or BF16; rstd (T heads); partial (chunks, D) F32.
// Mapping   a thread owns the pair (i, i + D/2) of a chunk: neighbours read neighbours. The number
//           of chunks follows from T heads alone, so that the order of the sum is one.
// Bytes     2 T heads D elements read, 4 chunks D written. T=16384, 32 heads, D=128, BF16: 269 MB.
// Roofline  56 us at 4.8 TB/s (H200 peak); far from it, D/2 threads a block. Only full fine-tuning
//           asks for it. Measured: -
// Numerics  F32; chunks of T heads / 1024 rows keep the error of long sums small.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dweight_partial(float* partial, const T* dy, HeadStrides dy_at, const T* x, HeadStrides x_at,
                    const float* rstd, Angles angles, HeadGrid grid, int64_t rows_per_chunk) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x), half = grid.half;
  if (i >= half) return;
  const int64_t begin = blockIdx.y * rows_per_chunk;
  const int64_t end = begin + rows_per_chunk < grid.rows ? begin + rows_per_chunk : grid.rows;
  float sum_first = 0, sum_second = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row / grid.heads, head = row - token * grid.heads;
    const T* gradient = dy + token * dy_at.token + head * dy_at.head + i;
    const T* from = x + token * x_at.token + head * x_at.head + i;
    float first[1] = {as_float(gradient[0])}, second[1] = {as_float(gradient[half])};
    float cosine[1], sine[1];
    load_angles<1>(cosine, sine, angles, token, i, half);
    turn<1>(first, second, cosine, sine, -1);
    sum_first += first[0] * as_float(from[0]) * rstd[row];
    sum_second += second[0] * as_float(from[half]) * rstd[row];
  }
  partial[blockIdx.y * 2 * half + i] = sum_first;
  partial[blockIdx.y * 2 * half + half + i] = sum_second;
}

HeadStrides strides_of(const Tensor& t, int64_t head_dim) {
  if (!t.defined()) return {};
  const HeadLayout at = head_layout(t, head_dim);
  return {at.token_stride, at.head_stride};
}

Angles angles_of(const Tensor& positions, const Tensor& cos_sin) {
  return {device_data<const int32_t>(positions), device_data<const float>(cos_sin),
          cos_sin.row_stride(), cos_sin.size(0)};
}

void check_arguments(const char* op, const Tensor& positions, const Tensor& cos_sin) {
  CHECK(cos_sin.dtype() == DType::F32, op, ": cos_sin is ", dtype_name(cos_sin.dtype()),
        ", wanted F32 on the GPU");
  if (positions.device() != Device::CPU) return;
  for (int64_t t = 0; t < positions.num_elements(); ++t) {
    const int32_t position = positions.data<int32_t>()[t];
    CHECK(position >= 0 && position < cos_sin.size(0), op, ": position ", position,
          " but the table has ", cos_sin.size(0), " rows");
  }
}

// width: neighbours of each half that a lane reads at once.
HeadGrid head_grid(const HeadLayout& at, int width) {
  HeadGrid grid{at.tokens * at.heads, int(at.heads), int(at.head_dim / 2), 1};
  while (grid.lanes < 32 && grid.lanes * width < grid.half) grid.lanes *= 2;
  return grid;
}

unsigned blocks_of(const HeadGrid& grid) { return ceil_div(grid.rows, kThreads / grid.lanes); }

// f(weight type) with the type of the weight; without one any will do.
template <class F>
void dispatch_weight(const Tensor& weight, F&& f) {
  dispatch_device(weight.defined() ? weight.dtype() : DType::F32, f);
}
template <class W>
const W* weight_data(const Tensor& weight) {
  return weight.defined() ? device_data<const W>(weight) : nullptr;
}

// (chunks, D) F32: the sum of each chunk of heads.
Tensor dweight_partials(const Tensor& dy, const Tensor& x, const Tensor& rstd, Angles angles,
                        const HeadLayout& at, cudaStream_t stream) {
  constexpr int64_t kMinRows = 32, kMaxChunks = 1024;
  const HeadGrid grid = head_grid(at, 1);
  const int64_t wanted = (grid.rows + kMaxChunks - 1) / kMaxChunks;
  const int64_t per_chunk = wanted > kMinRows ? wanted : kMinRows;
  const unsigned chunks = ceil_div(grid.rows, per_chunk);
  Tensor partial =
      Tensor::empty({int64_t(chunks), at.head_dim}, DType::F32, Device::CUDA, Scope::Scratch);
  const unsigned threads = grid.half >= kThreads ? kThreads : 32 * ceil_div(grid.half, 32);
  dispatch_activation("qk_norm_rope_backward", dy.dtype(), [&]<class T>(T) {
    launch(dweight_partial<T>, dim3(ceil_div(grid.half, threads), chunks), dim3(threads), 0, stream,
           device_data<float>(partial), device_data<const T>(dy), strides_of(dy, at.head_dim),
           device_data<const T>(x), strides_of(x, at.head_dim), device_data<const float>(rstd),
           angles, grid, per_chunk);
  });
  return partial;
}

}  // namespace

void CudaBackend::qk_norm_rope_forward(Tensor& y, Tensor& rstd, const Tensor& x,
                                       const Tensor& weight, double eps, const Tensor& positions,
                                       const Tensor& cos_sin) {
  check_arguments("qk_norm_rope", positions, cos_sin);
  const HeadLayout at = head_layout(x, cos_sin.size(1));
  if (at.tokens * at.heads == 0) return;
  const Tensor where = on_device(positions);
  dispatch_activation("qk_norm_rope", x.dtype(), [&]<class T>(T) {
    dispatch_weight(weight, [&]<class W>(W) {
      constexpr int kWide = kVectorWidth<T>;
      const auto start = [&](auto kernel, int width) {
        const HeadGrid grid = head_grid(at, width);
        launch(kernel, dim3(blocks_of(grid)), dim3(kThreads), 0, stream_, device_data<T>(y),
               strides_of(y, at.head_dim),
               weight.defined() ? device_data<float>(rstd) : static_cast<float*>(nullptr),
               device_data<const T>(x), strides_of(x, at.head_dim), weight_data<W>(weight),
               angles_of(where, cos_sin), grid, float(eps));
      };
      if (at.head_dim / 2 % kWide == 0 && vector_rows(kWide, y, x, cos_sin) &&
          (!weight.defined() || vector_rows(kWide, weight)))
        start(forward_kernel<T, W, kWide>, kWide);
      else
        start(forward_kernel<T, W, 1>, 1);
    });
  });
}

void CudaBackend::qk_norm_rope_backward(Tensor& dx, Tensor& dweight, const Tensor& dy,
                                        const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                        const Tensor& positions, const Tensor& cos_sin) {
  check_arguments("qk_norm_rope_backward", positions, cos_sin);
  const HeadLayout at = head_layout(dy, cos_sin.size(1));
  if (at.tokens * at.heads == 0) return;
  const Tensor where = on_device(positions);
  const bool normed = weight.defined();
  const Tensor& in = normed ? x : dy;  // without a weight x is not read
  const auto rstd_data =
      normed ? device_data<const float>(rstd) : static_cast<const float*>(nullptr);
  const HeadStrides dy_at = strides_of(dy, at.head_dim), x_at = strides_of(in, at.head_dim);
  if (normed && dweight.defined())  // first: dx may take the place of dy or of x
    sum_rows(dweight, dweight_partials(dy, x, rstd, angles_of(where, cos_sin), at, stream_), true);
  if (!dx.defined()) return;
  dispatch_activation("qk_norm_rope_backward", dy.dtype(), [&]<class T>(T) {
    dispatch_weight(weight, [&]<class W>(W) {
      constexpr int kWide = kVectorWidth<T>;
      const auto start = [&](auto kernel, int width) {
        const HeadGrid grid = head_grid(at, width);
        launch(kernel, dim3(blocks_of(grid)), dim3(kThreads), 0, stream_, device_data<T>(dx),
               strides_of(dx, at.head_dim), device_data<const T>(dy), dy_at,
               device_data<const T>(in), x_at, weight_data<W>(weight), rstd_data,
               angles_of(where, cos_sin), grid);
      };
      if (at.head_dim / 2 % kWide == 0 && vector_rows(kWide, dx, dy, in, cos_sin) &&
          (!normed || vector_rows(kWide, weight)))
        start(dx_kernel<T, W, kWide>, kWide);
      else
        start(dx_kernel<T, W, 1>, 1);
    });
  });
}

}  // namespace graft
