// rope, with and without the norm of Qwen3 before it, and attention.
#include "autograd/op_check.h"
#include "autograd/ops.h"
#include "autograd/tape.h"

namespace graft::ops {

namespace {

void check_rope(const char* op, const Variable& x, const Tensor& positions, const Tensor& cos_sin) {
  check_activation(op, "x", x, 3);
  check_dense(op, "x", x);
  const Tensor& in = x.value();
  check_indices(op, "positions", positions, in);
  CHECK(positions.size(0) == in.size(0), op, ": x is ", in.shape(), " but positions is ",
        positions.shape());
  CHECK(in.size(2) % 2 == 0, op, ": head_dim is ", in.size(2), ", wanted an even number");
  CHECK(cos_sin.rank() == 2 && cos_sin.size(1) == in.size(2), op, ": head_dim is ", in.size(2),
        " but the table is ", cos_sin.shape());
}

}  // namespace

Variable rope(const Variable& x, const Tensor& positions, const Tensor& cos_sin) {
  check_rope("rope", x, positions, cos_sin);
  const Tensor& in = x.value();
  Tensor y = empty_like(in);
  backend_of(in).rope(y, in, positions, cos_sin, +1);
  return record("rope", std::move(y), {x}, [positions, cos_sin](const Tensor& dy, const Needs&) {
    Tensor dx = reuse_or_empty(dy);
    backend_of(dy).rope(dx, dy, positions, cos_sin, -1);
    return std::vector<Tensor>{dx};
  });
}

Variable qk_norm_rope(const Variable& x, const Variable& weight, double eps,
                      const Tensor& positions, const Tensor& cos_sin) {
  if (!weight.defined()) return rope(x, positions, cos_sin);
  check_rope("qk_norm_rope", x, positions, cos_sin);
  check_weight("qk_norm_rope", "weight", weight, Shape{x.shape()[2]}, x);
  const Tensor& in = x.value();
  Tensor y = empty_like(in);
  Tensor rstd = Tensor::empty({in.num_rows()}, wide(in.dtype()), in.device());
  backend_of(in).qk_norm_rope_forward(y, rstd, in, weight.value(), eps, positions, cos_sin);
  return record(
      "qk_norm_rope", std::move(y), {x, weight},
      [in, rstd, w = weight.value(), positions, cos_sin](const Tensor& dy, const Needs& needs) {
        Tensor dx, dw;
        if (needs[0]) dx = reuse_or_empty(dy);
        if (needs[1]) dw = zeros_like(w, wide(in.dtype()));
        backend_of(in).qk_norm_rope_backward(dx, dw, dy, in, w, rstd, positions, cos_sin);
        return std::vector<Tensor>{dx, dw};
      });
}

namespace {

void check_attention(const Variable& q, const Variable& k, const Variable& v,
                     const Tensor& cu_seqlens) {
  check_activation("attention", "q", q, 3);
  check_activation("attention", "k", k, 3);
  check_activation("attention", "v", v, 3);
  check_same("attention", "k", k, q);
  check_same("attention", "v", v, q);
  check_dense("attention", "q", q);
  check_dense("attention", "k", k);
  check_dense("attention", "v", v);
  const Shape &in_q = q.shape(), &in_k = k.shape();
  CHECK(in_k == v.shape() && in_k[0] == in_q[0] && in_k[2] == in_q[2], "attention: q is ", in_q,
        ", k is ", in_k, ", v is ", v.shape());
  CHECK(in_k[1] > 0 && in_q[1] % in_k[1] == 0, "attention: ", in_q[1],
        " query heads do not divide over ", in_k[1], " key heads");
  check_indices("attention", "cu_seqlens", cu_seqlens, q.value());
  if (cu_seqlens.device() != Device::CPU) return;
  const int64_t n = cu_seqlens.size(0);
  const int32_t* cu = cu_seqlens.data<int32_t>();
  CHECK(n >= 1 && cu[0] == 0 && cu[n - 1] == in_q[0],
        "attention: cu_seqlens must go from 0 to the ", in_q[0], " tokens");
  for (int64_t i = 0; i + 1 < n; ++i)
    CHECK(cu[i] <= cu[i + 1], "attention: cu_seqlens goes back from ", cu[i], " to ", cu[i + 1]);
}

}  // namespace

Variable attention(const Variable& q, const Variable& k, const Variable& v,
                   const Tensor& cu_seqlens, double scale) {
  check_attention(q, k, v, cu_seqlens);
  const Tensor& in = q.value();
  Tensor out = empty_like(in);
  Tensor lse = Tensor::empty({in.size(1), in.size(0)}, wide(in.dtype()), in.device());
  backend_of(in).attention_forward(out, lse, in, k.value(), v.value(), cu_seqlens, cu_seqlens,
                                   scale);
  const Tensor saved_out = out;
  return record("attention", std::move(out), {q, k, v},
                [q = q.value(), k = k.value(), v = v.value(), out = saved_out, lse, cu_seqlens,
                 scale](const Tensor& dy, const Needs&) {
                  // One kernel makes all three; that one is wanted without the others does not
                  // happen in training.
                  Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
                  backend_of(q).attention_backward(dq, dk, dv, dy, q, k, v, out, lse, cu_seqlens,
                                                   scale);
                  return std::vector<Tensor>{dq, dk, dv};
                });
}

}  // namespace graft::ops
