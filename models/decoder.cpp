#include "models/decoder.h"

#include <algorithm>
#include <cmath>

#include "autograd/checkpoint.h"
#include "tensor/backend.h"

namespace graft {
namespace {

// A weight that has a shape and no bytes yet.
Variable placeholder(Shape shape, DType dtype) {
  return Variable(Tensor::empty(shape, dtype, Device::Meta, Scope::Weights));
}

}  // namespace

PackedBatch pack(const std::vector<std::vector<int32_t>>& rows,
                 const std::vector<std::vector<int32_t>>& labels) {
  CHECK(labels.empty() || labels.size() == rows.size(), "pack: ", labels.size(),
        " rows of labels for ", rows.size(), " rows of ids");
  std::vector<int32_t> ids, positions, cu_seqlens{0}, targets;
  for (size_t d = 0; d < rows.size(); ++d) {
    const size_t length = rows[d].size();
    CHECK(labels.empty() || labels[d].size() == length, "pack: row ", d, " has ", length,
          " ids but ", labels.empty() ? 0 : labels[d].size(), " labels");
    for (size_t t = 0; t < length; ++t) {
      ids.push_back(rows[d][t]);
      positions.push_back(int32_t(t));
      const bool labelled = !labels.empty() && t + 1 < length;
      targets.push_back(labelled ? labels[d][t + 1] : ops::kIgnoreLabel);
    }
    cu_seqlens.push_back(int32_t(ids.size()));
  }
  const int64_t tokens = int64_t(ids.size());
  return {Tensor::from_ints({tokens}, ids),
          Tensor::from_ints({tokens}, positions),
          Tensor::from_ints({int64_t(cu_seqlens.size())}, cu_seqlens),
          Tensor::from_ints({tokens}, targets),
          {}};
}

Decoder::Decoder(const ModelConfig& config, DType compute_dtype, Device device)
    : config_(config),
      compute_dtype_(compute_dtype),
      device_(device),
      frequencies_(rotary_frequencies(config.rope, config.head_dim)) {
  const int64_t hidden = config.hidden_size, inner = config.intermediate_size;
  const int64_t queries = config.num_attention_heads * config.head_dim;
  const int64_t keys = config.num_key_value_heads * config.head_dim;
  const auto linear = [&](int64_t out, int64_t in, bool bias) {
    Linear layer;
    layer.weight = placeholder({out, in}, compute_dtype);
    if (bias) layer.bias = placeholder({out}, compute_dtype);
    return layer;
  };
  const auto rms_norm = [&](int64_t size) {
    return RmsNorm{placeholder({size}, compute_dtype), config.rms_norm_eps};
  };
  embed_tokens.weight = placeholder({config.vocab_size, hidden}, compute_dtype);
  layers.resize(size_t(config.num_hidden_layers));
  for (DecoderLayer& layer : layers) {
    layer.input_layernorm = rms_norm(hidden);
    layer.self_attn.q_proj = linear(queries, hidden, config.attention_bias);
    layer.self_attn.k_proj = linear(keys, hidden, config.attention_bias);
    layer.self_attn.v_proj = linear(keys, hidden, config.attention_bias);
    layer.self_attn.o_proj = linear(hidden, queries, config.attention_out_bias);
    if (config.qk_norm) {
      layer.self_attn.q_norm = rms_norm(config.head_dim);
      layer.self_attn.k_norm = rms_norm(config.head_dim);
    }
    layer.post_attention_layernorm = rms_norm(hidden);
    layer.mlp.gate_proj = linear(inner, hidden, config.mlp_bias);
    layer.mlp.up_proj = linear(inner, hidden, config.mlp_bias);
    layer.mlp.down_proj = linear(hidden, inner, config.mlp_bias);
  }
  norm = rms_norm(hidden);
  if (config.tie_word_embeddings)
    lm_head.weight = embed_tokens.weight;
  else
    lm_head = linear(config.vocab_size, hidden, false);
}

void Decoder::visit(const std::string& prefix, Visitor& visitor) {
  embed_tokens.visit(prefix + "model.embed_tokens", visitor);
  for (size_t i = 0; i < layers.size(); ++i) {
    DecoderLayer& layer = layers[i];
    const std::string name = prefix + "model.layers." + std::to_string(i);
    layer.input_layernorm.visit(name + ".input_layernorm", visitor);
    layer.self_attn.q_proj.visit(name + ".self_attn.q_proj", visitor);
    layer.self_attn.k_proj.visit(name + ".self_attn.k_proj", visitor);
    layer.self_attn.v_proj.visit(name + ".self_attn.v_proj", visitor);
    layer.self_attn.o_proj.visit(name + ".self_attn.o_proj", visitor);
    layer.self_attn.q_norm.visit(name + ".self_attn.q_norm", visitor);
    layer.self_attn.k_norm.visit(name + ".self_attn.k_norm", visitor);
    layer.post_attention_layernorm.visit(name + ".post_attention_layernorm", visitor);
    layer.mlp.gate_proj.visit(name + ".mlp.gate_proj", visitor);
    layer.mlp.up_proj.visit(name + ".mlp.up_proj", visitor);
    layer.mlp.down_proj.visit(name + ".mlp.down_proj", visitor);
  }
  norm.visit(prefix + "model.norm", visitor);
  if (is_tied())
    visitor.linear(prefix + "lm_head", lm_head);
  else
    lm_head.visit(prefix + "lm_head", visitor);
}

double Decoder::attention_scale() const { return 1 / std::sqrt(double(config_.head_dim)); }

void Decoder::check_ids(const int32_t* ids, int64_t count) const {
  for (int64_t t = 0; t < count; ++t)
    CHECK(ids[t] >= 0 && ids[t] < config_.vocab_size, "decoder: token id ", ids[t],
          " is outside the model's vocabulary of ", config_.vocab_size,
          "; does the tokenizer belong to this model?");
}

Variable Decoder::embed(const Tensor& input_ids) const {
  if (input_ids.device() == Device::CPU)
    check_ids(input_ids.data<int32_t>(), input_ids.num_elements());
  return embed_tokens.forward(input_ids, compute_dtype_);
}

void Decoder::reserve_positions(int64_t positions) {
  const int64_t have = cos_sin_.defined() ? cos_sin_.size(0) : 0;
  if (positions <= have) return;
  // Twice what there was, so that decoding token by token rebuilds it a few times only.
  cos_sin_ = rotary_table(frequencies_, std::max(positions, 2 * have),
                          compute_dtype_ == DType::F64 ? DType::F64 : DType::F32, device_);
}

Decoder::Heads Decoder::heads(const DecoderLayer& layer, const Variable& x, const Tensor& positions,
                              const ForwardContext& context) const {
  const int64_t tokens = x.shape()[0], size = config_.head_dim;
  const Attention& attention = layer.self_attn;
  const Variable normed = layer.input_layernorm.forward(x);
  const auto split = [&](const Linear& projection, int64_t count) {
    return ops::reshape(projection.forward(normed, context), {tokens, count, size});
  };
  Heads result;
  result.q = split(attention.q_proj, config_.num_attention_heads);
  result.k = split(attention.k_proj, config_.num_key_value_heads);
  result.v = split(attention.v_proj, config_.num_key_value_heads);
  const auto turn = [&](const Variable& x, const RmsNorm& norm) {
    return ops::qk_norm_rope(x, norm.weight, norm.eps, positions, cos_sin_);
  };
  result.q = turn(result.q, attention.q_norm);
  result.k = turn(result.k, attention.k_norm);
  return result;
}

Variable Decoder::finish_layer(const DecoderLayer& layer, const Variable& x,
                               const Variable& attended, const ForwardContext& context) const {
  const int64_t tokens = x.shape()[0];
  const Variable flat =
      ops::reshape(attended, {tokens, config_.num_attention_heads * config_.head_dim});
  const Variable middle = ops::add(x, layer.self_attn.o_proj.forward(flat, context));
  // A scope of its own: what only the MLP needs is given back before its output is added.
  const Variable mlp = [&] {
    const Variable normed = layer.post_attention_layernorm.forward(middle);
    return layer.mlp.down_proj.forward(
        swiglu_of(layer.mlp.gate_proj, layer.mlp.up_proj, normed, context), context);
  }();
  return ops::add(middle, mlp);
}

Variable Decoder::layer_forward(const DecoderLayer& layer, const Variable& x,
                                const PackedBatch& batch, const ForwardContext& context) const {
  if (layer.merged) return merged_layer_forward(layer, x, batch, context);
  const Variable attended = [&] {
    const Heads in = heads(layer, x, batch.positions, context);
    return ops::attention(in.q, in.k, in.v, batch.cu_seqlens, attention_scale());
  }();
  return finish_layer(layer, x, attended, context);
}

Variable Decoder::forward(const PackedBatch& batch, const ForwardContext& context,
                          bool gradient_checkpointing) {
  CHECK(batch.num_tokens() > 0, "decoder: the batch has no tokens");
  const int32_t* cu = batch.cu_seqlens.data<int32_t>();
  for (int64_t d = 0; d + 1 < batch.cu_seqlens.size(0); ++d) reserve_positions(cu[d + 1] - cu[d]);
  Variable x = embed(batch.input_ids);
  PackedBatch here = batch;  // once for all layers
  if (device_ == Device::CUDA) here.positions = batch.positions.to(device_);
  for (const DecoderLayer& layer : layers) {
    // By value: the closure of a checkpoint outlives this call.
    auto block = [this, &layer, here, context](const Variable& input) {
      return layer_forward(layer, input, here, context);
    };
    x = gradient_checkpointing ? checkpoint(std::move(block), x) : block(x);
  }
  return norm.forward(x);
}

// With tied weights the rows that are trained are the head's too.
std::vector<ops::LoraArguments> Decoder::head_pairs(const ForwardContext& context) const {
  std::vector<ops::LoraArguments> pairs = lm_head.added_pairs(context);
  if (is_tied() && embed_tokens.tokens) pairs.push_back(embed_tokens.tokens->pair());
  return pairs;
}

Variable Decoder::loss(const PackedBatch& batch, const ForwardContext& context, double scale,
                       bool gradient_checkpointing, Tensor* token_losses) {
  const Variable hidden_states = forward(batch, context, gradient_checkpointing);
  const auto adapters = head_pairs(context);
  if (batch.labelled.rows.defined())
    return ops::linear_cross_entropy(hidden_states, lm_head.weight, batch.labelled, scale,
                                     token_losses, 0, adapters);
  return ops::linear_cross_entropy(hidden_states, lm_head.weight, batch.labels, scale, token_losses,
                                   0, adapters);
}

Tensor Decoder::logits(const Tensor& hidden_states) {
  const DType dtype = compute_dtype_ == DType::F64 ? DType::F64 : DType::F32;
  Tensor result =
      Tensor::empty({hidden_states.num_rows(), config_.vocab_size}, dtype, hidden_states.device());
  const GemmTerm term{hidden_states, lm_head.weight.value(), false, true, 1};
  Backend& backend = backend_of(hidden_states);
  backend.gemm(result, {&term, 1});
  for (const ops::LoraArguments& pair : head_pairs({})) {
    const DType narrow = device_ == Device::CUDA ? compute_dtype_ : dtype;
    Tensor u = Tensor::empty({hidden_states.num_rows(), pair.a.shape()[0]}, narrow, device_,
                             Scope::Scratch);
    const GemmTerm down{hidden_states, pair.a.value(), false, true, 1};
    backend.gemm(u, {&down, 1});
    const GemmTerm up{u, pair.b.value(), false, true, pair.scaling};
    backend.gemm(result, {&up, 1}, result);
  }
  return result;
}

KvCache Decoder::make_cache(int64_t capacity) const {
  KvCache cache;
  cache.capacity = capacity;
  const Shape shape{capacity, config_.num_key_value_heads, config_.head_dim};
  for (size_t i = 0; i < layers.size(); ++i) {
    cache.k.push_back(Tensor::empty(shape, compute_dtype_, device_));
    cache.v.push_back(Tensor::empty(shape, compute_dtype_, device_));
  }
  return cache;
}

Tensor Decoder::forward_cached(const std::vector<int32_t>& ids, KvCache& cache) {
  const int64_t tokens = int64_t(ids.size()), before = cache.length, after = before + tokens;
  CHECK(tokens > 0, "decoder: no tokens to run");
  CHECK(after <= cache.capacity, "decoder: ", after, " tokens in a cache for ", cache.capacity);
  NoRecord off;
  reserve_positions(after);
  // Ids and positions go to the device at once, and from here to the logits nothing waits for it:
  // cu_q and cu_k stay on the CPU, where attention reads them.
  check_ids(ids.data(), tokens);
  std::vector<int32_t> numbers = ids;
  for (int64_t t = 0; t < tokens; ++t) numbers.push_back(int32_t(before + t));
  Tensor step = Tensor::from_ints({2 * tokens}, numbers);
  if (device_ == Device::CUDA) step = step.to(device_);
  const Tensor positions = step.slice_rows(tokens, 2 * tokens);
  const Tensor cu_q = Tensor::from_ints({2}, {0, int32_t(tokens)});
  const Tensor cu_k = Tensor::from_ints({2}, {0, int32_t(after)});
  const ForwardContext context;
  const DType lse_dtype = compute_dtype_ == DType::F64 ? DType::F64 : DType::F32;

  Variable x = embed(step.slice_rows(0, tokens));
  Backend& backend = backend_of(x.value());
  for (size_t i = 0; i < layers.size(); ++i) {
    const Heads in = heads(layers[i], x, positions, context);
    Tensor new_k = cache.k[i].slice_rows(before, after);
    Tensor new_v = cache.v[i].slice_rows(before, after);
    backend.copy(new_k, in.k.value());
    backend.copy(new_v, in.v.value());
    Tensor attended = Tensor::empty(in.q.shape(), compute_dtype_, device_);
    Tensor lse = Tensor::empty({config_.num_attention_heads, tokens}, lse_dtype, device_);
    backend.attention_forward(attended, lse, in.q.value(), cache.k[i].slice_rows(0, after),
                              cache.v[i].slice_rows(0, after), cu_q, cu_k, attention_scale());
    x = finish_layer(layers[i], x, Variable(attended), context);
  }
  cache.length = after;
  return norm.forward(x).value();
}

int64_t num_parameters(const ModelConfig& config) {
  Decoder model(config, DType::F32, Device::Meta);
  struct Count : Visitor {
    int64_t total = 0;
    void parameter(const std::string&, Variable& value) override {
      total += value.value().num_elements();
    }
  } count;
  model.visit("", count);
  return count.total;
}

}  // namespace graft
