// The shape of a model, from config.json.
#pragma once

#include <cstdint>
#include <string>

#include "nn/rotary.h"
#include "tensor/dtype.h"

namespace graft {

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  int64_t num_hidden_layers = 0, num_attention_heads = 0, num_key_value_heads = 0, head_dim = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  bool attention_bias = false;  // bias of q, k, v
  bool attention_out_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  // RMSNorm over head_dim of q and k, before RoPE (Qwen3)
  // quantization_config: bitsandbytes NF4. Which weights are in it, the files say themselves.
  bool nf4 = false, nf4_double_quant = false;
  RopeConfig rope;
  DType dtype = DType::F32;  // torch_dtype / dtype of the file's config; weights may differ

  // Throws Error: unknown model_type, a missing or absurd key, an unsupported rope type, activation
  // or an active sliding window. `path` is a config.json or a directory that holds one.
  static ModelConfig load(const std::string& path);
};

}  // namespace graft
