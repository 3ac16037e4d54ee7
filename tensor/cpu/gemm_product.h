// What the parts of the CPU's matrix product share: the call in plain terms, and the buffers that
// persist from call to call. For gemm.cpp and gemm_narrow.cpp alone.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "tensor/cpu/gemm.h"
#include "tensor/cpu/gemm_nf4.h"
#include "tensor/cpu/kernels/gemm_kernels.h"

namespace graft::gemm_parts {

constexpr int64_t kMaxRows = 768;              // of a block, a multiple of kMr
constexpr int64_t kGroup = 64;                 // columns of a narrow piece, a multiple of every nr
constexpr int64_t kMaxGroup = 256;             // no instruction set has a larger group
constexpr int64_t kMaxKc = 512;                // no instruction set has a longer kc
constexpr int64_t kPackedA = kMaxRows * 4096;  // floats of the shared packed rows, 12 MiB
constexpr int64_t kKeptCols = 2048;  // columns whose sums are kept from one k0 to the next
constexpr int64_t kKeptSums = kMaxRows * kKeptCols;
constexpr int64_t kPackedB = kMaxKc * kMaxGroup;
constexpr int64_t kOwnSums = kMaxRows * kMaxGroup;
constexpr int64_t kWidened = kMaxKc * kMaxGroup;  // words of a part of an NF4 operand
constexpr int64_t kNarrow = 48;      // up to so many columns or rows, a product is a narrow one
constexpr double kSerialWork = 5e5;  // multiply-adds below which waking threads costs more

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Buffers per thread and shared.
class Workspace {
 public:
  float* packed_a() { return get(packed_a_, kPackedA); }
  float* kept_sums() { return get(kept_sums_, kKeptSums); }
  void reserve(int threads) {
    if (int(own_.size()) < threads) own_.resize(threads);
    for (int t = 0; t < threads; ++t) get(own_[t], kPackedB + kOwnSums + kWidened);
  }
  float* own(int thread) { return own_[thread].data<float>(); }
  float* widened(int thread) { return own(thread) + kPackedB + kOwnSums; }

 private:
  static float* get(Tensor& buffer, int64_t floats) {
    if (!buffer.defined())
      buffer = Tensor::empty({floats}, DType::F32, Device::CPU, Scope::Scratch);
    return buffer.data<float>();
  }
  Tensor packed_a_, kept_sums_;
  std::vector<Tensor> own_;
};

// Never destroyed: the allocator that the buffers come from may be gone by then.
inline Workspace& workspace() {
  static Workspace& buffers = *new Workspace;
  return buffers;
}

// body(piece, thread) for every piece, by all threads unless that costs more than the work.
template <class Body>
void for_pieces(ThreadPool& pool, bool serial, int64_t pieces, Body&& body) {
  if (!serial) return pool.run(pieces, body);
  for (int64_t piece = 0; piece < pieces; ++piece) body(piece, 0);
}

struct Term {
  GemmMatrix a, b;
  bool transpose_a, transpose_b;
  float alpha;
  int64_t k;
  const GemmInner* inner;
  int64_t per_word;  // elements of k
  bool direct;       // a's rows are words of that kind as they lie, and are not packed
  Nf4Matrix nf4;     // b, where it is that; GemmMatrix b has its bytes then

  int64_t words() const { return divide_up(k, per_word); }
  int64_t elements(int64_t word, int64_t words) const {
    return std::min(k, (word + words) * per_word) - word * per_word;
  }
};

// A call in plain terms. If `swapped`, it is c's transpose: a and b, M and N have changed places.
struct Product {
  int64_t M, N, K;  // K in words
  std::array<Term, 2> terms;
  int num_terms = 0;
  bool swapped = false;
  GemmStore out;  // of all of c
};

inline bool has_nf4(const Product& p) {
  return std::any_of(p.terms.begin(), p.terms.begin() + p.num_terms,
                     [](const Term& t) { return bool(t.nf4); });
}

// The place (i, j) of c, or in a swapped product (j, i).
inline GemmStore store_at(const Product& p, int64_t i, int64_t j) {
  GemmStore out = p.out;
  const int64_t size = dtype_size(out.dtype);
  if (out.bias) out.bias += p.swapped ? i : j;
  if (p.swapped) std::swap(i, j);
  out.c = static_cast<char*>(out.c) + (i * out.c_stride + j) * size;
  if (out.addend)
    out.addend = static_cast<const char*>(out.addend) + (i * out.addend_stride + j) * size;
  return out;
}

// gemm_narrow.cpp: products of one term with a narrow side, in F32 words.
bool is_narrow(const Product& p, const GemmKernels& kernels);
void narrow_product(const GemmKernels& kernels, ThreadPool& pool, const Product& p);

}  // namespace graft::gemm_parts
