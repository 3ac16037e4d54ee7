// An adapter on a model: adapter_config.json and adapter_model.safetensors as PEFT writes and reads
// them (models/adapter_file.h), attached and saved.
#pragma once

#include <string>

#include "models/adapter_file.h"
#include "models/decoder.h"
#include "nn/lora.h"

namespace graft {

struct AdapterChecks {
  bool allow_other_base = false;  // take it although its fingerprints say that the base is another
  bool allow_empty = true;        // take it although all its B are zero
};

// Attaches the adapter to the model and fills it. Every tensor must land: a key that is not
// understood, a missing half, a shape that does not fit, another base is refused by name, and then
// the model is left without any adapter.
LoraConfig load_adapter(Decoder& model, const std::string& directory,
                        const AdapterChecks& checks = {});
// The same of what read_adapter gave.
void attach_adapter(Decoder& model, const AdapterFile& file, const AdapterChecks& checks = {});

// Writes both files, each aside and then renamed; F32, with the fingerprint of the base, for which
// PiSSA and OLoRA are converted (models/residual_base.h). The directory is made if it is not there.
void save_adapter(Decoder& model, const LoraConfig& config, const std::string& directory);

}  // namespace graft
