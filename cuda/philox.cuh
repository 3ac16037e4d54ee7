// The device's twin of philox in tensor/random.h (std::array is host code): the same words for the
// same counter and key, which dropout.cu asserts at compile time and a test at run time.
#pragma once

#include "cuda/gpu.cuh"

namespace graft {

struct PhiloxWords {
  uint32_t word[4];
};

__host__ __device__ constexpr PhiloxWords philox_words(PhiloxWords counter, uint32_t key0,
                                                       uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    if (round) {
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    const uint64_t p0 = uint64_t(0xD2511F53u) * counter.word[0];
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * counter.word[2];
    counter = {{uint32_t(p1 >> 32) ^ counter.word[1] ^ key0, uint32_t(p1),
                uint32_t(p0 >> 32) ^ counter.word[3] ^ key1, uint32_t(p0)}};
  }
  return counter;
}

}  // namespace graft
