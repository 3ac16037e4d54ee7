// How many floating-point operations a LoRA step owes per token, whatever kernels it takes: the
// numerator of every utilisation that bench/ prints. Recomputing counts for nothing.
#pragma once

#include "models/config.h"

namespace graft {

// Per token of documents of `length` tokens each, all adapters of the seven projections at rank r;
// `labelled` is the share of tokens that carry a label.
//   base      forward and dX: 4 per parameter of the linear layers; the first layer's q, k and v
//             need no dX. The frozen weights need no dW
//   adapters  2 forward, 4 backward per parameter
//   attention 2 products forward, 5 backward (one recomputes the scores), half of the square each
//   head      forward and dX, labelled rows only
struct StepFlops {
  double base = 0, adapters = 0, attention = 0, head = 0;
  double total() const { return base + adapters + attention + head; }
};

inline StepFlops step_flops_per_token(const ModelConfig& config, double length, double rank,
                                      double labelled) {
  const double H = double(config.hidden_size), I = double(config.intermediate_size);
  const double L = double(config.num_hidden_layers), V = double(config.vocab_size);
  const double q = double(config.num_attention_heads * config.head_dim);
  const double k = double(config.num_key_value_heads * config.head_dim);
  const double layer = H * q + 2 * H * k + q * H + 3 * H * I;  // parameters of the linear layers
  const double in_and_out = (H + q) + 2 * (H + k) + (q + H) + 2 * (H + I) + (I + H);
  StepFlops flops;
  flops.base = 4 * L * layer - 2 * H * (q + 2 * k);
  flops.adapters = 6 * L * rank * in_and_out;
  flops.attention = 7 * length * q * L;
  flops.head = 4 * H * V * labelled;
  return flops;
}

}  // namespace graft
