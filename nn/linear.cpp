#include "nn/linear.h"

#include "tensor/backend.h"

namespace graft {

namespace {

ops::LoraArguments arguments_of(const LoraPair& lora, const ForwardContext& context) {
  ops::LoraArguments arguments{lora.a, lora.b, lora.scaling, 0, context.dropout};
  arguments.dropout_p = context.training ? lora.dropout_p : 0;
  arguments.key.module = lora.module;
  return arguments;
}

bool has_dora(const Linear& layer) { return layer.lora && layer.lora->magnitude.defined(); }

// Whether the columns of this layer may be scaled by what takes them in.
bool may_be_scaled_later(const Linear& layer, const ForwardContext& context) {
  const bool dropout = context.training && layer.lora && layer.lora->dropout_p > 0;
  return !has_dora(layer) || !(layer.bias.defined() || dropout || !layer.stack.empty());
}

// The layer without the scaling that DoRA owes, and that scaling.
Variable unscaled(const Linear& layer, const Variable& x, const ForwardContext& context) {
  if (!has_dora(layer)) return layer.forward(x, context);
  return ops::lora_linear(x, layer.weight, {}, arguments_of(*layer.lora, context));
}
ops::DoraFactor factor_of(const Linear& layer) {
  if (!has_dora(layer)) return {};
  return {layer.lora->magnitude, layer.lora->norm};
}

}  // namespace

Variable Linear::forward(const Variable& x, const ForwardContext& context) const {
  if (!lora) return stacked_.a.defined() ? stacked_forward(x) : ops::linear(x, weight, bias);
  const ops::LoraArguments arguments = arguments_of(*lora, context);
  const Variable y = has_dora(*this)
                         ? ops::dora_linear(x, weight, bias, arguments, factor_of(*this))
                         : ops::lora_linear(x, weight, bias, arguments);
  return stacked_.a.defined() ? add_stacked(y, x) : y;
}

std::vector<ops::LoraArguments> Linear::added_pairs(const ForwardContext& context) const {
  CHECK(!has_dora(*this) && !stacked_rows_.magnitude.defined(),
        "linear: DoRA cannot be added to a product that is part of another op");
  std::vector<ops::LoraArguments> pairs;
  if (lora) pairs.push_back(arguments_of(*lora, context));
  if (stacked_.a.defined()) pairs.push_back(arguments_of(stacked_, context));
  return pairs;
}

Variable swiglu_of(const Linear& gate_proj, const Linear& up_proj, const Variable& x,
                   const ForwardContext& context) {
  const bool later = (has_dora(gate_proj) || has_dora(up_proj)) &&
                     may_be_scaled_later(gate_proj, context) &&
                     may_be_scaled_later(up_proj, context);
  if (!later) {
    const Variable gate = gate_proj.forward(x, context);
    return ops::swiglu(gate, up_proj.forward(x, context));
  }
  const Variable gate = unscaled(gate_proj, x, context);
  return ops::dora_swiglu(gate, unscaled(up_proj, x, context), factor_of(gate_proj),
                          factor_of(up_proj));
}

void Linear::visit(const std::string& prefix, Visitor& visitor) {
  visitor.linear(prefix, *this);
  visitor.parameter(prefix + ".weight", weight);
  if (bias.defined()) visitor.parameter(prefix + ".bias", bias);
}

void RmsNorm::visit(const std::string& prefix, Visitor& visitor) {
  if (weight.defined()) visitor.parameter(prefix + ".weight", weight);
}

ops::LoraArguments TokenRows::pair() const {
  return {ops::add(rows, Variable(minus_base)), Variable(places), 1, 0, {}};
}

void Embedding::train_tokens(const std::vector<int64_t>& ids) {
  const Tensor& w = weight.value();
  const int64_t n = int64_t(ids.size()), vocabulary = w.size(0);
  const Device device = w.device(), made_on = device == Device::CUDA ? Device::CPU : device;
  const auto zeros = [&](Shape shape) {
    return Tensor::zeros(shape, DType::F32, made_on, Scope::Adapters);
  };
  Tensor rows = zeros({n, w.size(1)}), minus = zeros({n, w.size(1)}),
         places = zeros({vocabulary, n});
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = ids[size_t(i)];
    CHECK(id >= 0 && id < vocabulary, "lora: trainable_token_indices holds ", id,
          ", but the embedding has rows 0 to ", vocabulary - 1);
    if (device == Device::Meta) continue;
    Tensor row = rows.slice_rows(i, i + 1), less = minus.slice_rows(i, i + 1);
    backend_of(row).copy(row, w.slice_rows(id, id + 1).to(Device::CPU));
    backend_of(less).scale(less, row, -1);
    places.data<float>()[id * n + i] = 1;
  }
  tokens = TokenRows{ids, Variable(rows.to(device, Scope::Adapters), true),
                     minus.to(device, Scope::Adapters), places.to(device, Scope::Adapters)};
}

Variable Embedding::forward(const Tensor& ids, DType dtype) const {
  Variable y = ops::embedding(ids, weight, dtype);
  for (const ops::LoraArguments& pair : added_pairs({}))
    y = ops::add_embedding_low_rank(y, ids, pair);
  if (tokens) y = ops::add_embedding_low_rank(y, ids, tokens->pair());
  return y;
}

void Embedding::visit(const std::string& prefix, Visitor& visitor) {
  visitor.embedding(prefix, *this);
  visitor.parameter(prefix + ".weight", weight);
}

}  // namespace graft
