// The matrix product: cutting, packing, threads. One call runs through these loops:
//
//   m0   block of at most kMaxRows rows of c; op(a)'s rows are packed once, by all threads, and
//        shared, unless they can be read as they lie
//   n0   all columns, unless K is so long that the packed rows don't fit: then kKeptCols at a time
//   k0   the words of k that the packed rows hold; mostly all of them
//     piece: kGroup columns of c (and a part of the block's tiles), the unit given to a thread
//       k    steps of kc words: the thread packs kGroup columns of op(b), then
//            multiplies every A tile with every panel, the sums staying in its L2 cache
//       after the last k: sums + bias + addend, rounded once, into c
//
// An NF4 operand b is widened by the thread that packs it, a step of a group at a time, to what a
// weight of the dtype of a would hold there.
//
// A word is one k in F32, or where the CPU multiplies BF16 faster two k of a product of BF16 by
// BF16 (kernels/gemm_kernels.h). Two terms are one product whose words run on from the first to the
// second, of whatever kind. The order of additions in an element is fixed by the terms' k and kc
// alone, so neither threads nor block sizes change a bit of c.
#include "tensor/cpu/gemm.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "tensor/cpu/gemm_product.h"

namespace graft {

using namespace gemm_parts;

namespace {

constexpr int64_t kDotRows = 4;  // up to so many rows, dot products with b's rows as they lie

GemmMatrix matrix_of(const Tensor& t) {
  if (is_nf4(t.dtype())) return {t.raw(), t.row_stride() / 2, DType::U8};  // to fetch ahead alone
  CHECK(t.dtype() == DType::F32 || t.dtype() == DType::BF16 || t.dtype() == DType::F16,
        "gemm: operand is ", dtype_name(t.dtype()), ", wanted F32, BF16 or F16");
  return {t.raw(), t.row_stride(), t.dtype()};
}

// A row that need be neither widened nor turned (nor scaled) is read where it lies. With pairs k
// must be even, for a half word's other half would be the next row's.
bool lies_in_words(const GemmMatrix& a, bool transposed, int64_t k, int64_t per_word) {
  return (per_word == 2 ? k % 2 == 0 : a.dtype == DType::F32) && !transposed && a.stride > 0;
}

// Both BF16, and no factor that would have to be rounded to it.
bool is_for_pairs(const GemmKernels& kernels, const GemmTerm& term, int64_t k) {
  const bool b = term.b.dtype() == DType::BF16 || is_nf4(term.b.dtype());
  if (!kernels.pairs->multiply || term.a.dtype() != DType::BF16 || !b || term.alpha != 1)
    return false;
  return kernels.pairs->pack_a || lies_in_words(matrix_of(term.a), term.transpose_a, k, 2);
}

Product product_of(const GemmKernels& kernels, Tensor& c, std::span<const GemmTerm> terms,
                   const Tensor& addend, const float* bias) {
  CHECK(terms.size() == 1 || terms.size() == 2, "gemm: ", terms.size(), " terms, wanted 1 or 2");
  CHECK(c.dtype() == DType::F32 || c.dtype() == DType::BF16, "gemm: c is ", dtype_name(c.dtype()),
        ", wanted F32 or BF16");
  CHECK(!addend.defined() || addend.dtype() == c.dtype(), "gemm: addend is not of c's dtype, ",
        dtype_name(c.dtype()));
  Product p{};
  p.M = c.num_rows();
  p.N = c.cols();
  for (const GemmTerm& term : terms) {
    const int64_t k = term.transpose_a ? term.a.num_rows() : term.a.cols();
    if (k == 0) continue;
    const bool pairs = is_for_pairs(kernels, term, k);
    CHECK(!is_nf4(term.a.dtype()), "gemm: a is ", dtype_name(term.a.dtype()),
          ", which b alone may be");
    Term& t = p.terms[p.num_terms++];
    t = {matrix_of(term.a),
         matrix_of(term.b),
         term.transpose_a,
         term.transpose_b,
         float(term.alpha),
         k,
         pairs ? kernels.pairs : &kernels.floats,
         pairs ? 2 : 1,
         false,
         {}};
    if (is_nf4(term.b.dtype()))
      t.nf4 = {nf4_view(term.b), term.b.cols(),
               term.a.dtype() == DType::BF16 ? DType::BF16 : DType::F32};
    p.K += t.words();
  }
  p.out = {c.raw(), c.row_stride(), c.dtype(), nullptr, 0, bias};
  if (addend.defined()) {
    p.out.addend = addend.raw();
    p.out.addend_stride = addend.row_stride();
  }
  return p;
}

// c^T = sum of op(b)^T op(a)^T.
void swap_operands(Product& p) {
  std::swap(p.M, p.N);
  for (int i = 0; i < p.num_terms; ++i) {
    Term& t = p.terms[i];
    std::swap(t.a, t.b);
    std::swap(t.transpose_a, t.transpose_b);
    t.transpose_a = !t.transpose_a;
    t.transpose_b = !t.transpose_b;
  }
  p.swapped = true;
}

void find_direct_terms(Product& p) {
  for (int i = 0; i < p.num_terms; ++i) {
    Term& t = p.terms[i];
    t.direct = t.alpha == 1 && lies_in_words(t.a, t.transpose_a, t.k, t.per_word);
  }
}

// Calls f(term, word within the term, offset within [begin, end), words) for the parts of [begin,
// end).
template <class F>
void for_terms(const Product& p, int64_t begin, int64_t end, F&& f) {
  int64_t start = 0;
  for (int i = 0; i < p.num_terms; start += p.terms[i++].words()) {
    const int64_t from = std::max(begin, start), to = std::min(end, start + p.terms[i].words());
    if (from < to) f(p.terms[i], from - start, from - begin, to - from);
  }
}

// A part of a matrix, to be fetched into the L2 cache some lines at a time: memory works while the
// multiply-adds do.
GemmAhead ahead_of(const GemmMatrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  constexpr int64_t kLine = 64;
  const int64_t size = dtype_size(m.dtype), stride = m.stride * size;
  const char* const begin = static_cast<const char*>(m.data) + row * stride + col * size;
  return {begin, stride, rows, divide_up(cols * size, kLine) + 1, 0, 0};  // a row may begin in
}  // the middle of a line

void fetch(GemmAhead& ahead, int64_t count) {
  for (; count > 0 && ahead.rows > 0; --count) {
    __builtin_prefetch(ahead.row + ahead.line * 64, 0, 2);
    if (++ahead.line < ahead.lines) continue;
    ahead.line = 0;
    ahead.row += ahead.stride;
    --ahead.rows;
  }
}

class Gemm {
 public:
  Gemm(const GemmKernels& kernels, ThreadPool& pool, const Product& product)
      : kernels_(kernels),
        pool_(pool),
        p_(product),
        serial_(double(product.M) * product.N * product.K < kSerialWork) {
    const GemmInner& inner = p_.num_terms > 0 ? *p_.terms[0].inner : kernels.floats;
    tiles_sub_ = inner.tiles_sub;
    fetches_ = !inner.pack_a;
    group_ = std::min(p_.M, kMaxRows) * p_.K > 400000 ? inner.group : kGroup;
    const int64_t steps = std::max<int64_t>(1, divide_up(p_.K, inner.max_kc));
    kc_ = std::max<int64_t>(16, round_up(divide_up(p_.K, steps), 16));
  }

  void run() {
    workspace().reserve(serial_ ? 1 : pool_.num_threads());
    packed_a_ = workspace().packed_a();
    const int64_t blocks = divide_up(p_.M, kMaxRows);
    const int64_t block_rows = round_up(divide_up(p_.M, blocks), kMr);
    for (m0_ = 0; m0_ < p_.M; m0_ += block_rows) {
      rows_ = std::min(block_rows, p_.M - m0_);
      tiles_ = divide_up(rows_, kMr);
      const int64_t k_step = kPackedA / (tiles_ * kMr) / kc_ * kc_;
      const bool keep = p_.K > k_step;
      kept_sums_ = keep ? workspace().kept_sums() : nullptr;
      const int64_t n_step = keep ? kKeptCols : p_.N;
      for (n0_ = 0; n0_ < p_.N; n0_ += n_step) {
        cols_ = std::min(n_step, p_.N - n0_);
        k0_ = 0;
        do {
          k1_ = std::min(k0_ + k_step, p_.K);
          pack_rows();
          multiply_columns();
          k0_ = k1_;
        } while (k0_ < p_.K);
      }
    }
  }

 private:
  int64_t tile_stride() const { return (k1_ - k0_) * kMr; }

  void pack_rows() {
    if (std::all_of(p_.terms.begin(), p_.terms.begin() + p_.num_terms,
                    [](const Term& t) { return t.direct; }))
      return;
    const int64_t per_piece = std::max(8192 / std::max<int64_t>(1, k1_ - k0_),
                                       divide_up(tiles_, 4 * pool_.num_threads()));
    for_pieces(pool_, serial_, divide_up(tiles_, per_piece), [&](int64_t piece, int) {
      const int64_t end = std::min(tiles_, (piece + 1) * per_piece);
      for (int64_t tile = piece * per_piece; tile < end; ++tile)
        for_terms(p_, k0_, k1_, [&](const Term& t, int64_t word, int64_t offset, int64_t words) {
          if (t.direct) return;
          t.inner->pack_a(packed_a_ + tile * tile_stride() + offset * kMr, t.a, t.transpose_a,
                          m0_ + tile * kMr, std::min(kMr, rows_ - tile * kMr), word * t.per_word,
                          t.elements(word, words), t.alpha);
        });
    });
  }

  void multiply_columns() {
    const int64_t groups = divide_up(cols_, group_), wanted = 3 * pool_.num_threads();
    const int64_t splits =
        serial_ ? 1 : std::clamp<int64_t>(divide_up(wanted, groups), 1, divide_up(tiles_, 8));
    const int64_t tiles = divide_up(tiles_, splits);
    for_pieces(pool_, serial_, groups * splits, [&](int64_t piece, int thread) {
      const int64_t first = piece % splits * tiles, last = std::min(tiles_, first + tiles);
      const int64_t next = (piece + pool_.num_threads()) / splits;  // most likely this thread's
      if (first < last) multiply_piece(piece / splits, next, first, last, thread);
    });
  }

  // Words of one kind, from `offset` within a step: of packed rows, or of `direct`'s from `word`.
  struct Run {
    const GemmInner* inner;
    int64_t offset, words;
    const Term* direct;
    int64_t word;
  };
  struct Runs {
    std::array<Run, 2> all;
    int count = 0;
  };
  Runs runs_of(int64_t begin, int64_t end) const {
    Runs runs;
    for_terms(p_, begin, end, [&](const Term& t, int64_t word, int64_t offset, int64_t words) {
      Run* const last = runs.count > 0 ? &runs.all[runs.count - 1] : nullptr;
      if (last && last->inner == t.inner && !last->direct && !t.direct)
        last->words += words;
      else
        runs.all[runs.count++] = {t.inner, offset, words, t.direct ? &t : nullptr, word};
    });
    return runs;
  }

  // The rows of a run from `tile` on, in a step that begins at k.
  GemmRows rows_at(const Run& run, int64_t tile, int64_t k) const {
    if (run.direct) {
      const GemmMatrix& a = run.direct->a;
      const int64_t size = dtype_size(a.dtype), stride = a.stride * size;
      return {static_cast<const char*>(a.data) + (m0_ + tile * kMr) * stride +
                  run.word * run.direct->per_word * size,
              kMr * stride, stride};
    }
    const float* const packed = packed_a_ + tile * tile_stride() + (k - k0_ + run.offset) * kMr;
    return {reinterpret_cast<const char*>(packed), tile_stride() * int64_t(sizeof(float)), 0};
  }

  // Columns [group * group_, + group_) of the range, A tiles [first, last).
  void multiply_piece(int64_t group, int64_t next_group, int64_t first, int64_t last, int thread) {
    const int64_t nr = kernels_.nr, col0 = group * group_;
    const int64_t cols = std::min(group_, cols_ - col0), panels = divide_up(cols, nr);
    float* const own = workspace().own(thread);
    float* const packed_b = own;
    float* const sums = kept_sums_ ? kept_sums_ + col0 * tiles_ * kMr : own + kPackedB;
    if (p_.K == 0) std::memset(sums, 0, tiles_ * kMr * group_ * sizeof(float));
    for (int64_t k = k0_; k < k1_; k += kc_) {
      const int64_t kc = std::min(kc_, k1_ - k);
      pack_columns(packed_b, workspace().widened(thread), k, kc, n0_ + col0, cols);
      // What the next step packs; and where the sums go.
      GemmAhead ahead[2] = {k + kc < k1_ ? fetched_next(k + kc, col0)
                                         : fetched_next(k0_, next_group * group_)};
      const int64_t calls = panels * divide_up(last - first, tiles_sub_);
      const int64_t lines_per_call = divide_up(ahead[0].rows * ahead[0].lines, calls);
      if (k + kc == p_.K && !p_.swapped) {
        const GemmMatrix c = {p_.out.c, p_.out.c_stride, p_.out.dtype};
        const int64_t row = first * kMr, rows = std::min(rows_, last * kMr) - row;
        ahead[1] = ahead_of(c, m0_ + row, rows, n0_ + col0, cols);
      }
      for (GemmAhead& part : ahead)
        part.per_step = divide_up(part.rows * part.lines, tile_steps(last - first, cols, kc));
      const Runs runs = runs_of(k, k + kc);
      for (int64_t tile = first; tile < last; tile += tiles_sub_) {
        const int64_t end = std::min(last, tile + tiles_sub_);
        const int64_t rows = std::min(rows_, end * kMr) - tile * kMr;
        for (int64_t j = 0; j < panels; ++j) {
          if (!fetches_) fetch(ahead[0], lines_per_call);
          for (int i = 0; i < runs.count; ++i) {
            const Run& run = runs.all[i];
            run.inner->multiply(sums + (j * tiles_ + tile) * kMr * nr, rows_at(run, tile, k),
                                packed_b + (j * kc_ + run.offset) * nr, run.words, rows,
                                std::min(nr, cols - j * nr), k + run.offset > 0, ahead);
          }
        }
      }
    }
    if (k1_ < p_.K) return;
    const int64_t row = first * kMr, rows = std::min(rows_, last * kMr) - row;
    for (int64_t j = 0; j < panels; ++j) {
      const GemmStore out = store_at(p_, m0_ + row, n0_ + col0 + j * nr);
      (p_.swapped ? kernels_.store_transposed : kernels_.store)(
          out, sums + (j * tiles_ + first) * kMr * nr, rows, std::min(nr, cols - j * nr));
    }
  }

  // About how many steps AMX's tiles take for so many tiles of rows and columns.
  int64_t tile_steps(int64_t tiles, int64_t cols, int64_t kc) const {
    return divide_up(tiles * kMr, 32) * divide_up(cols, 32) * divide_up(kc, 16);
  }

  // Of what pack_columns will read, the part in the first term.
  GemmAhead fetched_next(int64_t k, int64_t col0) const {
    GemmAhead ahead{};
    if (col0 >= cols_) return ahead;
    for_terms(p_, k, std::min(k + kc_, k1_),
              [&](const Term& t, int64_t word, int64_t offset, int64_t words) {
                if (offset > 0) return;
                int64_t from = word * t.per_word, count = t.elements(word, words);
                int64_t col = n0_ + col0, cols = std::min(group_, cols_ - col0);
                if (t.nf4) {  // two elements of a row a byte
                  int64_t& begin = t.transpose_b ? from : col;
                  int64_t& length = t.transpose_b ? count : cols;
                  begin /= 2;
                  length = divide_up(length, 2);
                }
                ahead = t.transpose_b ? ahead_of(t.b, col, cols, from, count)
                                      : ahead_of(t.b, from, count, col, cols);
              });
    return ahead;
  }

  void pack_columns(float* panels, float* widened, int64_t k, int64_t kc, int64_t col,
                    int64_t cols) {
    for_terms(p_, k, k + kc, [&](const Term& t, int64_t word, int64_t offset, int64_t words) {
      const int64_t from = word * t.per_word, count = t.elements(word, words);
      float* const to = panels + offset * kernels_.nr;
      const int64_t stride = kc_ * kernels_.nr;
      if (!t.nf4) return t.inner->pack_b(to, stride, t.b, t.transpose_b, from, count, col, cols);
      const GemmMatrix part = t.transpose_b
                                  ? t.nf4.widen(kernels_, widened, col, cols, from, count)
                                  : t.nf4.widen(kernels_, widened, from, count, col, cols);
      t.inner->pack_b(to, stride, part, t.transpose_b, 0, count, 0, cols);
    });
  }

  const GemmKernels& kernels_;
  ThreadPool& pool_;
  const Product& p_;
  const bool serial_;
  int64_t kc_, tiles_sub_, group_;
  bool fetches_;
  float* packed_a_ = nullptr;
  float* kept_sums_ = nullptr;  // where K takes several k0, else nullptr
  int64_t m0_ = 0, rows_ = 0, tiles_ = 0, n0_ = 0, cols_ = 0, k0_ = 0, k1_ = 0;
};

template <class T>
void widen_row(float* y, const void* x, int64_t offset, int64_t count, float alpha) {
  const T* from = static_cast<const T*>(x) + offset;
  for (int64_t k = 0; k < count; ++k) y[k] = to_float(from[k]) * alpha;
}

// Columns [col, col + cols) of one term, for M rows; NF4 a few rows at a time, which stay in the L1
// cache.
void dot_columns(const GemmKernels& kernels, const Term& t, float* sums, const float* x, int64_t M,
                 int64_t col, int64_t cols, bool accumulate, float* widened) {
  if (!t.nf4) return kernels.dot(sums, kernels.nr, x, M, t.b, col, cols, t.k, accumulate);
  const int64_t step = std::clamp<int64_t>(kWidened / 4 / t.k, 1, cols);
  for (int64_t j = 0; j < cols; j += step) {
    const int64_t n = std::min(step, cols - j);
    const GemmMatrix part = t.nf4.widen(kernels, widened, col + j, n, 0, t.k);
    kernels.dot(sums + j, kernels.nr, x, M, part, 0, n, t.k, accumulate);
  }
}

// Decoding: so few rows that b is read once, as it lies, and the speed is that of memory.
void dot_products(const GemmKernels& kernels, ThreadPool& pool, const Product& p) {
  float* const x = workspace().packed_a();  // (M, k) of each term
  int64_t start = 0;
  for (int i = 0; i < p.num_terms; start += p.M * p.terms[i++].k) {
    const Term& t = p.terms[i];
    const auto widen = t.a.dtype == DType::F32    ? widen_row<float>
                       : t.a.dtype == DType::BF16 ? widen_row<BFloat16>
                                                  : widen_row<Float16>;
    for (int64_t m = 0; m < p.M; ++m)
      widen(x + start + m * t.k, t.a.data, m * t.a.stride, t.k, t.alpha);
  }
  const bool serial = double(p.M) * p.N * p.K < kSerialWork;
  workspace().reserve(serial ? 1 : pool.num_threads());
  for_pieces(pool, serial, divide_up(p.N, kGroup), [&](int64_t piece, int thread) {
    std::array<float, kDotRows * kGroup> sums;
    const int64_t end = std::min(p.N, (piece + 1) * kGroup);
    for (int64_t col = piece * kGroup; col < end; col += kernels.nr) {
      const int64_t cols = std::min(kernels.nr, end - col);
      int64_t at = 0;
      for (int i = 0; i < p.num_terms; at += p.M * p.terms[i++].k)
        dot_columns(kernels, p.terms[i], sums.data(), x + at, p.M, col, cols, i > 0,
                    workspace().widened(thread));
      kernels.store(store_at(p, 0, col), sums.data(), p.M, cols);
    }
  });
}

bool is_for_dot_products(const Product& p) {
  bool yes = p.M <= kDotRows && p.K > 0;
  int64_t k = 0;
  for (int i = 0; i < p.num_terms; k += p.terms[i++].k)
    yes = yes && p.terms[i].transpose_b && !p.terms[i].transpose_a &&
          (!p.terms[i].nf4 || p.terms[i].k <= kWidened);
  return yes && p.M * k <= kPackedA;
}

}  // namespace

void cpu_gemm(const GemmKernels& kernels, ThreadPool& pool, Tensor& c,
              std::span<const GemmTerm> terms, const Tensor& addend, const Tensor& bias) {
  const Tensor wide_bias = bias.defined() ? bias.to(DType::F32, Scope::Scratch) : Tensor();
  Product p =
      product_of(kernels, c, terms, addend, bias.defined() ? wide_bias.data<float>() : nullptr);
  if (p.M == 0 || p.N == 0) return;
  if (is_for_dot_products(p)) return dot_products(kernels, pool, p);
  if (is_narrow(p, kernels)) return narrow_product(kernels, pool, p);
  const bool pairs_stay =
      !kernels.pairs->pack_a && std::any_of(p.terms.begin(), p.terms.begin() + p.num_terms,
                                            [](const Term& t) { return t.per_word == 2; });
  if (p.N <= kNarrow && p.M > p.N && !has_nf4(p) && !pairs_stay) swap_operands(p);
  find_direct_terms(p);
  Gemm(kernels, pool, p).run();
}

void cpu_gemm(Tensor& c, std::span<const GemmTerm> terms, const Tensor& addend,
              const Tensor& bias) {
  static const GemmKernels& kernels = gemm_kernels(cpu_choice().path);
  cpu_gemm(kernels, thread_pool(), c, terms, addend, bias);
}

int64_t gemm_scratch_bytes(int threads) {
  return (kPackedA + kKeptSums + threads * (kPackedB + kOwnSums + kWidened)) *
         int64_t(sizeof(float));
}

const GemmKernels& gemm_kernels(CpuPath path) {
  switch (path) {
    case CpuPath::Amx:
      return amx::gemm_kernels;
    case CpuPath::Avx512Bf16:
      return avx512_bf16::gemm_kernels;
    case CpuPath::Avx512:
      return avx512::gemm_kernels;
    case CpuPath::Avx2:
      return avx2::gemm_kernels;
    default:
      return portable::gemm_kernels;
  }
}

const GemmKernels& gemm_kernels_wide16() { return wide16::gemm_kernels; }
const GemmKernels& gemm_kernels_wide16_amx() { return wide16::gemm_kernels_amx; }

}  // namespace graft
