// What a training step will take, before it is run: the same step on Device::Meta, where kernels do
// nothing and the allocator only counts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "models/decoder.h"
#include "nn/lora.h"
#include "train/options.h"

namespace graft {

struct MemoryPlan {
  int64_t tokens = 0;  // of the micro-batch that was planned for
  int64_t mapped_weights =
      0;                    // bytes of the file, used in place: page cache, shared, not anonymous
  int64_t weights = 0;      // bytes of weights of our own (another dtype, NF4, full fine-tuning)
  int64_t adapters = 0;     // F32 master copy of what is trained
  int64_t optimizer = 0;    // its gradient, m and v
  int64_t activations = 0;  // the most that is live at once, gradients of activations included
  int64_t scratch = 0;      // packing buffers, chunk of logits
  int64_t process = 0;      // program, libraries, tokenizer
  int64_t anonymous = 0;    // all but mapped_weights: what the machine must have free
  int64_t trainable_parameters = 0;
  int64_t all_parameters = 0;
  std::vector<LoraTarget> targets;                                 // empty with method full
  std::vector<std::pair<std::string, int64_t>> module_parameters;  // of each target, in its order
  std::vector<std::pair<std::string, int64_t>> replaced;  // biases and weights of whole modules
};

// file_dtype: what the weights on disk are in (the config's torch_dtype where they are not at
// hand). threads: 0 as for training.
MemoryPlan plan_memory(const ModelConfig& config, const TrainOptions& options, DType file_dtype);

}  // namespace graft
