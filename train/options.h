// What a training run is told: one struct, and one table of keys (option_keys.cpp) that drives YAML
// files, flags, validation, defaults, --help and the written, resolved configuration.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "nn/linear_group.h"
#include "nn/lora.h"
#include "tensor/dtype.h"
#include "train/schedule.h"

namespace graft {

// Members carry the names of the keys, which are those of the transformers Trainer and of PEFT.
struct TrainOptions {
  enum class Method { Lora, Dora, Qlora, Qdora, Full };
  enum class Optimizer { AdamW, AdamW8bit };
  enum class DeviceChoice { Auto, Cpu, Cuda };

  std::string model;  // where to load from: a directory, or a hub id
  std::string output_dir;
  std::vector<std::string> data, eval_data;  // files, folders or patterns
  double eval_split = 0;                     // below 1: share of the rows, else their number
  std::string adapter;                       // start from this one instead of a fresh one
  std::vector<std::string> base_adapters;    // "DIR" or "DIR:0.5": frozen, under what is trained
  bool allow_other_base = false;             // take adapters that say they were trained on another
  Method method = Method::Lora;
  bool random_init = false;  // random base weights: only config.json is read (method full)

  // method qlora: transformers' BitsAndBytesConfig, of which NF4 is built.
  std::string bnb_4bit_quant_type = "nf4";
  bool bnb_4bit_use_double_quant = true;

  Optimizer optim = Optimizer::AdamW;
  double learning_rate = 2e-4;
  double num_epochs = 1;
  int64_t max_steps = 0;  // 0: num_epochs decides
  int64_t per_device_train_batch_size = 1;
  int64_t gradient_accumulation_steps = 8;
  int64_t max_seq_length = 1024;
  int64_t warmup_steps = 0;  // 0: warmup_ratio decides
  double warmup_ratio = 0.03;
  Schedule::Type lr_scheduler_type = Schedule::Type::Cosine;
  double min_lr_ratio = 0;
  double weight_decay = 0;
  double adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8;
  double max_grad_norm = 1;      // 0: no clipping
  double loraplus_lr_ratio = 1;  // LoRA+: the learning rate of B (and DoRA's m) over that of A

  int64_t eval_steps = 0;        // 0: before the first and after the last step only
  int64_t save_steps = 500;      // 0: never
  int64_t save_total_limit = 0;  // 0: keep all checkpoints
  bool resume = false;
  int64_t logging_steps = 1;

  bool gradient_checkpointing = false;
  std::optional<DType> dtype;  // unset: that of the file
  int64_t threads = 0;         // 0: all that the machine gives
  DeviceChoice device = DeviceChoice::Auto;
  bool cuda_graph = false;
  LoraLayout lora_layout = LoraLayout::Plain;  // on a GPU (nn/linear_group.h)
  bool tune = false;                           // time the algorithms of products on a GPU
  uint64_t seed = 42;
  bool shuffle = true;

  // lora.base_model_name_or_path is the model as the user wrote it, before it was resolved.
  LoraConfig lora;

  std::set<std::string> given;  // keys that a file or a flag named
};

// Whether the method quantises the base.
inline bool is_quantised(TrainOptions::Method method) {
  return method == TrainOptions::Method::Qlora || method == TrainOptions::Method::Qdora;
}
inline bool is_dora(TrainOptions::Method method) {
  return method == TrainOptions::Method::Dora || method == TrainOptions::Method::Qdora;
}

// Reads the YAML file at `path`. Relative paths in it are relative to its folder. Throws Error
// "<file>:<line>: <key>: got ..., expected ..." for an unknown, doubled or ill-typed key.
void read_config_file(TrainOptions& options, const std::string& path);

// What is left of a command line once the training flags are taken out of it.
struct CommandLine {
  bool help = false;
  std::vector<std::string> positional;
};

// Reads flags (every key; dashes or underscores; lists with commas) over `options`. Flags win over
// what a file gave, so read the file first. Paths are relative to the working directory. An unknown
// flag is a UsageError with the nearest name.
//   args    without the program and the command
CommandLine read_flags(TrainOptions& options, const std::vector<std::string>& args);

// [config.yaml] [flags], as `graft train` takes them: the file first, then the flags.
// `config_flag`: the file is given by --config instead, and positional arguments are left to the
// caller (graft info).
TrainOptions read_train_options(const std::vector<std::string>& args, CommandLine& rest,
                                bool config_flag = false);

// Throws Error for what no single key shows: missing model, data or output_dir, both eval_data and
// eval_split, min_lr_ratio without cosine, ...
void validate(const TrainOptions& options);

// All keys with their values, defaults included, paths absolute: read back by read_config_file it
// gives the same run.
std::string resolved_yaml(const TrainOptions& options);

// The keys that the result depends on, with their values as text. A resumed run must agree in all.
std::vector<std::pair<std::string, std::string>> result_keys(const TrainOptions& options);

std::string train_flags_help();

// "unknown flag --idz; did you mean --ids?" for the first of args that is no flag in this help
// text; empty where there is none.
std::string unknown_flag_hint(
    const std::string& help,
    const std::vector<std::string>& args);  // one line per key, with its default

// method dora or qdora, or use_dora: one means the other.
bool uses_dora(const TrainOptions& options);

// Threw a command line that cannot be understood: main() says it in one line and exits with 2.
struct UsageError : Error {
  using Error::Error;
};

}  // namespace graft
