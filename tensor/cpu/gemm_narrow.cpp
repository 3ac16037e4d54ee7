// Matrix products with a narrow side: LoRA's (kernels/gemm_narrow.cpp). They are a fortieth of a
// training step's multiply-adds, and cost twice that when the wide operand is packed for them.
// Which thread computes a piece changes no bit: every sum runs over k in one order.
#include "tensor/cpu/gemm_product.h"

namespace graft::gemm_parts {
namespace {

constexpr int64_t kTallRows = 4 * kMr;  // of a piece

struct Call {
  const GemmKernels& kernels;
  ThreadPool& pool;
  const Product& p;
  bool serial;
  float* packed;  // columns [col, + cols) of the narrow side
  int64_t col, cols;
};

// c (M, narrow) = a b.
void multiply_tall(const Call& call) {
  const Term& t = call.p.terms[0];
  for_pieces(
      call.pool, call.serial, divide_up(call.p.M, kTallRows), [&](int64_t piece, int thread) {
        float* const sums = workspace().own(thread);
        float* const widened = sums + kTallRows * kGroup;
        const int64_t row = piece * kTallRows, rows = std::min(kTallRows, call.p.M - row);
        call.kernels.narrow->tall(sums, t.a, row, rows, call.packed, t.k, call.cols, widened);
        call.kernels.store(store_at(call.p, row, call.col), sums, rows, call.cols);
      });
}

// c (narrow, N) = a^T b; or with `turned` c (M, narrow) = a^T b by its transpose.
void multiply_flat(const Call& call, bool turned) {
  const Term& t = call.p.terms[0];
  const int64_t nr = call.kernels.nr, length = turned ? call.p.M : call.p.N;
  const int64_t panel_floats = round_up(call.cols, call.kernels.narrow->cols) * nr;
  for_pieces(call.pool, call.serial, divide_up(length, kGroup), [&](int64_t piece, int thread) {
    float* const sums = workspace().own(thread);
    const int64_t from = piece * kGroup, count = std::min(kGroup, length - from);
    call.kernels.narrow->flat(sums, panel_floats, call.packed, call.cols, turned ? t.a : t.b, t.k,
                              from, count);
    for (int64_t j = 0; j < count; j += nr) {
      const GemmStore out =
          turned ? store_at(call.p, from + j, call.col) : store_at(call.p, call.col, from + j);
      (turned ? call.kernels.store_transposed : call.kernels.store)(
          out, sums + j / nr * panel_floats, call.cols, std::min(nr, count - j));
    }
  });
}

// Which operand is the narrow one.
enum class Shape { Other, Tall, Flat, FlatTurned };
Shape shape_of(const Product& p) {
  const Term& t = p.terms[0];
  if (!t.transpose_a) return p.N <= kNarrow ? Shape::Tall : Shape::Other;
  if (t.transpose_b) return Shape::Other;
  if (p.M <= std::min(p.N, kNarrow)) return Shape::Flat;
  return p.N <= kNarrow ? Shape::FlatTurned : Shape::Other;
}

}  // namespace

bool is_narrow(const Product& p, const GemmKernels& kernels) {
  return p.num_terms == 1 && !has_nf4(p) && p.terms[0].inner == &kernels.floats &&
         shape_of(p) != Shape::Other && p.terms[0].k * kernels.narrow->cols <= kPackedA;
}

void narrow_product(const GemmKernels& kernels, ThreadPool& pool, const Product& p) {
  const Term& t = p.terms[0];
  const Shape shape = shape_of(p);
  const bool serial = double(p.M) * double(p.N) * double(p.K) < kSerialWork;
  const int64_t narrow = shape == Shape::Flat ? p.M : p.N;
  workspace().reserve(serial ? 1 : pool.num_threads());
  Call call{kernels, pool, p, serial, workspace().packed_a(), 0, 0};
  for (; call.col < narrow; call.col += call.cols) {
    call.cols = std::min(kernels.narrow->cols, narrow - call.col);
    const bool of_a = shape == Shape::Flat;
    kernels.narrow->pack(call.packed, of_a ? t.a : t.b, !of_a && t.transpose_b, t.k, call.col,
                         call.cols, t.alpha);
    if (shape == Shape::Tall)
      multiply_tall(call);
    else
      multiply_flat(call, shape == Shape::FlatTurned);
  }
}

}  // namespace graft::gemm_parts
