#include "nn/linear.h"

namespace graft {

Variable Linear::forward(const Variable& x, const ForwardContext& context) const {
  if (!lora) return ops::linear(x, weight, bias);
  ops::LoraArguments arguments{lora->a, lora->b, lora->scaling, 0, context.dropout};
  arguments.dropout_p = context.training ? lora->dropout_p : 0;
  arguments.key.module = lora->module;
  return ops::lora_linear(x, weight, bias, arguments);
}

void Linear::visit(const std::string& prefix, Visitor& visitor) {
  visitor.linear(prefix, *this);
  visitor.parameter(prefix + ".weight", weight);
  if (bias.defined()) visitor.parameter(prefix + ".bias", bias);
}

void RmsNorm::visit(const std::string& prefix, Visitor& visitor) {
  if (weight.defined()) visitor.parameter(prefix + ".weight", weight);
}

void Embedding::visit(const std::string& prefix, Visitor& visitor) {
  visitor.parameter(prefix + ".weight", weight);
}

}  // namespace graft
