// Several adapters as one: sum_i w_i (W'_i - W), module by module.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "models/adapter_file.h"

namespace graft {

struct WeightedAdapter {
  AdapterFile file;
  double weight = 1;
};

// What became of one module.
struct CombinedModule {
  std::string name;
  int64_t full_rank = 0;  // of the sum of the low-rank deltas; of a DoRA delta all there is
  int64_t rank = 0;
  double energy = 1;  // share of the squared singular values that was kept
  double error = 0;   // |delta - kept| / |delta|, Frobenius
};

struct Combined {
  AdapterFile file;  // LoRA with scaling 1: lora_alpha is r
  std::vector<CombinedModule> modules;
};

// The weight of a module of the base, any float dtype, on the CPU: what a DoRA delta is made from.
using BaseWeight = std::function<Tensor(const std::string& module)>;

// Exact: the factors beside each other, rank the sum of the ranks. Throws Error for a DoRA adapter,
// whose delta has full rank.
Combined combine_cat(const std::vector<WeightedAdapter>& adapters);

// The nearest of at most `rank`, by SVD (models/low_rank.h). With a DoRA adapter `base` must be
// given.
Combined combine_svd(const std::vector<WeightedAdapter>& adapters, int64_t rank,
                     const BaseWeight& base = {});

bool has_dora(const AdapterFile& file);

// Makes the config of `file` say what its modules have: ranks and scalings (lora_alpha, with
// patterns where modules differ), use_rslora off, and targets by their full names unless
// `keep_targets`.
void describe_modules(AdapterFile& file, bool keep_targets);

}  // namespace graft
