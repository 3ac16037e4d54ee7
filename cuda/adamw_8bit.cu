// AdamW with its moments in 8 bits (tensor/blockwise8.h). Read adamw.cu first.
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"
#include "cuda/step_scalars.h"
#include "tensor/blockwise8.h"

namespace graft {
namespace {

constexpr int kThreads = int(kBlock8);  // a block of threads for a block of elements

// Every thread gets the largest x of the block. `scratch` (8) is free again after the next barrier.
__device__ float block_max(float x, float* scratch) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();  // every warp's largest is written
  float largest = scratch[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) largest = fmaxf(largest, scratch[warp]);
  return largest;
}

// The code of x in [-1, 1], as dynamic_codes has it: the number of middles between neighbours of
// the map that lie below the point of x, found by halving.
__device__ int code_of(float x, const float* map) {
  const float clamped = fminf(fmaxf(x, -1.0f), 1.0f);
  const float index = __fadd_rn(__fmul_rn((clamped + 1.0f) * 0.5f, 65535.0f), 0.5f);
  const float point = __fadd_rn(-1.0f, __fdiv_rn(2.0f * float(int(index)), 65535.0f));
  int code = 0;
  for (int half = 128; half > 0; half /= 2)
    if (0.5f * (map[code + half - 1] + map[code + half]) < point) code += half;
  return code;
}

// adamw_8bit.
//   m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2,   of codes: map[code] absmax
//   w = (1 - lr wd) w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
// Shapes    w, g (n) F32; m, v (n) U8 with absmax (n / 256) F32; maps (2, 256) F32; g is multiplied
//           by the one F64 at grad_scale, NaN: nothing is done.
// Mapping   a block of 256 threads owns 256 elements with one scale, a thread one of them; the maps
//           lie in shared memory.
// Bytes     10n read, 6n written. n = 83.9 M: 1.3 GB.
// Roofline  280 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32; the products that decide on a code are rounded one by one, as on the CPU.
__global__ void __launch_bounds__(kThreads)
    adamw_8bit_kernel(float* w, uint8_t* m, float* m_absmax, uint8_t* v, float* v_absmax,
                      const float* g, int64_t n, const float* maps, const double* grad_scale,
                      AdamWConstants given, float given_beta1, const AdamWConstants* captured,
                      bool decays) {
  SHARED_ARRAY(float, signed_map, 256);
  SHARED_ARRAY(float, unsigned_map, 256);
  SHARED_ARRAY(float, scratch, 16);
  const float scale = float(*grad_scale);
  if (scale != scale) return;  // NaN, for the whole grid
  signed_map[threadIdx.x] = maps[threadIdx.x];
  unsigned_map[threadIdx.x] = maps[256 + threadIdx.x];
  __syncthreads();  // the maps are there
  const AdamWConstants k = captured ? *captured : given;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  float first = 0, second = 0;
  if (i < n) {
    const float gradient = g[i] * scale;
    first = signed_map[m[i]] * m_absmax[blockIdx.x] * given_beta1 + k.one_minus_beta1 * gradient;
    second = unsigned_map[v[i]] * v_absmax[blockIdx.x] * k.beta2 +
             k.one_minus_beta2 * gradient * gradient;
    const float denominator = sqrtf(second) / k.root_correction2 + k.epsilon;
    w[i] = w[i] * (decays ? k.decay : 1.0f) - k.step_size * (first / denominator);
  }
  const float m_largest = block_max(fabsf(first), scratch);
  const float v_largest = block_max(second, scratch + 8);
  if (threadIdx.x == 0) {  // read by all before the barrier in block_max
    m_absmax[blockIdx.x] = m_largest;
    v_absmax[blockIdx.x] = v_largest;
  }
  if (i >= n) return;
  m[i] = uint8_t(m_largest == 0 ? 0 : code_of(first * __fdiv_rn(1.0f, m_largest), signed_map));
  v[i] = uint8_t(v_largest == 0 ? 0 : code_of(second * __fdiv_rn(1.0f, v_largest), unsigned_map));
}

void check_state(const char* what, const State8& state, int64_t n) {
  CHECK(state.codes.dtype() == DType::U8 && state.absmax.dtype() == DType::F32 &&
            state.codes.num_elements() == n && state.absmax.num_elements() == num_blocks8(n),
        "adamw_8bit: ", what, " is ", state.codes.shape(), " and ", state.absmax.shape(),
        ", wanted codes of ", n, " elements and a scale for 256");
}

}  // namespace

void CudaBackend::adamw_8bit(Tensor& parameter, State8& m, State8& v, const Tensor& gradient,
                             const Tensor& grad_scale, const AdamWStep& step) {
  const int64_t n = parameter.num_elements();
  check_state("m", m, n);
  check_state("v", v, n);
  CHECK(parameter.dtype() == DType::F32 && gradient.dtype() == DType::F32 &&
            parameter.is_contiguous() && gradient.is_contiguous(),
        "adamw_8bit: wanted dense F32 parameters and gradients on the GPU");
  if (!dynamic_maps_.defined()) {  // a captured step reads them where the first step has put them
    const SetPooled outside(allocator_of(Device::CUDA), false);
    dynamic_maps_ = Tensor::empty({2, 256}, DType::F32, Device::CUDA, Scope::Optimizer);
    upload(dynamic_maps_.raw(), dynamic_map(true), 256 * sizeof(float));
    upload(dynamic_maps_.data<float>() + 256, dynamic_map(false), 256 * sizeof(float));
  }
  launch(adamw_8bit_kernel, dim3(ceil_div(n, kThreads)), dim3(kThreads), 0, stream_,
         device_data<float>(parameter), device_data<uint8_t>(m.codes), device_data<float>(m.absmax),
         device_data<uint8_t>(v.codes), device_data<float>(v.absmax),
         device_data<const float>(gradient), n, device_data<const float>(dynamic_maps_),
         device_data<const double>(grad_scale), adamw_constants(step), float(step.beta1),
         captured_adamw(step), step.weight_decay != 0);
}

}  // namespace graft
