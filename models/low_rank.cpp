// The one file that includes Eigen: QR, SVD and tridiagonal form are its business, the rest is
// ours.
#include "models/low_rank.h"

#include <algorithm>
#include <cmath>
#include <eigen3/Eigen/Dense>
#include <limits>
#include <utility>

#include "tensor/check.h"
#include "tensor/random.h"

namespace graft {
namespace {

using Matrix = Eigen::MatrixXd;
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using View = Eigen::Map<const RowMajor>;

constexpr int64_t kExactSize = 256;
constexpr int64_t kMoreVectors = 16, kRounds = 4;

View view(const Tensor& t) {
  CHECK(t.rank() == 2 && t.dtype() == DType::F32 && t.is_contiguous(),
        "low rank: wanted a dense F32 matrix, got ", dtype_name(t.dtype()), " ", t.shape());
  return View(t.data<float>(), t.size(0), t.size(1));
}

Tensor to_tensor(const Matrix& matrix) {
  Tensor t =
      Tensor::empty({matrix.rows(), matrix.cols()}, DType::F32, Device::CPU, Scope::Adapters);
  Eigen::Map<RowMajor>(t.data<float>(), matrix.rows(), matrix.cols()) = matrix.cast<float>();
  return t;
}

// Orthonormal columns that span those of `m`, and the triangle with m = q r.
struct ThinQr {
  Matrix q, r;
  explicit ThinQr(const Matrix& m) {
    const Eigen::Index k = std::min(m.rows(), m.cols());
    const Eigen::HouseholderQR<Matrix> qr(m);
    q = qr.householderQ() * Matrix::Identity(m.rows(), k);
    r = qr.matrixQR().topRows(k).triangularView<Eigen::Upper>();
  }
};

// left U sqrt(S) and sqrt(S) V^T right^T of the `rank` largest singular values of core.
struct Cut {
  Matrix b, a;
  double kept = 0;  // sum of their squares
  double all = 0;
  Cut(const Matrix& left, const Matrix& core, const Matrix& right, int64_t rank) {
    const Eigen::BDCSVD<Matrix> svd(core, Eigen::ComputeThinU | Eigen::ComputeThinV);
    const Eigen::VectorXd& s = svd.singularValues();
    const Eigen::Index n = std::min<Eigen::Index>(rank, s.size());
    const Eigen::VectorXd root = s.head(n).cwiseSqrt();
    b = left * (svd.matrixU().leftCols(n) * root.asDiagonal());
    a = (right * (svd.matrixV().leftCols(n) * root.asDiagonal())).transpose();
    kept = s.head(n).squaredNorm();
    all = s.squaredNorm();
  }
};

// |matrix - b a|^2, by rows so that nothing as large as the matrix is made.
double squared_distance(const View& matrix, const Matrix& b, const Matrix& a) {
  constexpr Eigen::Index kRows = 64;
  double sum = 0;
  for (Eigen::Index row = 0; row < matrix.rows(); row += kRows) {
    const Eigen::Index rows = std::min(kRows, matrix.rows() - row);
    sum +=
        (matrix.middleRows(row, rows).cast<double>() - b.middleRows(row, rows) * a).squaredNorm();
  }
  return sum;
}

Matrix product(const View& matrix, const Matrix& right) {
  return (matrix * right.cast<float>()).eval().cast<double>();
}
Matrix product_transposed(const View& matrix, const Matrix& right) {
  return (matrix.transpose() * right.cast<float>()).eval().cast<double>();
}

// Columns that nearly span the `vectors` largest left singular vectors of m, orthonormal, and
// m^T times them.
std::pair<Matrix, Matrix> subspace(const View& m, int64_t vectors, int64_t rounds, Random random) {
  Matrix right(m.cols(), vectors);
  for (Eigen::Index i = 0; i < right.size(); ++i) right.data()[i] = random.normal();
  Matrix left;
  for (int64_t round = 0; round <= rounds; ++round) {
    left = ThinQr(product(m, right)).q;
    right = product_transposed(m, left);
    if (round < rounds) right = ThinQr(right).q;
  }
  return {left, right};
}

// The next three take M by pieces, so that it is never there in F64 as a whole.
constexpr Eigen::Index kPiece = 256;

// M M^T, or M^T M; its lower triangle.
Matrix gram(const View& m, bool of_rows) {
  const Eigen::Index size = of_rows ? m.rows() : m.cols(), length = of_rows ? m.cols() : m.rows();
  Matrix sum = Matrix::Zero(size, size);
  for (Eigen::Index begin = 0; begin < length; begin += kPiece) {
    const Eigen::Index piece = std::min(kPiece, length - begin);
    const Matrix part = of_rows ? Matrix(m.middleCols(begin, piece).cast<double>())
                                : Matrix(m.middleRows(begin, piece).cast<double>().transpose());
    sum.selfadjointView<Eigen::Lower>().rankUpdate(part);
  }
  return sum;
}

Matrix exact_product(const View& m, const Matrix& right) {
  Matrix product(m.rows(), right.cols());
  for (Eigen::Index begin = 0; begin < m.rows(); begin += kPiece) {
    const Eigen::Index piece = std::min(kPiece, m.rows() - begin);
    product.middleRows(begin, piece) = m.middleRows(begin, piece).cast<double>() * right;
  }
  return product;
}
Matrix exact_product_transposed(const View& m, const Matrix& left) {  // left^T M
  Matrix product(left.cols(), m.cols());
  for (Eigen::Index begin = 0; begin < m.cols(); begin += kPiece) {
    const Eigen::Index piece = std::min(kPiece, m.cols() - begin);
    product.middleCols(begin, piece) = left.transpose() * m.middleCols(begin, piece).cast<double>();
  }
  return product;
}

// Solves (T - shift) x = b in place, T tridiagonal and symmetric with this diagonal and
// subdiagonal: Gaussian elimination, where rows are exchanged the upper band grows by one. A pivot
// of zero, which a shift that is an eigenvalue gives, becomes `smallest`.
void solve_shifted(Eigen::VectorXd& x, const Eigen::VectorXd& diagonal,
                   const Eigen::VectorXd& subdiagonal, double shift, double smallest) {
  const Eigen::Index n = diagonal.size();
  Eigen::VectorXd d = diagonal.array() - shift, upper = Eigen::VectorXd::Zero(n),
                  upper2 = Eigen::VectorXd::Zero(n);
  upper.head(n - 1) = subdiagonal;
  for (Eigen::Index i = 0; i + 1 < n; ++i) {
    double below = subdiagonal[i];
    if (std::abs(below) > std::abs(d[i])) {
      std::swap(d[i], below);
      std::swap(upper[i], d[i + 1]);
      upper2[i] = std::exchange(upper[i + 1], 0);
      std::swap(x[i], x[i + 1]);
    }
    if (std::abs(d[i]) < smallest) d[i] = smallest;
    const double factor = below / d[i];
    d[i + 1] -= factor * upper[i];
    upper[i + 1] -= factor * upper2[i];
    x[i + 1] -= factor * x[i];
  }
  if (std::abs(d[n - 1]) < smallest) d[n - 1] = smallest;
  for (Eigen::Index i = n - 1; i >= 0; --i) {
    if (i + 1 < n) x[i] -= upper[i] * x[i + 1];
    if (i + 2 < n) x[i] -= upper2[i] * x[i + 2];
    x[i] /= d[i];
  }
}

// Eigenvectors of the `count` largest eigenvalues of a symmetric matrix (its lower triangle), the
// largest first. All eigenvectors would take five times as long: bring it into tridiagonal form,
// and find those few there by inverse iteration from the eigenvalues.
Matrix largest_eigenvectors(const Matrix& symmetric, int64_t count) {
  const Eigen::Index n = symmetric.rows();
  const Eigen::Tridiagonalization<Matrix> form(symmetric);
  const Eigen::VectorXd diagonal = form.diagonal(), subdiagonal = form.subDiagonal();
  Eigen::SelfAdjointEigenSolver<Matrix> solver;
  solver.computeFromTridiagonal(diagonal, subdiagonal, Eigen::EigenvaluesOnly);
  const Eigen::VectorXd& values = solver.eigenvalues();  // ascending
  const double largest = values.cwiseAbs().maxCoeff();
  if (largest == 0) return Matrix::Identity(n, count);
  Matrix vectors(n, count);
  for (int64_t k = 0; k < count; ++k) {
    Random random(0x5eed, uint64_t(k));
    Eigen::VectorXd x(n);
    for (Eigen::Index i = 0; i < n; ++i) x[i] = random.normal();
    for (int round = 0; round < 4; ++round) {
      solve_shifted(x, diagonal, subdiagonal, values[n - 1 - k],
                    std::numeric_limits<double>::epsilon() * largest);
      x /= x.cwiseAbs().maxCoeff();
      // Twice, so that what cancels in the first leaves nothing of the others: near or equal
      // eigenvalues give vectors that inverse iteration does not tell apart.
      for (int twice = 0; twice < 2; ++twice)
        x -= vectors.leftCols(k) * (vectors.leftCols(k).transpose() * x);
      x.normalize();
    }
    vectors.col(k) = x;
  }
  return form.matrixQ() * vectors;
}

// Gives the columns of b and the rows of a, of which one have length 1 and the others the singular
// values, lengths that are equal: the square root of value / scale.
LowRankTerm shared(Matrix b, Matrix a, const Eigen::VectorXd& values, double scale, bool of_b) {
  for (Eigen::Index i = 0; i < values.size(); ++i) {
    const double root = std::sqrt(values[i] / scale);
    const double other = values[i] > 0 ? root / values[i] : 0;
    b.col(i) *= of_b ? other : root;
    a.row(i) *= of_b ? root : other;
  }
  return {to_tensor(a), to_tensor(b), scale};
}

// b a with the singular vectors of the smaller side from its Gram matrix, and the other side's from
// the product with them.
LowRankTerm exact_part(const View& m, int64_t rank, double scale) {
  if (m.rows() <= m.cols()) {
    const Matrix left = largest_eigenvectors(gram(m, true), rank);
    const Matrix right = exact_product_transposed(m, left);
    const Eigen::VectorXd values = right.rowwise().norm();
    return shared(left, right, values, scale, false);
  }
  const Matrix right = largest_eigenvectors(gram(m, false), rank);
  const Matrix left = exact_product(m, right);
  const Eigen::VectorXd values = left.colwise().norm();
  return shared(left, right.transpose(), values, scale, true);
}

}  // namespace

LowRankTerm concatenate(const std::vector<LowRankTerm>& terms) {
  CHECK(!terms.empty(), "low rank: no terms");
  int64_t rank = 0;
  for (const LowRankTerm& term : terms) rank += term.a.size(0);
  const int64_t in = terms[0].a.size(1), out = terms[0].b.size(0);
  RowMajor a(rank, in), b(out, rank);
  int64_t begin = 0;
  for (const LowRankTerm& term : terms) {
    const int64_t r = term.a.size(0);
    CHECK(term.a.size(1) == in && term.b.size(0) == out && term.b.size(1) == r, "low rank: A ",
          term.a.shape(), " and B ", term.b.shape(), ", wanted (r, ", in, ") and (", out, ", r)");
    a.middleRows(begin, r) = view(term.a);
    b.middleCols(begin, r) = (view(term.b).cast<double>() * term.scale).cast<float>();
    begin += r;
  }
  return {to_tensor(a.cast<double>()), to_tensor(b.cast<double>()), 1};
}

Truncated truncate(const std::vector<LowRankTerm>& terms, int64_t rank) {
  CHECK(rank >= 1, "low rank: rank ", rank, ", expected at least 1");
  std::vector<LowRankTerm> unscaled = terms;
  for (LowRankTerm& term : unscaled) term.scale = 1;
  const LowRankTerm stacked = concatenate(unscaled);
  Matrix b = view(stacked.b).cast<double>();
  int64_t begin = 0;
  for (const LowRankTerm& term : terms) {
    b.middleCols(begin, term.a.size(0)) *= term.scale;
    begin += term.a.size(0);
  }
  const ThinQr left(b);
  const ThinQr right(view(stacked.a).cast<double>().transpose());
  const Cut cut(left.q, left.r * right.r.transpose(), right.q, rank);
  Truncated result;
  result.factors = {to_tensor(cut.a), to_tensor(cut.b), 1};
  if (cut.all > 0) {
    result.energy = cut.kept / cut.all;
    result.error = std::sqrt(std::max(0.0, (cut.all - cut.kept) / cut.all));
  }
  return result;
}

Truncated truncate_dense(const Tensor& matrix, int64_t rank) {
  CHECK(rank >= 1, "low rank: rank ", rank, ", expected at least 1");
  const View m = view(matrix);
  const int64_t size = std::min(m.rows(), m.cols());
  std::optional<Cut> cut;
  if (size <= kExactSize) {
    cut.emplace(Matrix::Identity(m.rows(), m.rows()), m.cast<double>(),
                Matrix::Identity(m.cols(), m.cols()), rank);
  } else {
    // Always the same numbers: the same adapter gives the same file.
    const auto [left, right] =
        subspace(m, std::min(size, rank + kMoreVectors), kRounds, Random(0x5eed));
    const ThinQr last(right);  // left^T m = last.r^T last.q^T
    cut.emplace(left, last.r.transpose(), last.q, rank);
  }
  Truncated result;
  result.factors = {to_tensor(cut->a), to_tensor(cut->b), 1};
  const double all = m.cast<double>().squaredNorm();
  if (all > 0) {
    result.error = std::sqrt(squared_distance(m, cut->b, cut->a) / all);
    result.energy = 1 - result.error * result.error;
  }
  return result;
}

LowRankTerm principal_part(const Tensor& matrix, int64_t rank, double scale,
                           std::optional<int64_t> rounds, uint64_t seed) {
  const View m = view(matrix);
  const int64_t size = std::min(m.rows(), m.cols());
  CHECK(rank >= 1 && rank <= size, "low rank: rank ", rank, " of a matrix ", matrix.shape());
  if (!rounds) return exact_part(m, rank, scale);
  const auto [left, right] =
      subspace(m, std::min(size, rank + kMoreVectors), *rounds, Random(seed));
  const ThinQr last(right);  // left^T m = last.r^T last.q^T
  const Cut cut(left, last.r.transpose(), last.q, rank);
  return {to_tensor(cut.a / std::sqrt(scale)), to_tensor(cut.b / std::sqrt(scale)), scale};
}

LowRankTerm leading_qr(const Tensor& matrix, int64_t rank) {
  const View m = view(matrix);
  CHECK(rank >= 1 && rank <= std::min(m.rows(), m.cols()), "low rank: rank ", rank, " of a matrix ",
        matrix.shape());
  // The first columns of Q come from as many of M alone; R = Q^T M.
  const ThinQr first(m.leftCols(rank).cast<double>());
  Matrix r = exact_product_transposed(m, first.q);
  r.leftCols(rank) = first.r;  // with true zeros below
  return {to_tensor(r), to_tensor(first.q), 1};
}

Tensor remainder(const Tensor& matrix, const LowRankTerm& term) {
  const View m = view(matrix);
  const Matrix b = view(term.b).cast<double>() * term.scale, a = view(term.a).cast<double>();
  Tensor result = Tensor::empty(matrix.shape(), DType::F32, Device::CPU, Scope::Weights);
  Eigen::Map<RowMajor> out(result.data<float>(), m.rows(), m.cols());
  for (Eigen::Index row = 0; row < m.rows(); row += kPiece) {
    const Eigen::Index rows = std::min(kPiece, m.rows() - row);
    out.middleRows(row, rows) =
        (m.middleRows(row, rows).cast<double>() - b.middleRows(row, rows) * a).cast<float>();
  }
  return result;
}

}  // namespace graft
