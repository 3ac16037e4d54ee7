// Adapters as mlx-lm keeps them: adapters.safetensors with lora_a (in, r) and lora_b (r, out), the
// transposes of PEFT's, for DoRA m (out), and an adapter_config.json with one rank and one raw
// scale for all modules.
#pragma once

#include <string>

#include "models/adapter_file.h"

namespace graft {

bool is_mlx_adapter(const std::string& directory);  // it has an adapters.safetensors

// As strict as read_adapter. alpha = scale * rank. Targets are full names, or short ones where
// every layer from 0 on has the same modules.
AdapterFile read_mlx_adapter(const std::string& directory);

// Where ranks differ, the smaller are filled up with zeros; where scalings do, what differs from
// the first goes into B.
//   num_layers  of the model: mlx-lm counts the adapted layers from the last one
void write_mlx_adapter(const AdapterFile& file, int64_t num_layers, const std::string& directory);

}  // namespace graft
