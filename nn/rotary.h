// The angles of rotary position embeddings (Su et al. 2021) and the ways in which models stretch
// them to longer rows: what transformers computes in modeling_rope_utils.py.
#pragma once

#include <cstdint>
#include <vector>

#include "tensor/tensor.h"

namespace graft {

struct RopeConfig {
  double rope_theta = 10000;
  enum class Type { Default, Linear, Llama3, Yarn } type = Type::Default;
  double factor = 1;
  // llama3
  double low_freq_factor = 1, high_freq_factor = 4;
  int64_t original_max_position_embeddings = 0;  // llama3, yarn
  // yarn; negative: not given
  double attention_factor = -1, beta_fast = 32, beta_slow = 1, mscale = -1, mscale_all_dim = -1;
  bool truncate = true;
};

struct RotaryFrequencies {
  std::vector<float> inv_freq;  // (head_dim / 2), radians per token
  double attention_factor = 1;  // cos and sin are multiplied by it (yarn)
};

// head_dim even.
RotaryFrequencies rotary_frequencies(const RopeConfig& config, int64_t head_dim);

// (positions, head_dim) of dtype F32 or F64: cos(position * inv_freq) in the first half of the
// columns, sin in the second, the attention factor multiplied in. The angle is rounded to F32
// before cos and sin are taken, as transformers does; at position 30000 that is up to 0.001
// radians.
Tensor rotary_table(const RotaryFrequencies& frequencies, int64_t positions, DType dtype,
                    Device device);

}  // namespace graft
