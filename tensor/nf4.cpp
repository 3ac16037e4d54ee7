#include "tensor/nf4.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tensor/blockwise8.h"
#include "tensor/dispatch.h"
#include "tensor/thread_pool.h"

namespace graft {

// Quantiles of the normal distribution, the two ends at -1 and 1, one of them 0.
const float kNf4Values[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

namespace {

constexpr int64_t kPart = 64;        // parts start at multiples of so many bytes
constexpr int64_t kPiece = 1 << 12;  // blocks that one thread takes at a time

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t part_bytes(int64_t bytes) { return divide_up(bytes, kPart) * kPart; }

// --- torch.sum of a line of floats, in the order of its CPU kernel ---

// Sums of kLanes columns of rows [0, size), each row kLanes wide and four rows beside each other:
// by levels, so that a sum of many is made of sums of few.
template <int kLanes>
struct FourSums {
  float sum[4][kLanes];

  FourSums(const float* x, int64_t size) {
    int64_t log = 0;
    while (int64_t(1) << log < size) ++log;
    const int64_t power = std::max<int64_t>(4, log / 4), step = int64_t(1) << power;
    float level[4][4][kLanes] = {};
    int64_t i = 0;
    while (i + step <= size) {
      for (int64_t j = 0; j < step; ++j, ++i) add(level[0], x + i * 4 * kLanes);
      for (int64_t j = 1; j < 4; ++j) {
        add(level[j], &level[j - 1][0][0]);
        std::memset(level[j - 1], 0, sizeof level[j - 1]);
        if (i & ((step - 1) << (j * power))) break;
      }
    }
    for (; i < size; ++i) add(level[0], x + i * 4 * kLanes);
    for (int j = 1; j < 4; ++j) add(level[0], &level[j][0][0]);
    std::memcpy(sum, level[0], sizeof sum);
  }
  static void add(float (&to)[4][kLanes], const float* x) {
    for (int k = 0; k < 4; ++k)
      for (int l = 0; l < kLanes; ++l) to[k][l] += x[k * kLanes + l];
  }
};

// x as `vectors` vectors of kLanes floats: their sum.
template <int kLanes>
void sum_vectors(float (&total)[kLanes], const float* x, int64_t vectors) {
  FourSums<kLanes> sums(x, vectors / 4);
  for (int64_t i = vectors / 4 * 4; i < vectors; ++i)
    for (int l = 0; l < kLanes; ++l) sums.sum[0][l] += x[i * kLanes + l];
  for (int k = 1; k < 4; ++k)
    for (int l = 0; l < kLanes; ++l) sums.sum[0][l] += sums.sum[k][l];
  std::memcpy(total, sums.sum[0], sizeof total);
}

float torch_sum(const float* x, int64_t n) {
  constexpr int kLanes = 8;
  float result = 0;
  if (n < kLanes) {
    float total[1];
    sum_vectors(total, x, n);
    return result + total[0];
  }
  float lanes[kLanes];
  sum_vectors(lanes, x, n / kLanes);
  for (int64_t i = n / kLanes * kLanes; i < n; ++i) result += x[i];
  for (float lane : lanes) result += lane;
  return result;
}

// --- one block ---

struct Bounds {
  float middle[15];  // a value above middle[i] has a code above i
  Bounds() {
    for (int i = 0; i < 15; ++i) middle[i] = (kNf4Values[i] + kNf4Values[i + 1]) / 2.0f;
  }
};

// codes (n + 1) / 2 bytes; returns absmax. n <= 64. A whole block is multiplied by 1 / absmax, the
// last, shorter one divided by it, which is how bitsandbytes has it.
float quantise_block(uint8_t* codes, const float* x, int64_t n) {
  static const Bounds bounds;
  constexpr float kLeast = 1e-38f;
  float absmax = 0;
  for (int64_t i = 0; i < n; ++i) absmax = std::max(absmax, std::fabs(x[i]));
  float scaled[kNf4Block] = {};
  if (n == kNf4Block) {
    const float inverse = 1.0f / std::max(absmax, kLeast);
    for (int64_t i = 0; i < kNf4Block; ++i) scaled[i] = x[i] * inverse;
  } else {
    absmax = std::max(absmax, kLeast);
    for (int64_t i = 0; i < n; ++i) scaled[i] = x[i] / absmax;
  }
  int32_t code[kNf4Block] = {};
  for (const float middle : bounds.middle)
    for (int64_t i = 0; i < kNf4Block; ++i) code[i] += scaled[i] > middle;
  for (int64_t i = 0; i < n; i += 2) codes[i / 2] = uint8_t(code[i] << 4 | code[i + 1]);
  return absmax;
}

// The codes of all blocks; absmax (blocks).
void quantise_blocks(const Nf4View& view, float* absmax, const Tensor& dense) {
  thread_pool().run(divide_up(view.blocks, kPiece), [&](int64_t piece, int) {
    const int64_t end = std::min(view.blocks, (piece + 1) * kPiece);
    dispatch_float(dense.dtype(), [&]<class T>(T) {
      for (int64_t b = piece * kPiece; b < end; ++b) {
        float x[kNf4Block];
        const int64_t n = std::min(kNf4Block, view.elements - b * kNf4Block);
        const T* const from = dense.data<T>() + b * kNf4Block;
        for (int64_t i = 0; i < n; ++i) x[i] = float(to_double(from[i]));
        absmax[b] = quantise_block(view.codes + b * kNf4Block / 2, x, n);
      }
    });
  });
}

}  // namespace

int64_t nf4_bytes(int64_t elements, DType dtype) {
  const int64_t blocks = divide_up(elements, kNf4Block);
  const int64_t codes = part_bytes(divide_up(elements, 2));
  if (dtype == DType::NF4Single) return codes + part_bytes(blocks * 4);
  return codes + part_bytes(blocks) + part_bytes(num_blocks8(blocks) * 4) + part_bytes(257 * 4);
}

Nf4View nf4_view(const Tensor& tensor) {
  CHECK(is_nf4(tensor.dtype()), "nf4: the tensor is ", dtype_name(tensor.dtype()), ", wanted NF4");
  Nf4View view;
  view.elements = tensor.num_elements();
  view.blocks = divide_up(view.elements, kNf4Block);
  view.groups = num_blocks8(view.blocks);
  view.codes = static_cast<uint8_t*>(tensor.raw());
  uint8_t* at = view.codes + part_bytes(divide_up(view.elements, 2));
  if (tensor.dtype() == DType::NF4Single) {
    view.absmax = reinterpret_cast<float*>(at);
    return view;
  }
  view.absmax_codes = at;
  view.scales = reinterpret_cast<float*>(at += part_bytes(view.blocks));
  view.map = reinterpret_cast<float*>(at + part_bytes(view.groups * 4));
  return view;
}

Tensor nf4_quantise(const Tensor& dense, bool double_quant, Scope scope) {
  const DType dtype = double_quant ? DType::NF4 : DType::NF4Single;
  Tensor result = Tensor::empty(dense.shape(), dtype, dense.device(), scope);
  if (dense.device() == Device::Meta || dense.num_elements() == 0) return result;
  CHECK(dense.device() == Device::CPU && dense.is_contiguous(),
        "nf4: wanted a dense tensor on the cpu, got one on ", device_name(dense.device()));
  std::memset(result.raw(), 0, size_t(result.num_bytes()));
  const Nf4View view = nf4_view(result);
  if (!double_quant) {
    quantise_blocks(view, view.absmax, dense);
    return result;
  }
  std::vector<float> absmax(size_t(view.blocks));
  quantise_blocks(view, absmax.data(), dense);
  const float offset = torch_sum(absmax.data(), view.blocks) / float(view.blocks);
  for (float& value : absmax) value -= offset;
  for (int64_t g = 0; g < view.groups; ++g) {
    const int64_t first = g * kBlock8, n = std::min(kBlock8, view.blocks - first);
    quantise_block8(view.absmax_codes + first, view.scales + g, absmax.data() + first, n, true);
  }
  std::memcpy(view.map, dynamic_map(true), 256 * sizeof(float));
  view.map[256] = offset;
  return result;
}

}  // namespace graft
