#include "nn/parameter_buffer.h"

#include "tensor/blockwise8.h"
#include "tensor/system_memory.h"

namespace graft {
namespace {
constexpr int64_t kAlign = 16;           // elements: 64 bytes
constexpr int64_t kLeastIn8Bits = 4096;  // elements of a leaf, as bitsandbytes has it

// As transformers' Trainer has it: biases and norms are spared.
bool has_weight_decay(const std::string& name) {
  return name.find("bias") == std::string::npos && name.find("norm") == std::string::npos;
}
}  // namespace

// Offsets of all leaves; returns the length of the buffer. In 8 bits a block of 256 with its scale
// lies within a leaf, so that each begins at a multiple of that.
int64_t ParameterBuffer::lay_out(std::vector<std::pair<std::string, Variable>>& leaves,
                                 Moments moments) {
  const int64_t align = moments == Moments::Bits8 ? kBlock8 : kAlign;
  int64_t total = 0;
  for (auto& [name, variable] : leaves) {
    CHECK(variable.requires_grad() && variable.is_leaf(), "parameter buffer: ", name,
          " is not a leaf that requires a gradient");
    const int64_t elements = variable.value().num_elements();
    const bool in_8_bits = moments == Moments::Bits8 && elements >= kLeastIn8Bits;
    const int64_t room = (elements + align - 1) / align * align;
    entries_.push_back({name, variable, total, in_8_bits, state_elements_[in_8_bits]});
    total += room;
    state_elements_[in_8_bits] += room;
  }
  return total;
}

ParameterBuffer::ParameterBuffer(std::vector<std::pair<std::string, Variable>> leaves,
                                 Device device, Scope scope, Moments moments) {
  const int64_t total = lay_out(leaves, moments);
  CHECK(total > 0, "parameter buffer: nothing to train");
  if (device == Device::CPU) {
    const int64_t in_f32 = state_elements_[0], in_8_bits = state_elements_[1];
    check_memory(8 * (total + in_f32) + 2 * (in_8_bits + 4 * num_blocks8(in_8_bits)),
                 concat("training ", total, " parameters (value, gradient, m and v of each",
                        in_8_bits > 0 ? ", these two in 8 bits)" : ")"),
                 in_8_bits > 0 ? "train fewer: a smaller r, fewer target_modules, or method lora"
                               : "train fewer (a smaller r, fewer target_modules, or method lora), "
                                 "or take optim adamw_8bit");
  }
  values_ = Tensor::zeros({total}, DType::F32, device, scope);
  gradients_ = Tensor::zeros({total}, DType::F32, device, Scope::Optimizer);
  const auto zeros = [&](int64_t elements, DType dtype) {
    return Tensor::zeros({elements}, dtype, device, Scope::Optimizer);
  };
  if (const int64_t n = state_elements_[0]; n > 0) {
    m_ = zeros(n, DType::F32);
    v_ = zeros(n, DType::F32);
  }
  if (const int64_t n = state_elements_[1]; n > 0) {  // a scale of 0 makes any code a 0
    m8_ = {zeros(n, DType::U8), zeros(num_blocks8(n), DType::F32)};
    v8_ = {zeros(n, DType::U8), zeros(num_blocks8(n), DType::F32)};
  }
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

bool ParameterBuffer::has_rate_of_b(const std::string& name, const Variable& variable) {
  return name.find("lora_B") != std::string::npos || variable.value().rank() == 1;
}

void ParameterBuffer::step(const AdamWStep& adamw, double max_grad_norm) {
  update(adamw, max_grad_norm);
  publish();
}

void ParameterBuffer::update(const AdamWStep& adamw, double max_grad_norm) {
  Backend& backend = backend_of(gradients_);
  Tensor squares = outcome_.slice_rows(1, 2);
  backend.sum_of_squares(squares, gradients_);
  backend.clip_factor(outcome_, max_grad_norm);
  // Neighbours that are treated alike are one piece of the buffer.
  const auto alike = [&](const Entry& a, const Entry& b) {
    return a.in_8_bits == b.in_8_bits &&
           (adamw.lr_ratio == 1 ||
            has_rate_of_b(a.name, a.variable) == has_rate_of_b(b.name, b.variable)) &&
           (adamw.weight_decay == 0 || has_weight_decay(a.name) == has_weight_decay(b.name));
  };
  const auto update_all = [&](bool in_8_bits) {
    for (size_t first = 0, last; first < entries_.size(); first = last) {
      last = first + 1;
      while (last < entries_.size() && alike(entries_[first], entries_[last])) ++last;
      AdamWStep run = adamw;
      const Entry& entry = entries_[first];
      if (entry.in_8_bits != in_8_bits) continue;
      if (!has_weight_decay(entry.name)) run.weight_decay = 0;
      run.for_b = adamw.lr_ratio != 1 && has_rate_of_b(entry.name, entry.variable);
      update_entries(first, last, run);
    }
  };
  update_all(true);  // first: its first kernel asks for memory, for the table of codes
  update_all(false);
}

// Entries [first, last), which are of one kind.
void ParameterBuffer::update_entries(size_t first, size_t last, const AdamWStep& adamw) {
  const Entry& entry = entries_[first];
  const int64_t begin = entry.offset;
  const int64_t end = last < entries_.size() ? entries_[last].offset : num_elements();
  const int64_t at = entry.state_offset, to = at + end - begin;
  Tensor values = values_.slice_rows(begin, end);
  const Tensor gradients = gradients_.slice_rows(begin, end);
  const Tensor factor = outcome_.slice_rows(2, 3);
  Backend& backend = backend_of(gradients_);
  if (!entry.in_8_bits) {
    Tensor m = m_.slice_rows(at, to), v = v_.slice_rows(at, to);
    return backend.adamw(values, m, v, gradients, factor, adamw);
  }
  const auto part = [&](const State8& whole) {
    return State8{whole.codes.slice_rows(at, to),
                  whole.absmax.slice_rows(at / kBlock8, to / kBlock8)};
  };
  State8 m = part(m8_), v = part(v8_);
  backend.adamw_8bit(values, m, v, gradients, factor, adamw);
}

std::vector<std::pair<std::string, Tensor>> ParameterBuffer::state() const {
  std::vector<std::pair<std::string, Tensor>> all{{"values", values_}};
  const auto add = [&](const char* name, const Tensor& tensor) {
    if (tensor.defined()) all.emplace_back(name, tensor);
  };
  add("m", m_);
  add("v", v_);
  add("m_8bit", m8_.codes);
  add("m_8bit_absmax", m8_.absmax);
  add("v_8bit", v8_.codes);
  add("v_8bit_absmax", v8_.absmax);
  return all;
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
