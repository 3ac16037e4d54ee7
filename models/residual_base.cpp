#include "models/residual_base.h"

#include <algorithm>
#include <cmath>

#include "models/low_rank.h"
#include "nn/dora.h"
#include "tensor/backend.h"
#include "tensor/thread_pool.h"

namespace graft {
namespace {

struct Split {
  Tensor weight;  // (out, in) F32, on the CPU; then the residual
  LowRankTerm part;
};

void take_apart(Split& split, const LoraPair& pair, const LoraConfig& config, uint64_t seed) {
  const int64_t r = pair.a.shape()[0];
  if (config.init_lora_weights == LoraConfig::Init::Pissa) {
    // Numbers of its own for each layer.
    const uint64_t layer_seed = seed ^ uint64_t(pair.module) << 32;
    split.part = principal_part(split.weight, r, pair.scaling, config.pissa_niter, layer_seed);
  } else {
    split.part = leading_qr(split.weight, r);
    split.part.scale = pair.scaling;
  }
  split.weight = remainder(split.weight, split.part);
}

void put_back(Linear& linear, const Split& split, DType dtype, Device device) {
  LoraPair& pair = *linear.lora;
  linear.weight.set_value(split.weight.to(dtype, Scope::Weights).to(device, Scope::Weights));
  pair.start_a = split.part.a;
  pair.start_b = split.part.b;
  Tensor a = pair.a.value(), b = pair.b.value();
  backend_of(a).copy(a, pair.start_a);
  backend_of(b).copy(b, pair.start_b);
  if (pair.magnitude.defined()) start_dora(pair, linear.weight.value());
}

}  // namespace

void take_out_adapters(Decoder& model, const LoraConfig& config, uint64_t seed) {
  std::vector<Linear*> layers;
  for (const auto& [name, linear] : linear_layers(model)) {
    if (!linear->lora) continue;
    const int64_t r = linear->lora->a.shape()[0];
    CHECK(r <= std::min(linear->in_features(), linear->out_features()), "lora: init_lora_weights ",
          init_name(config), " with r ", r, ", but ", name, " is ", linear->weight.shape(),
          "; choose a smaller r, or one for this module in rank_pattern");
    layers.push_back(linear);
  }
  // One weight is a thread's; a few at a time, for each is there in F32 meanwhile.
  const size_t at_a_time = size_t(4 * thread_pool().num_threads());
  for (size_t begin = 0; begin < layers.size(); begin += at_a_time) {
    std::vector<Split> splits(std::min(at_a_time, layers.size() - begin));
    for (size_t i = 0; i < splits.size(); ++i)
      splits[i].weight = layers[begin + i]
                             ->weight.value()
                             .to(Device::CPU, Scope::Scratch)
                             .to(DType::F32, Scope::Scratch);
    thread_pool().run(int64_t(splits.size()), [&](int64_t i, int) {
      take_apart(splits[size_t(i)], *layers[begin + size_t(i)]->lora, config, seed);
    });
    for (size_t i = 0; i < splits.size(); ++i)
      put_back(*layers[begin + i], splits[i], model.compute_dtype(), model.device());
  }
}

LoraConfig for_untouched_base(LoraConfig config) {
  if (!has_residual_base(config)) return config;
  // The rank doubles and the scaling, alpha / r or alpha / sqrt(r), must not change.
  const double factor = config.use_rslora ? std::sqrt(2.0) : 2;
  config.lora_alpha = config.alpha() * factor;
  config.r *= 2;
  for (auto& [pattern, r] : config.rank_pattern) r *= 2;
  for (auto& [pattern, alpha] : config.alpha_pattern) alpha *= factor;
  config.init_lora_weights = LoraConfig::Init::KaimingUniform;
  config.pissa_niter.reset();
  return config;
}

std::pair<Tensor, Tensor> factors_for_untouched_base(const LoraPair& pair) {
  if (!pair.start_a.defined()) return {pair.a.value(), pair.b.value()};
  const LowRankTerm both =
      concatenate({{pair.a.value().to(Device::CPU), pair.b.value().to(Device::CPU), 1},
                   {pair.start_a, pair.start_b, -1}});
  return {both.a, both.b};
}

}  // namespace graft
