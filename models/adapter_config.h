// adapter_config.json to LoraConfig and back: the keys of PEFT, which of them graft understands,
// and which change the arithmetic and are therefore refused.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "nn/lora.h"

namespace graft {

// `where` begins every error: the path of the file. Missing keys take PEFT's defaults.
LoraConfig parse_adapter_config(const nlohmann::json& json, const std::string& where);

// The 24 keys that every PEFT since 2024 reads, and newer ones only where they differ from their
// default: indent 2, keys sorted, no newline at the end, as PEFT writes it. short_names: what
// all-linear stands for.
std::string format_adapter_config(const LoraConfig& config,
                                  const std::vector<std::string>& short_names);

}  // namespace graft
