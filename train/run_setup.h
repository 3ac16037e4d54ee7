// What stands around the training loop: model, data and adapter as the options ask for them, the
// output directory, and the result on disk.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "models/nf4_weights.h"
#include "nn/lora.h"
#include "nn/parameter_buffer.h"
#include "train/finetune.h"

namespace graft {

// Throws Error when output_dir is a file, or holds another run and resume is not set.
void check_output_dir(const TrainOptions& options);

// Rows of options.data, and of eval_data or eval_split, with the tokenizer of `model_dir`.
TrainData load_data(const TrainOptions& options, const std::string& model_dir);

// Throws Error for a token id that the model does not have.
void check_token_ids(const TrainData& data, const ModelConfig& config);

// What load_model is to quantise for these options.
Quantisation quantisation_of(const TrainOptions& options);

// A fresh adapter on the model, with biases and whole modules of its own where the config asks for
// them. Throws Error where it asks for biases and there are none.
std::vector<LoraTarget> attach_fresh_adapter(Decoder& model, const LoraConfig& config,
                                             uint64_t seed);

// The base with what is to be trained: a fresh adapter, the one of options.adapter, or all weights.
// Writes back into the options what was decided here: dtype, and the adapter's LoraConfig.
std::unique_ptr<Decoder> prepare_model(TrainOptions& options, const std::string& model_dir,
                                       Device device);

// How AdamW keeps its state.
inline ParameterBuffer::Moments moments_of(const TrainOptions& options) {
  return options.optim == TrainOptions::Optimizer::AdamW8bit ? ParameterBuffer::Moments::Bits8
                                                             : ParameterBuffer::Moments::F32;
}

// PEFT's "all params": those of the base and what training adds, but biases, trained where they
// are.
int64_t all_parameters(int64_t base, TrainOptions::Method method,
                       const std::vector<ParameterBuffer::Entry>& trained);

// The trained leaves in model order, with their names; requires_grad is set on all of them. With
// LoRA+ those that learn at the rate of B come last, so that the optimizer has two pieces to
// update.
std::vector<std::pair<std::string, Variable>> trained_leaves(Decoder& model,
                                                             TrainOptions::Method method,
                                                             double loraplus_lr_ratio = 1);

// Everything that the trained bytes depend on: the keys of the options, data, model, adapter.
std::vector<std::pair<std::string, std::string>> run_result_keys(const TrainOptions& options,
                                                                 const std::string& model_dir,
                                                                 const TrainData& data);

// The adapter; with method full the weights and the files of model_dir that belong to them.
void save_model(Decoder& model, const TrainOptions& options, const std::string& model_dir,
                const std::string& folder);

}  // namespace graft
