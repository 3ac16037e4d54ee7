// A model with random weights that were made on the GPU: the same numbers as random_model gives on
// the CPU, without 16 GB on the host.
#pragma once

#include <memory>
#include <string>

#include "cuda/cuda_backend.h"
#include "models/decoder.h"

namespace graft {

// What random_model(config, dtype, seed) holds, on Device::CUDA.
inline std::unique_ptr<Decoder> random_gpu_model(const ModelConfig& config, DType dtype,
                                                 uint64_t seed, double initializer_range = 0.02) {
  struct Fill : Visitor {
    DType dtype;
    uint64_t seed;
    double deviation;
    uint32_t number = 0;  // of the parameter, in the order of the visit
    void parameter(const std::string& name, Variable& value) override {
      Tensor tensor = Tensor::empty(value.shape(), dtype, Device::CUDA, Scope::Weights);
      const uint32_t mine = number++;
      if (tensor.rank() == 2)
        cuda_fill_normal(tensor, seed, mine, deviation);
      else
        backend_of(tensor).fill(tensor, name.find("norm") != std::string::npos ? 1 : 0);
      value.set_value(tensor);
    }
  } fill;
  fill.dtype = dtype;
  fill.seed = seed;
  fill.deviation = initializer_range;
  auto model = std::make_unique<Decoder>(config, dtype, Device::CUDA);
  model->visit("", fill);
  return model;
}

}  // namespace graft
