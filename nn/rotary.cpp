#include "nn/rotary.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "tensor/check.h"

namespace graft {
namespace {

// Llama 3.1: long waves are stretched by `factor`, short ones left alone, those between blended.
double llama3_frequency(const RopeConfig& config, double frequency) {
  const double original = double(config.original_max_position_embeddings);
  const double wavelength = 2 * std::numbers::pi / frequency;
  if (wavelength > original / config.low_freq_factor) return frequency / config.factor;
  if (wavelength < original / config.high_freq_factor) return frequency;
  const double smooth = (original / wavelength - config.low_freq_factor) /
                        (config.high_freq_factor - config.low_freq_factor);
  return (1 - smooth) * frequency / config.factor + smooth * frequency;
}

// YaRN (Peng et al. 2023), equation 17 by dimension: the index of the frequency that turns
// `rotations` times within the original context.
double yarn_correction_dim(const RopeConfig& config, double rotations, int64_t head_dim) {
  return double(head_dim) *
         std::log(double(config.original_max_position_embeddings) /
                  (rotations * 2 * std::numbers::pi)) /
         (2 * std::log(config.rope_theta));
}

// Frequencies below `low` stay, those above `high` are stretched, a ramp lies between.
void yarn_frequencies(const RopeConfig& config, int64_t head_dim, std::vector<double>& frequency) {
  double low = yarn_correction_dim(config, config.beta_fast, head_dim);
  double high = yarn_correction_dim(config, config.beta_slow, head_dim);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, double(head_dim - 1));
  if (low == high) high += 0.001;
  for (size_t i = 0; i < frequency.size(); ++i) {
    const double stretched = std::clamp((double(i) - low) / (high - low), 0.0, 1.0);
    frequency[i] = frequency[i] / config.factor * stretched + frequency[i] * (1 - stretched);
  }
}

double yarn_attention_factor(const RopeConfig& config) {
  if (config.attention_factor >= 0) return config.attention_factor;
  const auto scale = [&](double mscale) {
    return config.factor <= 1 ? 1.0 : 0.1 * mscale * std::log(config.factor) + 1.0;
  };
  if (config.mscale > 0 && config.mscale_all_dim > 0)
    return scale(config.mscale) / scale(config.mscale_all_dim);
  return scale(1.0);
}

}  // namespace

RotaryFrequencies rotary_frequencies(const RopeConfig& config, int64_t head_dim) {
  CHECK(head_dim > 0 && head_dim % 2 == 0, "rotary: head_dim is ", head_dim, ", wanted even");
  std::vector<double> frequency(size_t(head_dim / 2));
  for (size_t i = 0; i < frequency.size(); ++i)
    frequency[i] = std::pow(config.rope_theta, -2.0 * double(i) / double(head_dim));

  RotaryFrequencies result;
  switch (config.type) {
    case RopeConfig::Type::Default:
      break;
    case RopeConfig::Type::Linear:
      for (double& f : frequency) f /= config.factor;
      break;
    case RopeConfig::Type::Llama3:
      for (double& f : frequency) f = llama3_frequency(config, f);
      break;
    case RopeConfig::Type::Yarn:
      yarn_frequencies(config, head_dim, frequency);
      result.attention_factor = yarn_attention_factor(config);
      break;
  }
  result.inv_freq.assign(frequency.begin(), frequency.end());
  return result;
}

Tensor rotary_table(const RotaryFrequencies& frequencies, int64_t positions, DType dtype,
                    Device device) {
  const int64_t half = int64_t(frequencies.inv_freq.size());
  const Device made_on = device == Device::CUDA ? Device::CPU : device;
  Tensor table = Tensor::empty({positions, 2 * half}, dtype, made_on, Scope::Weights);
  if (device == Device::Meta) return table;
  const auto fill = [&]<class T>(T* values) {
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(float(p) * frequencies.inv_freq[size_t(i)]);
        values[p * 2 * half + i] = T(std::cos(angle) * frequencies.attention_factor);
        values[p * 2 * half + half + i] = T(std::sin(angle) * frequencies.attention_factor);
      }
  };
  if (dtype == DType::F64)
    fill(table.data<double>());
  else
    fill(table.data<float>());
  return table.to(device, Scope::Weights);
}

}  // namespace graft
