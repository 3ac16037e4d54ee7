// From a model directory to a Decoder with frozen weights, and back for full fine-tuning.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "models/nf4_weights.h"
#include "tensor/safetensors.h"

namespace graft {

// A directory as it is, or a hub id ("Qwen/Qwen2.5-0.5B") that lies in the local Hugging Face cache
// (HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub; refs/main names the snapshot).
// Else one clear Error.
std::string resolve_model(const std::string& model);

// Reads config.json and maps the safetensors (single file, or shards with index). Weights are used
// in place where the file's dtype is the one asked for; F16 files compute in F32 and stay F16 in
// memory; asked for another dtype, weights are rounded once.
//   dtype: F32 or BF16; unset: the file's (F16: F32)
//   device: on the GPU weights are a copy, in the dtype that is computed in
//   quantisation: linear layers are quantised one after the other, from what they would be without
//     it; weights that bitsandbytes has quantised to NF4 stay as they are in any case
// Every tensor must have the shape that the config implies; NaN and infinity are refused; a missing
// or left-over tensor is named.
std::unique_ptr<Decoder> load_model(const std::string& directory, std::optional<DType> dtype = {},
                                    Device device = Device::CPU,
                                    const Quantisation& quantisation = {});

// The dtype that most weights of the directory's safetensors have: F32, BF16 or F16, whatever
// config.json says.
DType dtype_of_files(const std::string& directory);

// Copies weights that are kept in another dtype than the model computes in (a BF16 or F16 file in
// F32) into that dtype. For full training, where they are to be changed by less than their own
// dtype can hold.
void widen_weights(Decoder& model);

// Random weights as transformers' _init_weights draws them: N(0, initializer_range^2), norms 1,
// biases 0. For full training from nothing, benchmarks and tests. On Device::Meta shapes only.
std::unique_ptr<Decoder> random_model(const ModelConfig& config, DType dtype, uint64_t seed,
                                      double initializer_range = 0.02, Device device = Device::CPU);

// model.safetensors (+ index above 5 GB), written aside and renamed; config.json is the caller's
// business.
void save_weights(Decoder& model, const std::string& directory, DType dtype);
// The same for tensors that are made while they are written; shards are filled in the given order.
void write_shards(const std::string& directory, std::vector<TensorToMake> tensors,
                  int64_t max_shard_bytes = 5'000'000'000);

}  // namespace graft
