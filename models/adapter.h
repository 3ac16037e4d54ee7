// An adapter on disk: adapter_config.json and adapter_model.safetensors as PEFT writes and reads
// them.
#pragma once

#include <string>

#include "models/decoder.h"
#include "nn/lora.h"

namespace graft {

// Reads `directory`/adapter_config.json. Missing keys take PEFT's defaults (r 8, lora_alpha 8,
// dropout 0). Throws an Error that names the key for anything that changes the arithmetic and is
// not understood.
LoraConfig load_adapter_config(const std::string& directory);

// Attaches the adapter to the model and fills it. Every tensor must land: a key that is not
// understood, a missing half, a shape that does not fit is refused by name, and then the model is
// left without any adapter.
LoraConfig load_adapter(Decoder& model, const std::string& directory);

// Writes both files, each aside and then renamed; F32. The directory is made if it is not there.
void save_adapter(Decoder& model, const LoraConfig& config, const std::string& directory);

}  // namespace graft
