#include "nn/parameter_buffer.h"

#include "tensor/system_memory.h"

namespace graft {
namespace {
constexpr int64_t kAlign = 16;  // elements: 64 bytes

// As transformers' Trainer has it: biases and norms are spared.
bool has_weight_decay(const std::string& name) {
  return name.find("bias") == std::string::npos && name.find("norm") == std::string::npos;
}
}  // namespace

ParameterBuffer::ParameterBuffer(std::vector<std::pair<std::string, Variable>> leaves,
                                 Device device, Scope scope) {
  int64_t total = 0;
  for (auto& [name, variable] : leaves) {
    CHECK(variable.requires_grad() && variable.is_leaf(), "parameter buffer: ", name,
          " is not a leaf that requires a gradient");
    entries_.push_back({name, variable, total});
    total += (variable.value().num_elements() + kAlign - 1) / kAlign * kAlign;
  }
  CHECK(total > 0, "parameter buffer: nothing to train");
  if (device == Device::CPU)
    check_memory(total * 4 * int64_t(sizeof(float)),
                 concat("training ", total, " parameters (value, gradient, m and v of each)"),
                 "train fewer: a smaller r, fewer target_modules, or method lora");
  values_ = Tensor::zeros({total}, DType::F32, device, scope);
  gradients_ = Tensor::zeros({total}, DType::F32, device, Scope::Optimizer);
  m_ = Tensor::zeros({total}, DType::F32, device, Scope::Optimizer);
  v_ = Tensor::zeros({total}, DType::F32, device, Scope::Optimizer);
  outcome_ = Tensor::zeros({3}, DType::F64, device, Scope::Optimizer);
  for (auto& entry : entries_) {
    const Tensor value = entry.variable.value();
    const int64_t end = entry.offset + value.num_elements();
    Tensor master = values_.slice_rows(entry.offset, end).reshape(value.shape());
    backend_of(device).copy(master, value);
    if (value.dtype() == DType::F32)
      entry.variable.set_value(master);
    else if (value.storage()->is_borrowed())  // a mapped file can't be written to
      entry.variable.set_value(value.clone(scope));
    entry.variable.set_grad(gradients_.slice_rows(entry.offset, end).reshape(value.shape()));
  }
}

void ParameterBuffer::begin_step() {
  backend_of(gradients_).fill(gradients_, 0);
  backend_of(gradients_).fill(outcome_, 0);
}

void ParameterBuffer::add_loss(const Tensor& loss) {
  Tensor total = outcome_.slice_rows(0, 1);
  backend_of(gradients_).add_sum(total, loss, 1);
}

ParameterBuffer::Outcome ParameterBuffer::outcome() const {
  const std::vector<double> values = outcome_.to_doubles();
  return {values[0], values[1]};
}

void ParameterBuffer::step(const AdamWStep& adamw, double max_grad_norm) {
  Backend& backend = backend_of(gradients_);
  Tensor squares = outcome_.slice_rows(1, 2);
  backend.sum_of_squares(squares, gradients_);
  backend.clip_factor(outcome_, max_grad_norm);
  const Tensor factor = outcome_.slice_rows(2, 3);
  for (size_t first = 0, last; first < entries_.size(); first = last) {
    const bool decays = has_weight_decay(entries_[first].name);
    AdamWStep run = adamw;
    if (!decays) run.weight_decay = 0;
    last = first + 1;
    while (last < entries_.size() &&
           (adamw.weight_decay == 0 || has_weight_decay(entries_[last].name) == decays))
      ++last;
    const int64_t begin = entries_[first].offset;
    const int64_t end = last < entries_.size() ? entries_[last].offset : num_elements();
    Tensor values = values_.slice_rows(begin, end), m = m_.slice_rows(begin, end),
           v = v_.slice_rows(begin, end);
    backend.adamw(values, m, v, gradients_.slice_rows(begin, end), factor, run);
  }
  publish();
}

void ParameterBuffer::publish() {
  for (auto& entry : entries_) {
    Tensor working = entry.variable.value();
    if (working.dtype() == DType::F32) continue;  // a view of values_
    const int64_t end = entry.offset + working.num_elements();
    backend_of(values_).copy(working,
                             values_.slice_rows(entry.offset, end).reshape(working.shape()));
  }
  if (follow_) follow_();
}

}  // namespace graft
