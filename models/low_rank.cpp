// The one file that includes Eigen: QR and SVD are its business, the rest is ours.
#include "models/low_rank.h"

#include <algorithm>
#include <cmath>
#include <eigen3/Eigen/Dense>
#include <optional>

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
    const int64_t vectors = std::min(size, rank + kMoreVectors);
    Random random(0x5eed);  // always the same: the same adapter gives the same file
    Matrix right(m.cols(), vectors);
    for (Eigen::Index i = 0; i < right.size(); ++i) right.data()[i] = random.normal();
    Matrix left;
    for (int64_t round = 0; round <= kRounds; ++round) {
      left = ThinQr(product(m, right)).q;
      right = product_transposed(m, left);
      if (round < kRounds) right = ThinQr(right).q;
    }
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

}  // namespace graft
