#include "train/step_inputs.h"

#include <cstring>

namespace graft {
namespace {

// The tensors of a batch that lie in the memory of its step.
std::vector<Tensor*> parts(PackedBatch& batch) {
  return {&batch.input_ids, &batch.positions, &batch.labelled.rows, &batch.labelled.labels};
}

int64_t padded(const Tensor& part) { return (part.num_elements() + 15) / 16 * 16; }  // 64 bytes

// Makes every part the slice of inputs.memory that it has there.
void slice_memory(StepInputs& inputs) {
  int64_t begin = 0;
  for (PackedBatch& batch : inputs.batches)
    for (Tensor* part : parts(batch)) {
      const Tensor slice = inputs.memory.slice_rows(begin, begin + part->num_elements());
      begin += padded(*part);
      *part = slice;
    }
}

PackedBatch pack_rows(const Dataset& dataset, const std::vector<int64_t>& rows) {
  std::vector<std::vector<int32_t>> ids, labels;
  for (int64_t row : rows) {
    ids.push_back(dataset.rows[size_t(row)].ids);
    labels.push_back(dataset.rows[size_t(row)].labels);
  }
  return pack(ids, labels);
}

}  // namespace

StepInputs step_inputs(const Dataset& dataset,
                       const std::vector<std::vector<int64_t>>& micro_batches, int64_t vocabulary) {
  StepInputs inputs;
  int64_t elements = 0;
  for (const auto& rows : micro_batches) {
    PackedBatch batch = pack_rows(dataset, rows);
    batch.labelled = ops::labelled_rows(batch.labels, vocabulary);
    batch.labels = Tensor();
    inputs.num_tokens += batch.num_tokens();
    inputs.num_label_tokens += batch.labelled.rows.size(0);
    for (Tensor* part : parts(batch)) elements += padded(*part);
    inputs.batches.push_back(std::move(batch));
  }
  const StepInputs apart = inputs;
  inputs.memory = Tensor::zeros({elements}, DType::I32);
  slice_memory(inputs);
  for (size_t i = 0; i < inputs.batches.size(); ++i) {
    PackedBatch from = apart.batches[i];
    const auto source = parts(from), target = parts(inputs.batches[i]);
    for (size_t k = 0; k < source.size(); ++k)
      if (source[k]->num_elements() > 0)
        std::memcpy(target[k]->raw(), source[k]->raw(), size_t(source[k]->num_bytes()));
  }
  return inputs;
}

StepInputs to_device(const StepInputs& inputs, Device device) {
  StepInputs moved = inputs;
  if (device == Device::CPU) return moved;
  moved.memory = inputs.memory.to(device);
  slice_memory(moved);
  return moved;
}

std::vector<int32_t> signature(const StepInputs& inputs) {
  std::vector<int32_t> all;
  for (const PackedBatch& batch : inputs.batches) {
    const int32_t* cu = batch.cu_seqlens.data<int32_t>();
    all.push_back(int32_t(batch.cu_seqlens.num_elements()));
    all.insert(all.end(), cu, cu + batch.cu_seqlens.num_elements());
    all.push_back(int32_t(batch.labelled.rows.num_elements()));
  }
  return all;
}

}  // namespace graft
