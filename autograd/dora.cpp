// dora_linear and dora_swiglu: lora_linear (linear.cpp, to be read first) whose columns are scaled
// by magnitude / norm.
#include <array>

#include "autograd/lora_parts.h"
#include "autograd/tape.h"

namespace graft::ops {

namespace {

void check_factor(const char* op, const DoraFactor& dora, int64_t columns, const Variable& x) {
  CHECK(dora.magnitude.defined() && dora.norm.defined(), op,
        ": the magnitude and the norm must be given");
  const Shape shape{columns};
  const DType dtype = wide(x.value().dtype());
  check_weight(op, "the magnitude", dora.magnitude, shape, x);
  check_weight(op, "the norm", Variable(dora.norm), shape, x);
  CHECK(dora.magnitude.value().dtype() == dtype && dora.norm.dtype() == dtype, op,
        ": the magnitude is ", dtype_name(dora.magnitude.value().dtype()), " and the norm ",
        dtype_name(dora.norm.dtype()), ", wanted ", dtype_name(dtype));
}

void check_layer(const Variable& x, const Variable& weight, const Variable& bias,
                 const LoraArguments& lora, const DoraFactor& dora) {
  const char* op = "dora_linear";
  check_linear(op, x, weight, bias);
  CHECK(!needs_grad(weight), op, ": the weight must be frozen");
  check_lora(op, x, weight, lora);
  check_factor(op, dora, weight.shape()[0], x);
}

// What the backward keeps. Of activations only those that a gradient is made from.
struct Saved {
  Tensor x;         // (T, K), for dA
  Tensor u;         // (T, r), for dB
  Tensor out;       // (T, N), for dm: y, or h
  bool out_is_h;    // what `out` is
  Tensor w, a, b;   // parameters: no bytes of their own
  DoraScale scale;  // nor this
  double scaling, dropout_p;
  DropoutKey key;
};

Tensor gradient_of(const Tensor& parameter) {
  return Tensor::empty(parameter.shape(), wide(parameter.dtype()), parameter.device());
}

// a - b, in the place of a new tensor.
Tensor difference(const Tensor& a, const Tensor& b) {
  Tensor result = empty_like(a, Scope::Scratch);
  backend_of(a).scale(result, b, -1);
  backend_of(a).axpy(result, a, 1);
  return result;
}

// h = in W^T + scaling u B^T.
void branch(Tensor& h, const Tensor& in, const Saved& s) {
  const std::array<GemmTerm, 2> terms{
      GemmTerm{.a = in, .b = s.w, .transpose_b = true},
      GemmTerm{.a = s.u, .b = s.b, .transpose_b = true, .alpha = s.scaling}};
  backend_of(h).gemm(h, terms);
}

// y from x, and in s.out what dm needs.
Tensor forward(Saved& s, const Tensor& x, const Tensor& bias) {
  Backend& backend = backend_of(x);
  const Tensor in = dropped(x, s.dropout_p, s.key);
  s.u = Tensor::empty({x.size(0), s.a.size(0)}, low_rank_dtype(x), x.device());
  product(s.u, {.a = in, .b = s.a, .transpose_b = true});
  Tensor h = Tensor::empty({x.size(0), s.w.size(0)}, x.dtype(), x.device());
  branch(h, in, s);
  s.out = h;
  s.out_is_h = bias.defined() || s.dropout_p > 0;
  Tensor y = s.out_is_h ? empty_like(h) : h;
  if (s.dropout_p == 0) {
    backend.dora_scale(y, h, s.scale, bias, false);
    return y;
  }
  product(y, {.a = difference(x, in), .b = s.w, .transpose_b = true}, {}, bias);
  backend.dora_scale(y, h, s.scale, {}, true);
  return y;
}

// dx = dh W + du A; with dropout dx = dy W + drop'((dh - dy) W + du A).
Tensor input_grad(const Saved& s, const Tensor& dy, const Tensor& dh, const Tensor& du) {
  Backend& backend = backend_of(dy);
  Tensor dx = Tensor::empty({dy.size(0), s.w.size(1)}, dy.dtype(), dy.device());
  std::array<GemmTerm, 2> terms{GemmTerm{.a = dh, .b = s.w}, GemmTerm{.a = du, .b = s.a}};
  if (s.dropout_p == 0) {
    backend.gemm(dx, terms);
    return dx;
  }
  product(dx, {.a = dy, .b = s.w});
  Tensor masked = empty_like(dx, Scope::Scratch);
  terms[0].a = difference(dh, dy);
  backend.gemm(masked, terms);
  backend.dropout(dx, masked, s.dropout_p, s.key, true);
  return dx;
}

// Gradients of x, bias, A, B, m.
std::vector<Tensor> backward_of(const Saved& s, const Tensor& dy, const Needs& needs) {
  Tensor dx, dbias, da, db, dm, dh, du;
  const bool needs_du = needs[0] || needs[2];
  if (needs[4]) dm = gradient_of(s.scale.magnitude);
  if (needs_du || needs[3]) {
    // In the place of dy where nobody else will read that.
    const bool dy_is_free = s.dropout_p == 0 && !needs[1];
    dh = dy_is_free ? reuse_or_empty(dy) : empty_like(dy);
  }
  if (needs[1]) {
    dbias = Tensor::empty({dy.cols()}, wide(dy.dtype()), dy.device());
    backend_of(dy).sum_rows(dbias, dy, false);
  }
  if (dh.defined() || dm.defined())
    backend_of(dy).dora_scale_backward(dh, dm, dy, s.out, s.scale, !s.out_is_h);
  if (needs_du) {
    du = Tensor::empty({dy.size(0), s.a.size(0)}, low_rank_dtype(dy), dy.device(), Scope::Scratch);
    product(du, {.a = dh, .b = s.b, .alpha = s.scaling});
  }
  if (needs[2]) {
    da = gradient_of(s.a);
    product(da, {.a = du, .b = dropped(s.x, s.dropout_p, s.key), .transpose_a = true});
  }
  if (needs[3]) {
    db = gradient_of(s.b);
    product(db, {.a = dh, .b = s.u, .transpose_a = true, .alpha = s.scaling});
  }
  if (needs[0]) dx = input_grad(s, dy, dh, du);
  return {dx, dbias, da, db, dm};
}

}  // namespace

Variable dora_linear(const Variable& x, const Variable& weight, const Variable& bias,
                     const LoraArguments& lora, const DoraFactor& dora) {
  check_layer(x, weight, bias, lora, dora);
  Saved saved{};
  saved.w = weight.value();
  saved.a = lora.a.value();
  saved.b = lora.b.value();
  saved.scale = {dora.magnitude.value(), dora.norm};
  saved.scaling = lora.scaling;
  saved.dropout_p = lora.dropout_p;
  saved.key = lora.key;
  Tensor y = forward(saved, x.value(), bias.defined() ? bias.value() : Tensor());
  if (needs_grad(lora.a)) saved.x = x.value();
  if (!needs_grad(lora.b)) saved.u = Tensor();
  if (!needs_grad(dora.magnitude)) saved.out = Tensor();
  return record("dora_linear", std::move(y), {x, bias, lora.a, lora.b, dora.magnitude},
                [saved = std::move(saved)](const Tensor& dy, const Needs& needs) {
                  return backward_of(saved, dy, needs);
                });
}

namespace {

DoraScale scale_of(const DoraFactor& dora) {
  return dora.magnitude.defined() ? DoraScale{dora.magnitude.value(), dora.norm} : DoraScale{};
}

}  // namespace

Variable dora_swiglu(const Variable& gate, const Variable& up, const DoraFactor& of_gate,
                     const DoraFactor& of_up) {
  const char* op = "dora_swiglu";
  check_activation(op, "gate", gate, 2);
  check_activation(op, "up", up, 2);
  check_same(op, "up", up, gate);
  CHECK(gate.shape() == up.shape(), op, ": gate is ", gate.shape(), " but up is ", up.shape());
  for (const DoraFactor* dora : {&of_gate, &of_up})
    if (dora->magnitude.defined() || dora->norm.defined())
      check_factor(op, *dora, gate.shape()[1], gate);
  const DoraScale first = scale_of(of_gate), second = scale_of(of_up);
  Tensor y = Tensor::empty(gate.shape(), gate.value().dtype(), gate.value().device());
  backend_of(y).dora_swiglu_forward(y, gate.value(), up.value(), first, second);
  return record(
      "dora_swiglu", std::move(y), {gate, up, of_gate.magnitude, of_up.magnitude},
      [gate = gate.value(), up = up.value(), first, second](const Tensor& dy, const Needs& needs) {
        // Over the saved gate and up, as swiglu does.
        std::vector<Tensor> grads(4);
        if (needs[0]) grads[0] = reuse_or_empty(gate);
        if (needs[1]) grads[1] = reuse_or_empty(up);
        if (needs[2]) grads[2] = gradient_of(first.magnitude);
        if (needs[3]) grads[3] = gradient_of(second.magnitude);
        backend_of(dy).dora_swiglu_backward(grads[0], grads[1], grads[2], grads[3], dy, gate, up,
                                            first, second);
        return grads;
      });
}

}  // namespace graft::ops
