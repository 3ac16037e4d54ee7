// An adapter as it lies on disk, without the model that it belongs to: what graft combine and graft
// convert work on, and what load_adapter (models/adapter.h) puts on a model.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "models/fingerprint.h"
#include "nn/lora.h"

namespace graft {

class SafetensorsFile;

// Before every name in the file; what follows it is the module's name in transformers.
inline const std::string kAdapterPrefix = "base_model.model.";

struct AdapterModule {
  std::string name;  // "model.layers.0.self_attn.q_proj"
  // (r, in), (out, r), F32. Of an embedding (r, H), (vocabulary, r): the file has the transposed
  // ones, lora_embedding_B for a and lora_embedding_A for b.
  Tensor a, b;
  Tensor magnitude;  // (out) F32; undefined but for DoRA
  double scaling = 1;
};

struct AdapterFile {
  std::string directory;
  LoraConfig config;
  std::vector<AdapterModule> modules;  // by layer, and in the order of a layer's computation
  BaseFingerprint base;                // what the file says of its base; empty where it is silent
  // (n, H) F32, the rows of config.trainable_token_indices; undefined where there are none.
  Tensor token_rows;
  // Its own of the base's parameters, by their names in the base; F32.
  std::vector<std::pair<std::string, Tensor>> replaced;
  // Whole embedding matrices that PEFT saved beside it: name and number of tokens.
  std::vector<std::pair<std::string, int64_t>> embeddings;

  const AdapterModule* find(const std::string& module) const;
  bool is_empty() const;  // every B is zero, and there is nothing else: nothing was learned
};

// Reads `directory`/adapter_config.json. Missing keys take PEFT's defaults (r 8, lora_alpha 8,
// dropout 0). Throws an Error that names the key for anything that changes the arithmetic and is
// not understood.
LoraConfig load_adapter_config(const std::string& directory);

// Reads both files. Every tensor must have a name that an adapter has, both halves, the rank that
// adapter_config.json gives it, and be finite: else one Error that names it.
AdapterFile read_adapter(const std::string& directory);

// A tensor of an adapter, which is in the file: F32, F16 or BF16 of so many dimensions, finite; as
// F32.
Tensor read_adapter_tensor(const SafetensorsFile& file, const std::string& name, size_t rank);

// The last parts of its modules' names, each once: "q_proj", ...
std::vector<std::string> short_names(const AdapterFile& file);

// Where `got` says that it belongs to another base than `wanted`, throws an Error that begins with
// `what`. Unknown fingerprints agree with all.
void check_same_base(const BaseFingerprint& got, const BaseFingerprint& wanted,
                     const std::string& what);

// Throws Error for an adapter that has more than pairs, which `what` cannot keep.
void check_pairs_alone(const AdapterFile& file, const std::string& what);

// Throws Error for an adapter of which every B is zero; its message ends with `way_out`.
void check_not_empty(const AdapterFile& file,
                     const std::string& way_out = "--allow-empty takes it");

// Writes both files, each aside and then renamed; F32, replaced parameters in their own dtype. The
// directory is made if it is not there.
void write_adapter(const AdapterFile& file, const std::string& directory);

}  // namespace graft
