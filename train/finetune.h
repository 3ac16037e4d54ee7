// The training loop: LoRA, or all weights. finetune.cpp has it on one page.
#pragma once

#include <csignal>
#include <optional>
#include <string>
#include <vector>

#include "train/dataset.h"
#include "train/options.h"

namespace graft {

struct TrainData {
  Dataset train;
  Dataset eval;  // no rows: no evaluation
};

struct TrainResult {
  int64_t steps = 0;           // optimizer steps done, those before a resume included
  bool interrupted = false;    // stopped early; a checkpoint was saved
  std::vector<double> losses;  // of every step of this process, over its labelled tokens
  std::vector<double> grad_norms;
  std::optional<double> first_eval_loss, last_eval_loss;
  std::string trainable_line;  // "trainable params: ... || all params: ... || trainable%: ..."
};

// Where the run is told to be quiet or to stop.
struct RunControl {
  std::FILE* console = nullptr;                           // progress lines; null: none
  const volatile std::sig_atomic_t* interrupt = nullptr;  // non-zero: finish the step, save, return
};

// Loads model, tokenizer and data as the options say, trains, and writes output_dir: the adapter
// (method full: the weights), train_config.yaml, metrics.jsonl and checkpoints. Throws Error before
// anything is written where options, model or data are unfit.
TrainResult finetune(const TrainOptions& options, const RunControl& control = {});

// The same on rows that are given; no tokenizer is needed, options.data is not read.
TrainResult finetune(const TrainOptions& options, TrainData data, const RunControl& control = {});

}  // namespace graft
