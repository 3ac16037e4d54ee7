// An adapter as a GGUF file that llama.cpp loads with --lora.
#pragma once

#include <string>

#include "models/adapter_file.h"
#include "models/config.h"

namespace graft {

// Names and row order are those of llama.cpp's own converter: blk.N.attn_q.weight.lora_a, and for
// Llama the rows of q and k in the order of its rotation (pairs side by side, where Hugging Face
// has halves). llama.cpp scales by alpha / rank with one alpha for all: where a module's scaling is
// not that, which is so with patterns, what differs goes into B. F32. Throws Error for DoRA, which
// llama.cpp does not know.
void write_gguf_adapter(const AdapterFile& file, const ModelConfig& model, const std::string& path);

}  // namespace graft
