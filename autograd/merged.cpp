// swiglu and attention on the columns of one merged product: what comes back to it is one gradient,
// written where it belongs.
#include "autograd/op_check.h"
#include "autograd/ops.h"
#include "autograd/tape.h"

namespace graft::ops {

Variable swiglu_merged(const Variable& gate_up, int64_t spare_cols) {
  check_activation("swiglu_merged", "gate_up", gate_up, 2);
  const Tensor& in = gate_up.value();
  CHECK(in.cols() % 2 == 0, "swiglu_merged: gate_up is ", in.shape(),
        ", wanted two halves of columns");
  const int64_t inner = in.cols() / 2;
  Tensor y = Tensor::with_spare_cols(in.size(0), inner, spare_cols, in.dtype(), in.device());
  backend_of(in).swiglu_forward(y, in.slice_cols(0, inner), in.slice_cols(inner, 2 * inner));
  return record("swiglu_merged", std::move(y), {gate_up},
                [in, inner](const Tensor& dy, const Needs&) {
                  // Over gate and up where nobody else sees them, as swiglu does.
                  const bool ours = in.use_count() == 1 && !in.storage()->is_borrowed();
                  Tensor d = ours ? in
                                  : Tensor::with_spare_cols(in.size(0), in.size(1), in.spare_cols(),
                                                            in.dtype(), in.device());
                  const Tensor gate = in.slice_cols(0, inner), up = in.slice_cols(inner, 2 * inner);
                  Tensor dgate = d.slice_cols(0, inner), dup = d.slice_cols(inner, 2 * inner);
                  backend_of(dy).swiglu_backward(dgate, dup, dy, gate, up);
                  return std::vector<Tensor>{d};
                });
}

namespace {

// q or k as attention wants it, (T, heads, D) dense, from the columns that it is in; and the way
// back. rstd is undefined where there is no norm.
struct Turned {
  Tensor y, rstd;
};

Turned turn(const Tensor& columns, int64_t heads, const Variable& norm, const MergedHeads& h) {
  const int64_t tokens = columns.size(0);
  Turned turned;
  turned.y = Tensor::empty({tokens, heads, h.head_dim}, columns.dtype(), columns.device());
  if (norm.defined())
    turned.rstd = Tensor::empty({tokens * heads}, wide(columns.dtype()), columns.device());
  backend_of(columns).qk_norm_rope_forward(turned.y, turned.rstd, columns,
                                           norm.defined() ? norm.value() : Tensor(), h.eps,
                                           h.positions, h.cos_sin);
  return turned;
}

void turn_back(Tensor dcolumns, const Tensor& dy, const Tensor& columns, const Tensor& rstd,
               const Variable& norm, const MergedHeads& h) {
  Tensor no_gradient;
  backend_of(dy).qk_norm_rope_backward(dcolumns, no_gradient, dy, columns,
                                       norm.defined() ? norm.value() : Tensor(), rstd, h.positions,
                                       h.cos_sin);
}

void check_heads(const Variable& qkv, const MergedHeads& h) {
  const char* op = "attention_merged";
  check_activation(op, "qkv", qkv, 2);
  CHECK(h.kv_heads > 0 && h.heads % h.kv_heads == 0, op, ": ", h.heads,
        " query heads do not divide over ", h.kv_heads, " key heads");
  CHECK(h.head_dim > 0 && h.head_dim % 2 == 0, op, ": head_dim is ", h.head_dim,
        ", wanted an even number");
  const int64_t cols = (h.heads + 2 * h.kv_heads) * h.head_dim;
  CHECK(qkv.shape()[1] == cols, op, ": qkv is ", qkv.shape(), ", wanted ", cols, " columns");
  check_indices(op, "positions", h.positions, qkv.value());
  CHECK(h.positions.size(0) == qkv.shape()[0], op, ": qkv is ", qkv.shape(), " but positions is ",
        h.positions.shape());
  CHECK(h.cos_sin.rank() == 2 && h.cos_sin.size(1) == h.head_dim, op, ": head_dim is ", h.head_dim,
        " but the table is ", h.cos_sin.shape());
  check_indices(op, "cu_seqlens", h.cu_seqlens, qkv.value());
  for (const Variable* norm : {&h.q_norm, &h.k_norm}) {
    if (!norm->defined()) continue;
    check_weight(op, "norm", *norm, Shape{h.head_dim}, qkv);
    CHECK(!needs_grad(*norm), op, ": the norms must be frozen");
  }
}

}  // namespace

Variable attention_merged(const Variable& qkv, const MergedHeads& heads) {
  check_heads(qkv, heads);
  const MergedHeads& h = heads;
  const Tensor& in = qkv.value();
  const int64_t tokens = in.size(0), cols = in.size(1);
  const int64_t q_end = h.heads * h.head_dim, k_end = q_end + h.kv_heads * h.head_dim;
  const Tensor q_in = in.slice_cols(0, q_end), k_in = in.slice_cols(q_end, k_end);
  const Turned q = turn(q_in, h.heads, h.q_norm, h), k = turn(k_in, h.kv_heads, h.k_norm, h);
  const Tensor v = in.slice_cols(k_end, cols).clone().reshape(k.y.shape());
  Tensor out = empty_like(q.y);
  Tensor lse = Tensor::empty({h.heads, tokens}, wide(in.dtype()), in.device());
  backend_of(in).attention_forward(out, lse, q.y, k.y, v, h.cu_seqlens, h.cu_seqlens, h.scale);
  // What went into a norm is kept; without norms q, k and v are all that attention needs.
  const bool normed = h.q_norm.defined() || h.k_norm.defined();
  return record("attention_merged", out.reshape({tokens, q_end}), {qkv},
                [q, k, v, out, lse, h, tokens, q_end, k_end, cols, spare = in.spare_cols(),
                 saved = normed ? in : Tensor()](const Tensor& dy, const Needs&) {
                  Tensor dq = empty_like(q.y), dk = empty_like(k.y), dv = empty_like(v);
                  backend_of(dy).attention_backward(dq, dk, dv, dy.reshape(q.y.shape()), q.y, k.y,
                                                    v, out, lse, h.cu_seqlens, h.scale);
                  Tensor d = Tensor::with_spare_cols(tokens, cols, spare, dy.dtype(), dy.device());
                  const auto columns = [&](int64_t begin, int64_t end) {
                    return saved.defined() ? saved.slice_cols(begin, end) : Tensor();
                  };
                  turn_back(d.slice_cols(0, q_end), dq, columns(0, q_end), q.rstd, h.q_norm, h);
                  turn_back(d.slice_cols(q_end, k_end), dk, columns(q_end, k_end), k.rstd, h.k_norm,
                            h);
                  Tensor values = d.slice_cols(k_end, cols);
                  backend_of(dy).copy(values, dv);
                  return std::vector<Tensor>{d};
                });
}

}  // namespace graft::ops
