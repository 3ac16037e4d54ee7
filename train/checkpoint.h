// Training checkpoints: output_dir/checkpoint-N holds the model as the run's result would be (an
// adapter, or weights), the optimizer, and where the run stood. Written aside and renamed, so one
// that bears its name is whole unless the disk lost something; that is found by size and hash.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "nn/parameter_buffer.h"

namespace graft {

// Where a run stands after `step` optimizer steps. The order of rows and the dropout masks are
// functions of seed and step: no generator has a state to keep.
struct TrainerState {
  int64_t step = 0;
  int64_t epoch = 0;     // epoch of the last step, from 0
  int64_t position = 0;  // rows of that epoch which have been seen
  int64_t num_tokens = 0, num_label_tokens = 0;
  double unlogged_loss = 0;  // sum over the labelled tokens since the last logged step
  int64_t unlogged_label_tokens = 0;
  std::optional<double> first_eval_loss, last_eval_loss;
  int64_t last_eval_step = -1;  // an interrupted run may owe the evaluation of its last step
  // What the result depends on: keys of the options, data, model. A resumed run must have the same.
  std::vector<std::pair<std::string, std::string>> result_keys;
};

// Writes output_dir/checkpoint-<state.step>, and then deletes the oldest beyond save_total_limit
// (0: none). save_model writes the model's files into the folder it is given. Throws Error when the
// disk is full; then older checkpoints are as they were.
std::string save_checkpoint(const std::string& output_dir, const TrainerState& state,
                            ParameterBuffer& parameters, int64_t save_total_limit,
                            const std::function<void(const std::string& folder)>& save_model);

// The newest whole checkpoint of output_dir. Torn ones are passed over, each with a line to `say`.
std::optional<std::string> newest_checkpoint(const std::string& output_dir,
                                             const std::function<void(const std::string&)>& say);

TrainerState load_trainer_state(const std::string& checkpoint);

// Values, m and v of the parameters. Throws Error when their number differs.
void load_optimizer(ParameterBuffer& parameters, const std::string& checkpoint);

// Throws an Error that names every key in which the run differs from the checkpoint.
void check_same_run(const TrainerState& saved,
                    const std::vector<std::pair<std::string, std::string>>& result_keys,
                    const std::string& checkpoint);

// 64-bit hash of a file's bytes.
uint64_t hash_file(const std::string& path);

}  // namespace graft
