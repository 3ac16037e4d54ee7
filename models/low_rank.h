// Sums of low-rank matrices, and the best matrix of a given rank: what becomes of several adapters
// when they are to be one, and what an adapter can take out of a weight.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tensor/tensor.h"

namespace graft {

// scale * B A. a (r, in), b (out, r), F32 on the CPU.
struct LowRankTerm {
  Tensor a, b;
  double scale = 1;
};

// The sum of the terms as one, of rank sum r and scale 1: [s_1 B_1 | s_2 B_2 | ...] [A_1; A_2;
// ...].
LowRankTerm concatenate(const std::vector<LowRankTerm>& terms);

struct Truncated {
  LowRankTerm factors;  // scale 1; the singular values are shared by their square roots
  double energy = 1;    // sum of the squares of the singular values kept, over that of all
  double error = 0;     // |M - B A| / |M|, Frobenius
};

// The matrix of at most `rank` that is nearest to the sum of the terms. Exact: with B = Q R and
// A^T = P S the singular values of B A are those of the small R S^T. Computed in F64.
Truncated truncate(const std::vector<LowRankTerm>& terms, int64_t rank);

// The same for a matrix (out, in) F32 of any rank: exact up to 256 rows or columns, beyond by
// subspace iteration (Halko, Martinsson and Tropp 2011; 16 more vectors than asked for, 4 rounds),
// whose energy and error are measured on the factors it gave and so never too good.
Truncated truncate_dense(const Tensor& matrix, int64_t rank);

// The part of a matrix (out, in) F32 that its `rank` largest singular values make, at most
// min(out, in): scale B A with B^T B = A A^T = diag(values) / scale.
//   rounds  unset: exact, from the eigenvectors of the smaller of M M^T and M^T M in F64; else by
//   so
//           many rounds of subspace iteration with 16 vectors more than asked for, drawn by `seed`
LowRankTerm principal_part(const Tensor& matrix, int64_t rank, double scale,
                           std::optional<int64_t> rounds, uint64_t seed);

// Of M = Q R, Householder's: B the first `rank` columns of Q, A the first `rank` rows of R;
// scale 1. R has the signs that LAPACK gives it.
LowRankTerm leading_qr(const Tensor& matrix, int64_t rank);

// matrix - scale B A, computed in F64; F32.
Tensor remainder(const Tensor& matrix, const LowRankTerm& term);

}  // namespace graft
