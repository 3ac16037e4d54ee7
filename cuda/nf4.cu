#include "cuda/nf4.h"

#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"
#include "tensor/blockwise8.h"
#include "tensor/nf4.h"

namespace graft {
namespace {

constexpr int kThreads = 256;

// The 16 values travel as a parameter: a constant of the host's is none of the device's.
struct Nf4Table {
  float value[16];
};

// Rounded after the product and after the sum, as on the CPU: no fused multiply-add.
__device__ float absmax_of(const Nf4View& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  const float scaled = __fmul_rn(w.map[w.absmax_codes[block]], w.scales[block / kBlock8]);
  return __fadd_rn(scaled, w.map[256]);
}

// widen_nf4, rung 1: a thread per element.
//   dst[i] = value[code[i]] absmax[i / 64],   absmax[b] = map[code8[b]] scale[b / 256] + offset
// Shapes    dst (n) F32 or BF16; w: n codes of four bits, n / 64 of eight bits, n / 16384 scales.
// Mapping   thread i owns element i: two threads read one byte, and 64 work out the same absmax.
// Bytes     n / 2 + n / 64 read, 2n written in BF16. n = 4096 x 14336 (a projection of an 8B
//           model): 148 MB.
// Roofline  31 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  F32 products, one rounding at the store: the bytes are those of the CPU.
template <class T>
__global__ void __launch_bounds__(kThreads) widen_nf4_1_element(T* dst, Nf4View w, Nf4Table table) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= w.elements) return;
  const int byte = w.codes[i / 2], code = i % 2 ? byte & 15 : byte >> 4;
  dst[i] = round_to<T>(table.value[code] * absmax_of(w, i / kNf4Block));
}

// widen_nf4, rung 2: eight elements a thread.                              (1: thread per element)
//   dst[i] = value[code[i]] absmax[i / 64],   absmax[b] = map[code8[b]] scale[b / 256] + offset
// Shapes    as in rung 1.
// Mapping   thread t owns elements 8t to 8t + 7: one word of codes, one absmax for all, 16 bytes
//           stored at once. The table lies in shared memory, its 16 values in banks of their own.
// Bytes     n / 2 + n / 64 read, 2n written in BF16. n = 4096 x 14336: 148 MB.
// Roofline  31 us at 4.8 TB/s (H200 peak). Measured: -
// Numerics  as in rung 1.
template <class T>
__global__ void __launch_bounds__(kThreads) widen_nf4_2_words(T* dst, Nf4View w, Nf4Table table) {
  constexpr int kOwn = 8;
  SHARED_ARRAY(float, value, 16);
  if (threadIdx.x < 16) value[threadIdx.x] = table.value[threadIdx.x];
  __syncthreads();  // the table is there
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kOwn;
  if (at >= w.elements) return;
  // The codes are padded to 64 bytes, so that a whole word may be read at the end too.
  const uint32_t word = *reinterpret_cast<const uint32_t*>(w.codes + at / 2);
  const float absmax = absmax_of(w, at / kNf4Block);
  float out[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)  // the first element in the high half of the lowest byte
    out[i] = value[word >> (i % 2 ? 4 * (i - 1) : 4 * (i + 1)) & 15] * absmax;
  if (at + kOwn <= w.elements) return store_floats<kOwn>(dst + at, out);
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    if (at + i < w.elements) dst[at + i] = round_to<T>(out[i]);
}

}  // namespace

void launch_widen_nf4(int rung, Tensor& dst, const Tensor& src, cudaStream_t stream) {
  CHECK(dst.is_contiguous() && dst.num_elements() == src.num_elements(), "widen_nf4: dst is ",
        dst.shape(), ", wanted a dense one of the elements of ", src.shape());
  const Nf4View view = nf4_view(src);
  Nf4Table table;
  for (int i = 0; i < 16; ++i) table.value[i] = kNf4Values[i];
  dispatch_activation("widen_nf4", dst.dtype(), [&]<class T>(T) {
    if (rung == 1)
      launch(widen_nf4_1_element<T>, dim3(ceil_div(view.elements, kThreads)), dim3(kThreads), 0,
             stream, device_data<T>(dst), view, table);
    else
      launch(widen_nf4_2_words<T>, dim3(ceil_div(view.elements, kThreads * 8)), dim3(kThreads), 0,
             stream, device_data<T>(dst), view, table);
  });
}

// One scratch for all weights, as large as the largest that has come to this device, allocated when
// the first is widened: before a step is captured, for that has run before. Work of one stream is
// done in order, so the next weight may overwrite it. Captured steps know its address: one that is
// outgrown by another model stays.
Tensor CudaBackend::widened(const Tensor& weight, DType dtype) {
  if (!is_nf4(weight.dtype())) return weight.to(dtype, Scope::Scratch);
  const int64_t elements = weight.num_elements();
  std::vector<Tensor>& all = nf4_scratch_[dtype == DType::BF16];
  most_nf4_elements_ = std::max(most_nf4_elements_, elements);
  if (all.empty() || all.back().num_elements() < most_nf4_elements_) {
    const SetPooled outside(allocator_of(Device::CUDA), false);
    all.push_back(Tensor::empty({most_nf4_elements_}, dtype, Device::CUDA, Scope::Scratch));
  }
  Tensor wide = all.back().slice_rows(0, elements).reshape(weight.shape());
  launch_widen_nf4(kNf4Rungs, wide, weight, stream_);
  return wide;
}

}  // namespace graft
