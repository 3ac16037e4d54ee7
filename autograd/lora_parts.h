// What the ops of low-rank adapters share: what they ask of their arguments, and short forms of
// their products. Private to autograd/.
#pragma once

#include "autograd/op_check.h"
#include "autograd/ops.h"

namespace graft::ops {

// x (T, K), weight (N, K), bias (N) or undefined.
inline void check_linear(const char* op, const Variable& x, const Variable& weight,
                         const Variable& bias) {
  check_activation(op, "x", x, 2);
  CHECK(weight.defined() && weight.value().rank() == 2, op, ": weight must be (out, in)");
  CHECK(x.shape()[1] == weight.shape()[1], op, ": x is ", x.shape(), " but weight (out, in) is ",
        weight.shape());
  check_matrix(op, "weight", weight, weight.shape(), x);
  if (bias.defined()) check_weight(op, "bias", bias, Shape{weight.shape()[0]}, x);
}

inline void check_lora(const char* op, const Variable& x, const Variable& weight,
                       const LoraArguments& lora) {
  CHECK(lora.a.defined() && lora.b.defined() && lora.a.value().rank() == 2, op,
        ": A and B must be given, A (r, in)");
  const int64_t r = lora.a.shape()[0];
  check_weight(op, "A", lora.a, Shape{r, weight.shape()[1]}, x);
  check_weight(op, "B", lora.b, Shape{weight.shape()[0], r}, x);
  CHECK(lora.dropout_p >= 0 && lora.dropout_p < 1, op, ": dropout_p is ", lora.dropout_p,
        ", wanted 0 <= p < 1");
}

inline Tensor dropped(const Tensor& x, double p, const DropoutKey& key) {
  if (p == 0) return x;
  Tensor masked = empty_like(x, Scope::Scratch);
  backend_of(x).dropout(masked, x, p, key, false);
  return masked;
}

// c = addend + bias + one term.
inline void product(Tensor& c, const GemmTerm& term, const Tensor& addend = {},
                    const Tensor& bias = {}) {
  backend_of(c).gemm(c, {&term, 1}, addend, bias);
}

}  // namespace graft::ops
