// Dropout of one row, by Philox4x32-10 on kLanes counters a turn. The words are those of
// tensor/random.h, bit for bit.
#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {
namespace {

constexpr int kCounters = kLanes / 2;  // one in each 64-bit lane
constexpr int kGroups = 2;             // of counters at a time, to hide the latency of the products
constexpr int kTurn = kGroups * kCounters * 4;  // elements

typedef uint64_t VecU64 __attribute__((vector_size(4 * kLanes)));

// Products of the low halves of the 64-bit lanes.
#if defined(__AVX512F__)
inline VecU64 multiply_low(VecU64 a, VecU64 b) {
  return (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
}
#elif defined(GRAFT_ISA_avx2)
inline VecU64 multiply_low(VecU64 a, VecU64 b) {
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
#elif defined(GRAFT_ISA_wide16)
inline VecU64 multiply_low(VecU64 a, VecU64 b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#else
inline VecU64 multiply_low(VecU64 a, VecU64 b) {
  return (VecU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
}
#endif

// a[0] b[0] a[1] b[1] ..., the first and the second half of it.
inline VecU64 interleave_low(VecU64 a, VecU64 b) {
  VecU64 order;
  for (int i = 0; i < kCounters; ++i) order[i] = uint64_t(i / 2 + i % 2 * kCounters);
  return __builtin_shuffle(a, b, order);
}
inline VecU64 interleave_high(VecU64 a, VecU64 b) {
  VecU64 order;
  for (int i = 0; i < kCounters; ++i) order[i] = uint64_t((i + kCounters) / 2 + i % 2 * kCounters);
  return __builtin_shuffle(a, b, order);
}

// The words of the counters from `first` on, in the order of the elements. A word lives in the low
// half of a lane; what is left in the high half does no harm until the end.
inline void philox(VecU32 words[2 * kGroups], uint32_t first, const DropoutRow& row) {
  VecU64 c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < kCounters; ++i) c0[g][i] = uint64_t(i + g * kCounters);
    c0[g] += first;
    c1[g] = VecU64{} + row.counter[0];
    c2[g] = VecU64{} + row.counter[1];
    c3[g] = VecU64{} + row.counter[2];
  }
  uint32_t k0 = row.key[0], k1 = row.key[1];
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      const VecU64 p0 = multiply_low(c0[g], VecU64{} + 0xD2511F53u);
      const VecU64 p1 = multiply_low(c2[g], VecU64{} + 0xCD9E8D57u);
      c0[g] = (p1 >> 32) ^ c1[g] ^ uint64_t(k0);
      c1[g] = p1;
      c2[g] = (p0 >> 32) ^ c3[g] ^ uint64_t(k1);
      c3[g] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int g = 0; g < kGroups; ++g) {
    const VecU64 words01 = (c0[g] & 0xffffffffu) | (c1[g] << 32);
    const VecU64 words23 = (c2[g] & 0xffffffffu) | (c3[g] << 32);
    words[2 * g] = (VecU32)interleave_low(words01, words23);
    words[2 * g + 1] = (VecU32)interleave_high(words01, words23);
  }
}

template <class T>
void dropout_row(T* y, const T* x, int64_t cols, const DropoutRow& row, bool accumulate) {
  // keep where word > threshold - 1; a threshold of 0 keeps all, one of 2^32 (p next to 1) nothing
  const bool keep_all = row.threshold == 0;
  const uint32_t below = uint32_t(row.threshold - 1);
  const auto step = [&](int64_t i, VecU32 words, auto lanes) {
    const VecI32 keep = keep_all ? VecI32{} - 1 : (VecI32)(words > below);
    const Vec kept = select(keep, load(x + i, lanes) * row.scale, Vec{});
    store(y + i, accumulate ? load(y + i, lanes) + kept : kept, lanes);
  };
  VecU32 words[2 * kGroups];
  int64_t i = 0;
  for (; i + kTurn <= cols; i += kTurn) {
    philox(words, uint32_t(i / 4), row);
    for (int part = 0; part < 2 * kGroups; ++part) step(i + part * kLanes, words[part], Full{});
  }
  if (i == cols) return;
  philox(words, uint32_t(i / 4), row);
  for (int part = 0; i < cols; ++part, i += kLanes)
    step(i, words[part], Part{cols - i < kLanes ? int(cols - i) : kLanes});
}

void dropout(void* y, const void* x, DType dtype, int64_t cols, const DropoutRow& row,
             bool accumulate) {
  with_activation(dtype, [&]<class T>(T) {
    dropout_row(static_cast<T*>(y), static_cast<const T*>(x), cols, row, accumulate);
  });
}

}  // namespace

void install_dropout(CpuKernels& kernels) { kernels.dropout = dropout; }

}  // namespace graft::GRAFT_ISA
