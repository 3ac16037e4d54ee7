// A layer of the decoder with its products merged (nn/linear_group.h): the same computation as in
// decoder.cpp, which is to be read first, by fewer and larger products.
#include "models/decoder.h"
#include "nn/dora.h"

namespace graft {
namespace {

bool has_adapter(const Linear& layer) { return layer.lora != nullptr; }

struct FindAdapters : Visitor {
  bool dropout = false, stacked = false, trained_vectors = false;
  std::vector<const Linear*> dora;
  void parameter(const std::string&, Variable& value) override {
    trained_vectors = trained_vectors || (value.requires_grad() && value.shape().rank() == 1);
  }
  void linear(const std::string&, Linear& module) override {
    stacked = stacked || !module.stack.empty();
    if (!module.lora) return;
    dropout = dropout || module.lora->dropout_p > 0;
    if (module.lora->magnitude.defined()) dora.push_back(&module);
  }
};
FindAdapters find_adapters(Decoder& model) {
  FindAdapters found;
  model.visit("", found);
  return found;
}

}  // namespace

LoraLayout Decoder::set_lora_layout(LoraLayout layout) {
  const FindAdapters adapters = find_adapters(*this);
  if (layout == LoraLayout::Plain || !adapters.dora.empty() || adapters.stacked ||
      adapters.trained_vectors)
    return LoraLayout::Plain;
  if (adapters.dropout) layout = LoraLayout::Merged;
  const bool bordered = layout == LoraLayout::Bordered;
  for (DecoderLayer& layer : layers) {
    Attention& a = layer.self_attn;
    Mlp& m = layer.mlp;
    auto merged = std::make_unique<MergedLayer>();
    merged->qkv.emplace(std::vector{&a.q_proj, &a.k_proj, &a.v_proj}, bordered, true);
    merged->gate_up.emplace(std::vector{&m.gate_proj, &m.up_proj}, bordered, true);
    // What comes back to these is the gradient of the residual stream, which has no spare columns.
    if (bordered && has_adapter(a.o_proj)) merged->o.emplace(std::vector{&a.o_proj}, true, false);
    if (bordered && has_adapter(m.down_proj))
      merged->down.emplace(std::vector{&m.down_proj}, true, false);
    layer.merged = std::move(merged);
  }
  refresh_adapters();
  return layout;
}

void Decoder::refresh_adapters() {
  refresh_dora(find_adapters(*this).dora);
  std::vector<ScaledCopy> copies;
  for (const DecoderLayer& layer : layers) {
    if (!layer.merged) continue;
    const MergedLayer& m = *layer.merged;
    for (const auto* group : {&m.qkv, &m.o, &m.gate_up, &m.down})
      if (*group) (*group)->add_border_copies(copies);
  }
  if (!copies.empty()) backend_of(device_).copy_scaled(copies);
}

Variable Decoder::merged_layer_forward(const DecoderLayer& layer, const Variable& x,
                                       const PackedBatch& batch,
                                       const ForwardContext& context) const {
  const MergedLayer& m = *layer.merged;
  const auto project = [&](const std::optional<LinearGroup>& group, const Linear& single,
                           const Variable& input) {
    return group ? group->forward(input, context) : single.forward(input, context);
  };
  const auto normed = [&](const Variable& input, const RmsNorm& norm, const LinearGroup& group) {
    return ops::rms_norm(input, norm.weight, norm.eps, group.spare_cols());
  };
  const Variable attended = [&] {
    const Variable qkv = m.qkv->forward(normed(x, layer.input_layernorm, *m.qkv), context);
    return ops::attention_merged(
        qkv, {config_.num_attention_heads, config_.num_key_value_heads, config_.head_dim,
              layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight, config_.rms_norm_eps,
              batch.positions, cos_sin_, batch.cu_seqlens, attention_scale()});
  }();
  const Variable middle = ops::add(x, project(m.o, layer.self_attn.o_proj, attended));
  // A scope of its own, as in finish_layer.
  const Variable mlp = [&] {
    const int64_t spare = m.down ? m.down->spare_cols() : 0;
    const Variable inner = ops::swiglu_merged(
        m.gate_up->forward(normed(middle, layer.post_attention_layernorm, *m.gate_up), context),
        spare);
    return project(m.down, layer.mlp.down_proj, inner);
  }();
  return ops::add(middle, mlp);
}

}  // namespace graft
