// Learning-rate schedules: the arithmetic of transformers.get_scheduler, to the last bit.
#pragma once

#include <cstdint>

namespace graft {

struct Schedule {
  enum class Type { Constant, ConstantWithWarmup, Linear, Cosine } type = Type::Cosine;
  double learning_rate = 2e-4;
  int64_t warmup_steps = 0;  // Constant has none
  int64_t total_steps = 0;
  double min_lr_ratio = 0;  // Cosine alone: falls to learning_rate * min_lr_ratio

  // The learning rate of step n, counted from 1: what transformers' lambda gives for n - 1.
  double at(int64_t step) const;
};

// Steps of warm-up as the Trainer counts them: warmup_steps where it is more than 0, else
// ceil(total_steps * warmup_ratio).
int64_t num_warmup_steps(int64_t warmup_steps, double warmup_ratio, int64_t total_steps);

}  // namespace graft
