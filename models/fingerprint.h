// By what an adapter knows its base again: two short texts that save_adapter writes into the
// metadata of adapter_model.safetensors, which PEFT does not read.
#pragma once

#include <string>

namespace graft {

// Empty where nothing is known, as for random weights.
struct BaseFingerprint {
  // Of the weights as they lie in the files: every tensor's name, dtype and shape, and of its bytes
  // the whole up to 64 KiB, else 16 pieces of 4 KiB, evenly spread, the last one at the end. The
  // same however they are cut into shards, wherever they lie and whatever dtype they are loaded in.
  // Two models of which no sampled byte differs are taken for one.
  std::string weights;
  // Of tokenizer.json without the white space between its JSON values.
  std::string tokenizer;
};

constexpr const char* kBaseFingerprintKey = "graft.base_fingerprint";
constexpr const char* kTokenizerFingerprintKey = "graft.tokenizer_fingerprint";

// Of a model directory. Reads at most 64 KiB of a tensor: milliseconds for a model of any size.
BaseFingerprint fingerprint_of(const std::string& model_dir);

}  // namespace graft
