// Causal attention within each document, by the definition: scores, softmax, weighted sum of
// values, one query row of one head at a time. With p = softmax(scale q k^T), o = p v:
//   dv = p^T do     ds = p (do v^T - sum(do o))     dq = scale ds k     dk = scale ds^T q
#include <cmath>
#include <limits>
#include <vector>

#include "tensor/cpu/reference/element.h"
#include "tensor/cpu/reference/reference_backend.h"

namespace graft {

using reference::In;
using reference::Out;

namespace {

// Calls row(i, k_begin, k_end) for every query row i, with the key rows that it sees.
template <class F>
void for_each_query(const Tensor& cu_q, const Tensor& cu_k, F&& row) {
  const int32_t* q = cu_q.data<int32_t>();
  const int32_t* k = cu_k.data<int32_t>();
  for (int64_t d = 0; d + 1 < cu_q.num_elements(); ++d) {
    const int64_t shift = int64_t(k[d + 1] - k[d]) - (q[d + 1] - q[d]);
    for (int64_t i = q[d]; i < q[d + 1]; ++i) row(i, k[d], k[d] + (i - q[d]) + shift + 1);
  }
}

double dot(const In& a, int64_t row_a, const In& b, int64_t row_b, int64_t D) {
  double sum = 0;
  for (int64_t c = 0; c < D; ++c) sum += a(row_a, c) * b(row_b, c);
  return sum;
}

}  // namespace

void ReferenceBackend::attention_forward(Tensor& out, Tensor& lse, const Tensor& q, const Tensor& k,
                                         const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                                         double scale) {
  const int64_t heads = q.size(1), kv_heads = k.size(1), D = q.size(2);
  In in_q(q), in_k(k), in_v(v);
  Out result(out), sums(lse);
  for_each_query(cu_q, cu_k, [&](int64_t i, int64_t begin, int64_t end) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t kv = h / (heads / kv_heads);
      double most = -std::numeric_limits<double>::infinity();
      std::vector<double> p;  // scores, then their exponentials
      for (int64_t j = begin; j < end; ++j) {
        p.push_back(scale * dot(in_q, i * heads + h, in_k, j * kv_heads + kv, D));
        most = std::max(most, p.back());
      }
      double total = 0;
      for (double& score : p) total += score = std::exp(score - most);
      sums.set(h, i, p.empty() ? most : most + std::log(total));
      for (int64_t c = 0; c < D; ++c) {
        double value = 0;
        for (int64_t j = begin; j < end; ++j)
          value += p[j - begin] / total * in_v(j * kv_heads + kv, c);
        result.set(i * heads + h, c, value);
      }
    }
  });
}

void ReferenceBackend::attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& dout,
                                          const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& out, const Tensor& lse,
                                          const Tensor& cu_seqlens, double scale) {
  const int64_t heads = q.size(1), kv_heads = k.size(1), D = q.size(2);
  In in_q(q), in_k(k), in_v(v), in_out(out), in_dout(dout), in_lse(lse);
  // (Tk * kv_heads, D) each: several queries and heads add to one key; rounded once, at the end.
  std::vector<double> sum_dk(k.num_elements(), 0.0), sum_dv(v.num_elements(), 0.0);
  Out result(dq);
  for_each_query(cu_seqlens, cu_seqlens, [&](int64_t i, int64_t begin, int64_t end) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t row = i * heads + h;
      const double delta = dot(in_dout, row, in_out, row, D);
      std::vector<double> sum_dq(D, 0.0);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t key = j * kv_heads + h / (heads / kv_heads);
        const double p = std::exp(scale * dot(in_q, row, in_k, key, D) - in_lse(h, i));
        const double ds = scale * p * (dot(in_dout, row, in_v, key, D) - delta);
        for (int64_t c = 0; c < D; ++c) {
          sum_dv[key * D + c] += p * in_dout(row, c);
          sum_dk[key * D + c] += ds * in_q(row, c);
          sum_dq[c] += ds * in_k(key, c);
        }
      }
      for (int64_t c = 0; c < D; ++c) result.set(row, c, sum_dq[c]);
    }
  });
  Out result_k(dk), result_v(dv);
  for (int64_t key = 0; key < k.num_rows(); ++key)
    for (int64_t c = 0; c < D; ++c) {
      result_k.set(key, c, sum_dk[key * D + c]);
      result_v.set(key, c, sum_dv[key * D + c]);
    }
}

}  // namespace graft
