// ldmatrix and mma.sync: what the 32 lanes of a warp do together, with the fragments of the PTX
// ISA.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cuda/emulator/internal.h"

namespace emu {
namespace {
struct LdMatrix {
  const char* row;
  uint32_t* regs;
};

// Lane 8m+r gives the address of row r of tile m. Lane l receives, from every tile, the two
// elements (row l/4, columns 2(l%4), +1), or with .trans (rows 2(l%4), +1, column l/4).
template <int kTiles, bool kTranspose>
void ldmatrix_combine(void* const* all, uint32_t present) {
  if (present != ~0u) fail("ldmatrix without the whole warp");
  for (int tile = 0; tile < kTiles; ++tile) {
    const char* row[8];
    unsigned hits[8] = {};
    for (int r = 0; r < 8; ++r) {
      row[r] = static_cast<LdMatrix*>(all[tile * 8 + r])->row;
      if (reinterpret_cast<uintptr_t>(row[r]) % 16)
        fail("ldmatrix row address not 16-byte aligned");
      const int warp_base = running_thread() / 32 * 32;
      touch(row[r], 16, Access::kRead, warp_base + tile * 8 + r);
      ++hits[reinterpret_cast<uintptr_t>(row[r]) / 16 % 8];  // each row fills four of the 32 banks
    }
    ++stats().ldmatrix_tiles;
    stats().ldmatrix_wavefronts += *std::max_element(hits, hits + 8);
    for (int l = 0; l < 32; ++l) {
      uint16_t e[2];
      for (int k = 0; k < 2; ++k) {
        const char* from =
            kTranspose ? row[2 * (l % 4) + k] + l / 4 * 2 : row[l / 4] + (2 * (l % 4) + k) * 2;
        std::memcpy(&e[k], from, 2);
      }
      static_cast<LdMatrix*>(all[l])->regs[tile] = e[0] | static_cast<uint32_t>(e[1]) << 16;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};
inline __attribute__((always_inline, no_sanitize("address", "undefined"))) float bf16(uint32_t pair,
                                                                                      int half) {
  uint32_t u = half ? pair & 0xffff0000u : pair << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// D += A(16x16, row) * B(16x8, col). With g = lane/4 and t = lane%4, register r of A holds
// (row g + 8(r%2), columns 2t + 8(r/2), +1), of B (rows 2t + 8r, +1, column g), of D (row g +
// 8(r/2), column 2t + r%2).
__attribute__((no_sanitize("address", "undefined")))  // hot, and indices are fixed
void mma_combine(void* const* all, uint32_t present) {
  if (present != ~0u) fail("mma.sync without the whole warp");
  ++stats().mma;
  float A[16][16], B[16][8], D[16][8];
  for (int l = 0; l < 32; ++l) {
    const Mma& m = *static_cast<Mma*>(all[l]);
    const int g = l / 4, t = l % 4;
    for (int h = 0; h < 2; ++h) {
      for (int r = 0; r < 4; ++r) A[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + h] = bf16(m.a[r], h);
      for (int r = 0; r < 2; ++r) B[2 * t + 8 * r + h][g] = bf16(m.b[r], h);
    }
    for (int r = 0; r < 4; ++r) D[g + 8 * (r / 2)][2 * t + r % 2] = m.d[r];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r)
      static_cast<Mma*>(all[l])->d[r] = D[l / 4 + 8 * (r / 2)][2 * (l % 4) + r % 2];
}
}  // namespace

void ldmatrix(uint32_t* regs, int tiles, bool transpose, const void* row, Where where) {
  static constexpr Combine kCombine[2][3] = {
      {ldmatrix_combine<1, false>, ldmatrix_combine<2, false>, ldmatrix_combine<4, false>},
      {ldmatrix_combine<1, true>, ldmatrix_combine<2, true>, ldmatrix_combine<4, true>}};
  LdMatrix mine{static_cast<const char*>(row), regs};
  warp_collective(~0u, "ldmatrix", &mine, kCombine[transpose][tiles / 2], where);
}
void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, Where where) {
  Mma mine{d, a, b};
  warp_collective(~0u, "mma.sync", &mine, mma_combine, where);
}

}  // namespace emu
