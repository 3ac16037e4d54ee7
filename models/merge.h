// A base and adapters as one model on disk, and the proof that the two say the same.
#pragma once

#include <string>
#include <vector>

#include "models/combine.h"
#include "models/decoder.h"

namespace graft {

// How far `got` is from `wanted`: of an element, and of all as a share of the norm of `wanted`.
struct Distance {
  double largest = 0;
  double squares = 0, wanted_squares = 0;
  double share() const;
};

// What merging costs weights that the base holds in NF4, which are written dense. Both distances
// are from the weight widened to F32, with what adapters add.
struct Nf4Loss {
  int64_t weights = 0;
  int64_t bytes_before = 0, bytes_after = 0;
  Distance rounded;    // of what is in the files
  Distance quantised;  // of what NF4 would make of it again
};

// Writes W + sum_i w_i (W'_i - W) of every weight into `folder`, a Hugging Face directory: shards
// of at most 5 GB, config.json, tokenizer, generation_config. Computed in F32 and rounded once, to
// `dtype` (F32, BF16 or F16). One weight at a time is in memory beside the mapped base. Where an
// adapter changes lm_head or has its own of it or of the embeddings, and the two are tied, both are
// written and config.json says so.
//   base  on the CPU, from model_dir
Nf4Loss write_merged(Decoder& base, const std::string& model_dir,
                     const std::vector<WeightedAdapter>& adapters, DType dtype,
                     const std::string& folder);

// How far the logits of two models are apart, over all positions of some text.
struct Certificate {
  int64_t tokens = 0;
  double largest_difference = 0;  // of a logit
  double largest_logit = 0;       // |logit| of the first model
  double mean_kl = 0;             // of the first model's distribution from the second's, nats
  double largest_kl = 0;
  double agreement = 0;  // share of positions with the same most probable token
};

// rows: token ids; each is run by itself.
Certificate compare_models(Decoder& wanted, Decoder& got,
                           const std::vector<std::vector<int32_t>>& rows);

struct CertificateLimits {
  double difference = 1e-4;  // of largest_logit
  double mean_kl = 1e-6;
  double agreement = 0.99;
  // What one rounding of the weights to `dtype` may cost.
  static CertificateLimits of(DType dtype);
};
// What is beyond its limit, in words; empty when nothing is. NaN is beyond every limit.
std::string violations(const Certificate& certificate, const CertificateLimits& limits);

}  // namespace graft
