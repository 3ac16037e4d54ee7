// What one optimizer step reads: the ids, positions and labels of its micro-batches, side by side
// in one tensor, so that all of them reach the GPU by one copy.
#pragma once

#include "models/decoder.h"
#include "train/dataset.h"

namespace graft {

struct StepInputs {
  std::vector<PackedBatch> batches;  // slices of memory; cu_seqlens on the CPU
  Tensor memory;                     // I32
  int64_t num_tokens = 0;
  int64_t num_label_tokens = 0;
};

// The micro-batches are lists of rows of the dataset. On the CPU. Throws Error for a label outside
// the vocabulary.
StepInputs step_inputs(const Dataset& dataset,
                       const std::vector<std::vector<int64_t>>& micro_batches, int64_t vocabulary);

// The same with the memory on a device; returned as they are where they lie there already.
StepInputs to_device(const StepInputs& inputs, Device device);

// All that the shapes in a step follow from: the lengths of the rows and the number of labels of
// each micro-batch. Two steps of one signature differ in values alone.
std::vector<int32_t> signature(const StepInputs& inputs);

}  // namespace graft
