// linear and lora_linear: the products where a step spends its time.
#include <array>

#include "autograd/lora_parts.h"
#include "autograd/tape.h"

namespace graft::ops {

namespace {

Tensor value_of(const Variable& x) { return x.defined() ? x.value() : Tensor(); }

// The gradient of a parameter, of the parameter's shape: alpha * a^T b.
Tensor parameter_grad(const Tensor& parameter, const Tensor& a, const Tensor& b, double alpha) {
  Tensor grad = Tensor::empty(parameter.shape(), wide(b.dtype()), b.device());
  const GemmTerm term{.a = a, .b = b, .transpose_a = true, .alpha = alpha};
  backend_of(b).gemm(grad, {&term, 1});
  return grad;
}

Tensor bias_grad(const Tensor& dy) {
  Tensor db = Tensor::empty({dy.cols()}, wide(dy.dtype()), dy.device());
  backend_of(dy).sum_rows(db, dy, false);
  return db;
}

}  // namespace

Variable linear(const Variable& x, const Variable& weight, const Variable& bias) {
  check_linear("linear", x, weight, bias);
  const Tensor& w = weight.value();
  Tensor y = Tensor::empty({x.shape()[0], w.size(0)}, x.value().dtype(), x.value().device());
  const GemmTerm term{.a = x.value(), .b = w, .transpose_b = true};
  backend_of(y).gemm(y, {&term, 1}, {}, value_of(bias));
  const Tensor saved_x = needs_grad(weight) ? x.value() : Tensor();
  return record("linear", std::move(y), {x, weight, bias},
                [saved_x, w](const Tensor& dy, const Needs& needs) {
                  Tensor dx, dw, db;
                  if (needs[0]) {
                    dx = Tensor::empty({dy.size(0), w.size(1)}, dy.dtype(), dy.device());
                    const GemmTerm term{.a = dy, .b = w};
                    backend_of(dy).gemm(dx, {&term, 1});
                  }
                  if (needs[1]) dw = parameter_grad(w, dy, saved_x, 1);
                  if (needs[2]) db = bias_grad(dy);
                  return std::vector<Tensor>{dx, dw, db};
                });
}

namespace {

// What the backward of lora_linear keeps. x and u only where a gradient is made from them.
struct LoraSaved {
  Tensor x;        // (T, K), for dA and dW
  Tensor u;        // (T, r), for dB
  Tensor w, a, b;  // parameters: no bytes of their own
  double scaling, dropout_p;
  DropoutKey key;
};

// dx = dy W + drop'(du A); without dropout one pass over dx.
Tensor lora_input_grad(const LoraSaved& s, const Tensor& dy, const Tensor& du) {
  Backend& backend = backend_of(dy);
  Tensor dx = Tensor::empty({dy.size(0), s.w.size(1)}, dy.dtype(), dy.device());
  const std::array<GemmTerm, 2> terms{GemmTerm{.a = dy, .b = s.w}, GemmTerm{.a = du, .b = s.a}};
  if (s.dropout_p == 0) {
    backend.gemm(dx, terms);
    return dx;
  }
  backend.gemm(dx, {&terms[0], 1});
  Tensor low_rank = empty_like(dx, Scope::Scratch);
  backend.gemm(low_rank, {&terms[1], 1});
  backend.dropout(dx, low_rank, s.dropout_p, s.key, true);
  return dx;
}

std::vector<Tensor> lora_backward(const LoraSaved& s, const Tensor& dy, const Needs& needs) {
  Tensor dx, dw, dbias, da, db, du;
  if (needs[0] || needs[3]) {
    du = Tensor::empty({dy.size(0), s.a.size(0)}, low_rank_dtype(dy), dy.device(), Scope::Scratch);
    const GemmTerm term{.a = dy, .b = s.b, .alpha = s.scaling};
    backend_of(dy).gemm(du, {&term, 1});
  }
  if (needs[1]) dw = parameter_grad(s.w, dy, s.x, 1);
  if (needs[2]) dbias = bias_grad(dy);
  if (needs[3]) da = parameter_grad(s.a, du, dropped(s.x, s.dropout_p, s.key), 1);
  if (needs[4]) db = parameter_grad(s.b, dy, s.u, s.scaling);
  if (needs[0]) dx = lora_input_grad(s, dy, du);
  return {dx, dw, dbias, da, db};
}

}  // namespace

Variable lora_linear(const Variable& x, const Variable& weight, const Variable& bias,
                     const LoraArguments& lora) {
  check_linear("lora_linear", x, weight, bias);
  check_lora("lora_linear", x, weight, lora);
  const Tensor& in = x.value();
  LoraSaved saved{
      {},      {}, weight.value(), lora.a.value(), lora.b.value(), lora.scaling, lora.dropout_p,
      lora.key};
  Tensor u = Tensor::empty({in.size(0), saved.a.size(0)}, low_rank_dtype(in), in.device());
  {
    const GemmTerm term{
        .a = dropped(in, lora.dropout_p, lora.key), .b = saved.a, .transpose_b = true};
    backend_of(in).gemm(u, {&term, 1});
  }
  Tensor y = Tensor::empty({in.size(0), saved.w.size(0)}, in.dtype(), in.device());
  const std::array<GemmTerm, 2> terms{
      GemmTerm{.a = in, .b = saved.w, .transpose_b = true},
      GemmTerm{.a = u, .b = saved.b, .transpose_b = true, .alpha = lora.scaling}};
  backend_of(in).gemm(y, terms, {}, value_of(bias));
  if (needs_grad(weight) || needs_grad(lora.a)) saved.x = in;
  if (needs_grad(lora.b)) saved.u = u;
  return record("lora_linear", std::move(y), {x, weight, bias, lora.a, lora.b},
                [saved = std::move(saved)](const Tensor& dy, const Needs& needs) {
                  return lora_backward(saved, dy, needs);
                });
}

}  // namespace graft::ops
