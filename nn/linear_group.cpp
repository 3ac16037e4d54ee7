#include "nn/linear_group.h"

namespace graft {

LinearGroup::LinearGroup(const std::vector<Linear*>& layers, bool bordered, bool wide_output) {
  bool dropout = false;
  for (const Linear* layer : layers) {
    ops::LoraGroup::Layer member;
    member.out_features = layer->out_features();
    if (const LoraPair* pair = layer->lora.get()) {
      member.lora = {pair->a, pair->b, pair->scaling, pair->dropout_p, {}};
      member.lora.key.module = pair->module;
      dropout = dropout || pair->dropout_p > 0;
    }
    group_.layers.push_back(member);
  }
  CHECK(!bordered || !dropout, "linear group: bordered weights need adapters without dropout");
  group_.wide_output = wide_output;
  move_weights(layers, bordered ? ops::border_columns(group_) : 0);
  move_biases(layers);
}

void LinearGroup::move_weights(const std::vector<Linear*>& layers, int64_t border) {
  const Tensor& first = layers.at(0)->weight.value();
  const int64_t in = first.size(1);
  int64_t out = 0;
  for (const Linear* layer : layers) {
    const Tensor& weight = layer->weight.value();
    CHECK(weight.size(1) == in && weight.dtype() == first.dtype() &&
              weight.device() == first.device() && !layer->weight.requires_grad(),
          "linear group: weights must be frozen, of one dtype and of one input, got ",
          dtype_name(weight.dtype()), " ", weight.shape(), " beside ", dtype_name(first.dtype()),
          " ", first.shape());
    out += weight.size(0);
  }
  Tensor whole = Tensor::with_spare_cols(out + border, in, border, first.dtype(), first.device(),
                                         Scope::Weights)
                     .widen_cols(border);
  if (border > 0) backend_of(whole).fill(whole, 0);
  int64_t begin = 0;
  for (Linear* layer : layers) {
    Tensor rows = whole.slice_rows(begin, begin + layer->out_features()).slice_cols(0, in);
    backend_of(whole).copy(rows, layer->weight.value());
    layer->weight.set_value(rows);
    begin += layer->out_features();
  }
  group_.weight = whole.slice_rows(0, out).slice_cols(0, in);
  if (border > 0) group_.bordered = whole;
}

void LinearGroup::move_biases(const std::vector<Linear*>& layers) {
  bool any = false;
  for (const Linear* layer : layers) any = any || layer->bias.defined();
  if (!any) return;
  // In the dtype of the product, so that it is added inside it.
  Tensor bias = Tensor::zeros({group_.weight.size(0)}, group_.weight.dtype(),
                              group_.weight.device(), Scope::Weights);
  int64_t begin = 0;
  for (Linear* layer : layers) {
    Tensor part = bias.slice_rows(begin, begin + layer->out_features());
    begin += layer->out_features();
    if (!layer->bias.defined()) continue;
    CHECK(!layer->bias.requires_grad(), "linear group: biases must be frozen");
    backend_of(bias).copy(part, layer->bias.value());
    layer->bias.set_value(part);
  }
  group_.bias = bias;
}

Variable LinearGroup::forward(const Variable& x, const ForwardContext& context) const {
  ops::LoraGroup group = group_;
  for (ops::LoraGroup::Layer& layer : group.layers) {
    const uint32_t module = layer.lora.key.module;
    layer.lora.key = context.dropout;
    layer.lora.key.module = module;
    if (!context.training) layer.lora.dropout_p = 0;
  }
  return ops::lora_linear_group(x, group);
}

void LinearGroup::add_border_copies(std::vector<ScaledCopy>& copies) const {
  if (!group_.bordered.defined()) return;
  const Tensor& whole = group_.bordered;
  const int64_t out = group_.weight.size(0), in = group_.weight.size(1);
  int64_t row = 0, column = 0;  // of B, and the rows of A
  for (const ops::LoraGroup::Layer& layer : group_.layers) {
    const int64_t end = row + layer.out_features;
    if (layer.lora.a.defined()) {
      const Tensor &a = layer.lora.a.value(), &b = layer.lora.b.value();
      const int64_t r = a.size(0);
      copies.push_back({whole.slice_rows(out + column, out + column + r).slice_cols(0, in), a, 1});
      copies.push_back({whole.slice_rows(row, end).slice_cols(in + column, in + column + r), b,
                        layer.lora.scaling});
      column += r;
    }
    row = end;
  }
}

}  // namespace graft
