// Random numbers by counter: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC11). The value at a counter depends on nothing that happened before, so masks need
// not be stored, threads may take any part in any order, and a resumed run draws what it would have
// drawn.
#pragma once

#include <array>
#include <cstdint>

namespace graft {

constexpr std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter,
                                         std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    if (round) {
      key[0] += 0x9E3779B9u;
      key[1] += 0xBB67AE85u;
    }
    const uint64_t p0 = uint64_t(0xD2511F53u) * counter[0];
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * counter[2];
    counter = {uint32_t(p1 >> 32) ^ counter[1] ^ key[0], uint32_t(p1),
               uint32_t(p0 >> 32) ^ counter[3] ^ key[1], uint32_t(p0)};
  }
  return counter;
}

// Names one dropout mask. Element (row, col) of the masked matrix is kept when word (col % 4) of
//   philox({col / 4, row low 32 bits, module, step}, {seed low, seed high ^ row high 32 bits})
// is at least p * 2^32; kept elements are scaled by 1 / (1 - p). `first_row` is the number of the
// first row of this micro-batch among the tokens of the whole optimizer step, so 8 x 1 and 2 x 4
// batches draw the same masks.
struct DropoutKey {
  uint64_t seed = 0;
  uint32_t step = 0;
  uint32_t module = 0;
  int64_t first_row = 0;
};

// A stream of numbers for initialisation, shuffling and sampling: philox at counters 0, 1, 2, ...
// The same sequence on every machine.
class Random {
 public:
  explicit Random(uint64_t seed, uint64_t stream = 0)
      : key_{uint32_t(seed), uint32_t(seed >> 32)}, stream_(stream) {}
  uint32_t next_u32();
  double uniform();            // [0, 1), 53 bits
  double normal();             // Box-Muller, mean 0, variance 1
  uint64_t below(uint64_t n);  // uniform in [0, n), without bias

 private:
  std::array<uint32_t, 2> key_;
  uint64_t stream_;
  uint64_t counter_ = 0;
  std::array<uint32_t, 4> block_{};
  int used_ = 4;
};

// How a tensor of normal numbers is drawn: element i of tensor number n of a model is element
// i % kNormalPiece of Random(seed, n << 32 | i / kNormalPiece)'s normals, so that any thread, and
// the GPU, may make any piece.
constexpr int64_t kNormalPiece = 1 << 16;

}  // namespace graft
