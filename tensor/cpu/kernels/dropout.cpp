// Dropout of one row, by Philox4x32-10 on kLanes counters at once: 4 kLanes elements a turn. The
// words are those of tensor/random.h, bit for bit.
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

typedef uint64_t VecU64 __attribute__((vector_size(4 * kLanes)));

// Products of the even lanes (their low halves as 64-bit lanes); the odd lanes are shifted down
// first.
#if defined(GRAFT_ISA_avx512)
inline VecU64 multiply_even(VecU32 a, VecU32 b) {
  return (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
}
#elif defined(GRAFT_ISA_avx2)
inline VecU64 multiply_even(VecU32 a, VecU32 b) {
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
#elif defined(GRAFT_ISA_wide16)
inline VecU64 multiply_even(VecU32 a, VecU32 b) {
  return ((VecU64)a & 0xffffffffu) * ((VecU64)b & 0xffffffffu);
}
#else
inline VecU64 multiply_even(VecU32 a, VecU32 b) {
  return (VecU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
}
#endif

inline void multiply(VecU32 a, uint32_t b, VecU32& high, VecU32& low) {
  const VecU32 factor = VecU32{} + b;
  const VecU64 even = multiply_even(a, factor);
  const VecU64 odd = multiply_even((VecU32)((VecU64)a >> 32), factor);
  high = (VecU32)((even >> 32) | (odd & 0xffffffff00000000u));
  low = (VecU32)((even & 0xffffffffu) | (odd << 32));
}

// words[j] lane i = word j of counter first + i
inline void philox(VecU32 words[4], uint32_t first, const DropoutRow& row) {
  VecU32 c0 = (VecU32)lane_index() + first, c1 = VecU32{} + row.counter[0],
         c2 = VecU32{} + row.counter[1], c3 = VecU32{} + row.counter[2];
  uint32_t k0 = row.key[0], k1 = row.key[1];
  for (int round = 0; round < 10; ++round) {
    VecU32 high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

void dropout(void* y, const void* x, DType dtype, int64_t cols, const DropoutRow& row,
             bool accumulate) {
  const bool drop_all = row.threshold >> 32;
  const uint32_t threshold = uint32_t(row.threshold);
  with_activation(dtype, [&]<class T>(T) {
    for (int64_t begin = 0; begin < cols; begin += 4 * kLanes) {
      VecU32 words[4];
      philox(words, uint32_t(begin / 4), row);
      float factor[4 * kLanes];  // 1 / (1 - p) or 0, in the order of the elements
      for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 4; ++j)
          factor[4 * i + j] = words[j][i] >= threshold && !drop_all ? row.scale : 0.0f;
      const int64_t n = cols - begin < 4 * kLanes ? cols - begin : 4 * kLanes;
      for_each_vector(n, [&](int64_t i, auto lanes) {
        T* to = static_cast<T*>(y) + begin + i;
        const Vec kept =
            load(static_cast<const T*>(x) + begin + i, lanes) * load(factor + i, lanes);
        store(to, accumulate ? load(to, lanes) + kept : kept, lanes);
      });
    }
  });
}

}  // namespace

void install_dropout(CpuKernels& kernels) { kernels.dropout = dropout; }

}  // namespace graft::GRAFT_ISA
