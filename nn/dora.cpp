#include "nn/dora.h"

namespace graft {

DoraNorm dora_norm_of(const LoraPair& pair, const Tensor& weight) {
  return {pair.norm, pair.weight_squares, weight, pair.a.value(), pair.b.value(), pair.scaling};
}

void start_dora(LoraPair& pair, const Tensor& weight) {
  Backend& backend = backend_of(weight);
  const auto zeros = [&] {
    return Tensor::zeros({weight.size(0)}, DType::F32, weight.device(), Scope::Adapters);
  };
  pair.weight_squares = zeros();
  pair.norm = zeros();
  backend.row_squares(pair.weight_squares, weight);
  const DoraNorm norm = dora_norm_of(pair, weight);
  backend.dora_norms({&norm, 1});
  pair.magnitude = Variable(pair.norm.clone(Scope::Adapters), true);
}

void refresh_dora(const std::vector<const Linear*>& layers) {
  std::vector<DoraNorm> norms;
  for (const Linear* layer : layers)
    if (layer->lora && layer->lora->magnitude.defined())
      norms.push_back(dora_norm_of(*layer->lora, layer->weight.value()));
  if (!norms.empty()) backend_of(norms[0].norm).dora_norms(norms);
}

}  // namespace graft
