// A Llama-shaped decoder: Llama, Qwen2 and Qwen3 differ by flags of ModelConfig.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "models/config.h"
#include "models/fingerprint.h"
#include "nn/linear_group.h"

namespace graft {

// The tokens of some rows, packed one after the other; no padding.
struct PackedBatch {
  Tensor input_ids;   // (T) I32
  Tensor positions;   // (T) I32, from 0 in each document
  Tensor cu_seqlens;  // (documents + 1) I32
  Tensor labels;      // (T) I32: the label of row t is the token that should follow it;
                      // ops::kIgnoreLabel for none
  // The rows that have a label; where given, labels is not read. train/step_inputs.h.
  ops::LabelledRows labelled;
  int64_t num_tokens() const { return input_ids.num_elements(); }
};
// rows[d]: the ids of document d; labels[d][t] given as Hugging Face does (same length, -100 for
// none, not shifted; the shift is done here). labels may be empty for none at all.
PackedBatch pack(const std::vector<std::vector<int32_t>>& rows,
                 const std::vector<std::vector<int32_t>>& labels = {});

struct Attention {
  Linear q_proj, k_proj, v_proj, o_proj;
  RmsNorm q_norm, k_norm;  // Qwen3 only: weight undefined otherwise
};
struct Mlp {
  Linear gate_proj, up_proj, down_proj;
};
// The linear layers of a layer as groups, which share weights and adapters with them. o and down
// are groups in the bordered layout alone, and only with an adapter.
struct MergedLayer {
  std::optional<LinearGroup> qkv, o, gate_up, down;
};
struct DecoderLayer {
  RmsNorm input_layernorm, post_attention_layernorm;
  Attention self_attn;
  Mlp mlp;
  std::unique_ptr<MergedLayer> merged;  // null: the layers are taken one by one
};

// Keys and values of the past, for generation: per layer (capacity, kv_heads, D), dense rows.
struct KvCache {
  std::vector<Tensor> k, v;
  int64_t length = 0;
  int64_t capacity = 0;
};

// A parameter that an adapter has its own of (models/replaced_parameters.h).
struct ReplacedParameter {
  std::string name;
  Variable original, own;
  int64_t adapter = 0;  // its number in AdapterStack; 0: the one that is trained
};

class Decoder {
 public:
  // Weights have their shapes but no bytes (Device::Meta) until load_model or random_model
  // (models/weights.h) gives them values.
  explicit Decoder(const ModelConfig& config, DType compute_dtype, Device device = Device::CPU);

  const ModelConfig& config() const { return config_; }
  // Whether embeddings and head are one; an adapter may have its own of either.
  bool is_tied() const { return lm_head.weight.state() == embed_tokens.weight.state(); }
  DType compute_dtype() const { return compute_dtype_; }
  Device device() const { return device_; }

  // Hidden states after the final norm, (T, H). With checkpointing each layer is recomputed in the
  // backward. Ids, positions and labelled rows lie on the CPU, or where the model is; cu_seqlens on
  // the CPU.
  Variable forward(const PackedBatch& batch, const ForwardContext& context,
                   bool gradient_checkpointing = false);
  // scale * sum of the cross-entropy over labelled rows (see ops::linear_cross_entropy).
  Variable loss(const PackedBatch& batch, const ForwardContext& context, double scale,
                bool gradient_checkpointing = false, Tensor* token_losses = nullptr);
  Tensor logits(const Tensor& hidden_states);  // (T, H) -> (T, V) F32; for few rows

  // Lays the products of every layer out anew for forward and loss, once, after adapters are
  // attached; the base must be frozen. Returns what was done: Bordered becomes Merged where an
  // adapter has dropout, for the mask applies to the low-rank product alone. All becomes Plain with
  // DoRA, whose layers are scaled one by one, where frozen adapters are stacked, and where biases
  // or norms are trained.
  LoraLayout set_lora_layout(LoraLayout layout);
  // After adapters have changed: DoRA's norms and the borders of bordered weights follow them.
  // Nothing where there is neither.
  void refresh_adapters();

  // Runs new tokens (one document) behind what is in the cache, appends to it; hidden states (T,
  // H).
  Tensor forward_cached(const std::vector<int32_t>& ids, KvCache& cache);
  KvCache make_cache(int64_t capacity) const;

  // Names as in the checkpoint: model.embed_tokens.weight, model.layers.N. ..., model.norm.weight,
  // lm_head.weight (the latter only where not tied; lm_head as a Linear is always visited, last, by
  // its module name "lm_head").
  void visit(const std::string& prefix, Visitor& visitor);

  // Makes the table of rotations for rows of so many tokens, which otherwise grows when a longer
  // row comes.
  void reserve_positions(int64_t positions);

  Embedding embed_tokens;
  std::vector<DecoderLayer> layers;
  RmsNorm norm;
  BaseFingerprint fingerprint;  // of the files that load_model read
  Linear lm_head;               // tied: its weight is the same Variable as embed_tokens.weight
  std::vector<ReplacedParameter> replaced;  // what adapters that are on have put their own for

 private:
  // q, k, v of a layer, ready for attention: (T, heads, D), rotated.
  struct Heads {
    Variable q, k, v;
  };
  Heads heads(const DecoderLayer& layer, const Variable& x, const Tensor& positions,
              const ForwardContext& context) const;
  // The rest of a layer: attended (T, heads, D) back into the residual stream x, then the MLP.
  Variable finish_layer(const DecoderLayer& layer, const Variable& x, const Variable& attended,
                        const ForwardContext& context) const;
  Variable layer_forward(const DecoderLayer& layer, const Variable& x, const PackedBatch& batch,
                         const ForwardContext& context) const;
  Variable merged_layer_forward(const DecoderLayer& layer, const Variable& x,
                                const PackedBatch& batch, const ForwardContext& context) const;
  Variable embed(const Tensor& input_ids) const;
  std::vector<ops::LoraArguments> head_pairs(const ForwardContext& context) const;
  void check_ids(const int32_t* ids, int64_t count) const;
  double attention_scale() const;
  ModelConfig config_;
  DType compute_dtype_;
  Device device_;
  RotaryFrequencies frequencies_;
  Tensor cos_sin_;  // (positions, D), grown when a longer row comes
};

// Parameters of the base, tied weights once.
int64_t num_parameters(const ModelConfig& config);

}  // namespace graft
