#include "train/data_loader.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "tensor/check.h"
#include "tensor/random.h"

namespace graft {

DataLoader::DataLoader(const Dataset& dataset, const LoaderOptions& options)
    : dataset_(dataset), options_(options) {
  CHECK(!dataset.rows.empty(), "data: no rows to train on");
  CHECK(options.batch_size > 0 && options.accumulation_steps > 0, "data: batch of ",
        options.batch_size, " x ", options.accumulation_steps, " rows");
}

int64_t DataLoader::steps_per_epoch() const {
  const int64_t rows = int64_t(dataset_.rows.size());
  const int64_t micro_batches = (rows + options_.batch_size - 1) / options_.batch_size;
  return (micro_batches + options_.accumulation_steps - 1) / options_.accumulation_steps;
}

int64_t DataLoader::position_after(int64_t n) const {
  const int64_t step_in_epoch = (n - 1) % steps_per_epoch() + 1;
  return std::min(step_in_epoch * options_.accumulation_steps * options_.batch_size,
                  int64_t(dataset_.rows.size()));
}

double DataLoader::epochs_after(int64_t n) const {
  if (n == 0) return 0;
  return double(epoch_of(n)) + double(position_after(n)) / double(dataset_.rows.size());
}

const std::vector<std::vector<int64_t>>& DataLoader::step(int64_t n) {
  if (const int64_t epoch = epoch_of(n); epoch != epoch_) {
    order_.resize(dataset_.rows.size());
    std::iota(order_.begin(), order_.end(), 0);
    if (options_.shuffle) {
      Random random(options_.seed, /*stream=*/uint64_t(epoch));
      for (size_t i = order_.size() - 1; i > 0; --i) {  // Fisher-Yates
        std::swap(order_[i], order_[random.below(i + 1)]);
      }
    }
    epoch_ = epoch;
  }
  micro_batches_.clear();
  const int64_t end = position_after(n);
  const int64_t step_in_epoch = (n - 1) % steps_per_epoch();
  int64_t row = step_in_epoch * options_.accumulation_steps * options_.batch_size;
  for (; row < end; row += options_.batch_size)
    micro_batches_.emplace_back(order_.begin() + row,
                                order_.begin() + std::min(row + options_.batch_size, end));
  return micro_batches_;
}

}  // namespace graft
