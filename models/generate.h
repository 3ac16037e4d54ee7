// Text generation with a KV cache: transformers' logits processors, in its order, and sampling.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "models/decoder.h"

namespace graft {

struct GenerationConfig {
  double temperature = 1.0;  // 0: greedy
  int64_t top_k = 0;         // 0: off
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;
  bool do_sample = true;
  int64_t max_new_tokens = 128;
  std::vector<int32_t> eos_token_ids;
  uint64_t seed = 0;

  // What generation_config.json of a model directory gives; defaults where it, or the file, is
  // absent (then eos comes from config.json's eos_token_id), but greedy unless the file says
  // do_sample, as in transformers.
  static GenerationConfig load(const std::string& model_dir);
};

// repetition penalty, temperature, top-k, top-p, min-p in transformers' order; logits (V) in place,
// filtered ones -inf.
void process_logits(std::vector<float>& logits, const std::vector<int32_t>& previous_ids,
                    const GenerationConfig& config);

// on_token is called with each new id (the eos included) as it comes; returning false stops.
std::vector<int32_t> generate(Decoder& model, const std::vector<int32_t>& prompt_ids,
                              const GenerationConfig& config,
                              const std::function<bool(int32_t)>& on_token = {});

}  // namespace graft
