// Which rows an optimizer step sees. A function of (seed, step) alone: to resume is to go on
// counting.
#pragma once

#include <cstdint>
#include <vector>

#include "train/dataset.h"

namespace graft {

struct LoaderOptions {
  int64_t batch_size = 1;          // rows of a micro-batch
  int64_t accumulation_steps = 8;  // micro-batches of a step
  bool shuffle = true;
  uint64_t seed = 42;
};

class DataLoader {
 public:
  DataLoader(const Dataset& dataset, const LoaderOptions& options);

  // The last accumulation of an epoch may be incomplete; it is a step of its own.
  int64_t steps_per_epoch() const;

  // The micro-batches of step n, from 1, as row numbers of the dataset.
  const std::vector<std::vector<int64_t>>& step(int64_t n);

  int64_t epoch_of(int64_t n) const { return (n - 1) / steps_per_epoch(); }
  // Rows of the current epoch that have been seen once step n is done.
  int64_t position_after(int64_t n) const;
  // Epochs seen once step n is done, with the fraction of the last one.
  double epochs_after(int64_t n) const;

 private:
  const Dataset& dataset_;
  LoaderOptions options_;
  int64_t epoch_ = -1;
  std::vector<int64_t> order_;  // of the rows, in epoch_
  std::vector<std::vector<int64_t>> micro_batches_;
};

}  // namespace graft
