#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace graft {

double Schedule::at(int64_t step) const {
  const int64_t done = step - 1;
  if (type == Type::Constant) return learning_rate;
  if (done < warmup_steps)
    return learning_rate * (double(done) / double(std::max<int64_t>(1, warmup_steps)));
  if (type == Type::ConstantWithWarmup) return learning_rate;

  const double decay_steps = double(std::max<int64_t>(1, total_steps - warmup_steps));
  if (type == Type::Linear)
    return learning_rate * std::max(0.0, double(total_steps - done) / decay_steps);

  const double progress = double(done - warmup_steps) / decay_steps;
  double factor = 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
  if (min_lr_ratio > 0) factor = factor * (1.0 - min_lr_ratio) + min_lr_ratio;
  return learning_rate * std::max(0.0, factor);
}

int64_t num_warmup_steps(int64_t warmup_steps, double warmup_ratio, int64_t total_steps) {
  if (warmup_steps > 0) return warmup_steps;
  return int64_t(std::ceil(double(total_steps) * warmup_ratio));
}

}  // namespace graft
