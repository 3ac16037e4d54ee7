// Normal random numbers made on the device: the weights of a model of 16 GB for a benchmark,
// without a copy on the host. The same numbers as random_model draws on the CPU (tensor/random.h,
// kNormalPiece), so that a step on either device can be compared.
#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"
#include "cuda/philox.cuh"
#include "tensor/random.h"

namespace graft {
namespace {

constexpr double kPi = 3.14159265358979323846;

// fill_normal.
//   y[i] = deviation sqrt(-2 ln(1 - u0)) cos(2 pi u1),  u0, u1 from philox(i mod piece, stream,
//   key)
// Shapes    y (count) F32 or BF16, dense.
// Mapping   a thread owns one element and one call of philox: the 4 words are its two uniforms.
// Bytes     count elements written. 8.0e9 in BF16 (Llama-3.1-8B): 16 GB.
// Roofline  3.3 ms at 4.8 TB/s (H200 peak); the F64 logarithm and cosine take longer, about 100
//           operations an element. Measured: -
// Numerics  F64 as on the host, rounded to F32 and then to y. The host's and the device's logarithm
//           and cosine may differ in the last bit of F64.
template <class T>
__global__ void __launch_bounds__(256)
    fill_normal_kernel(T* y, int64_t count, uint64_t seed, uint32_t number, double deviation) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const PhiloxWords words =
      philox_words({{uint32_t(i % kNormalPiece), 0, uint32_t(i / kNormalPiece), number}},
                   uint32_t(seed), uint32_t(seed >> 32));
  double uniform[2];
  for (int k = 0; k < 2; ++k) {  // 27 and 26 bits, as Random::uniform takes them
    const uint64_t high = words.word[2 * k] >> 5, low = words.word[2 * k + 1] >> 6;
    uniform[k] = double(high << 26 | low) * 0x1p-53;
  }
  const double radius = sqrt(-2.0 * log(1.0 - uniform[0]));
  y[i] = round_to<T>(float(radius * cos(2.0 * kPi * uniform[1]) * deviation));
}

}  // namespace

void cuda_fill_normal(Tensor& y, uint64_t seed, uint32_t number, double deviation) {
  CHECK(y.device() == Device::CUDA && y.is_contiguous(),
        "cuda_fill_normal: wanted a dense tensor on the GPU");
  const cudaStream_t stream = static_cast<CudaBackend&>(cuda_backend()).stream();
  dispatch_activation("cuda_fill_normal", y.dtype(), [&]<class T>(T) {
    launch(fill_normal_kernel<T>, dim3(ceil_div(y.num_elements(), 256)), dim3(256), 0, stream,
           device_data<T>(y), y.num_elements(), seed, number, deviation);
  });
}

}  // namespace graft
