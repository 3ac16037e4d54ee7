// All trainable state in one flat buffer: F32 values (the master copy), gradients, and AdamW's m
// and v, which may be kept in 8 bits. Zeroing, clipping and the optimizer step are one kernel each,
// and resuming is a few tensors.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "autograd/variable.h"
#include "tensor/backend.h"

namespace graft {

class ParameterBuffer {
 public:
  struct Entry {
    std::string name;  // "model.layers.0.self_attn.q_proj.lora_A"
    Variable variable;
    int64_t offset = 0;  // elements from the start of the buffer
    // Of m and v, and where they lie among those of their kind.
    bool in_8_bits = false;
    int64_t state_offset = 0;
  };
  enum class Moments { F32, Bits8 };

  // Takes over the leaves: their values are moved into the buffer (an F32 leaf becomes a view of
  // it; another dtype keeps its working copy, refreshed by publish()), and their gradients become
  // views of it. With Bits8 m and v take a byte an element and a scale for 256 of one leaf
  // (bitsandbytes' AdamW8bit), but for leaves of fewer than 4096 elements, where it saves nothing.
  ParameterBuffer(std::vector<std::pair<std::string, Variable>> leaves, Device device, Scope scope,
                  Moments moments = Moments::F32);

  int64_t num_elements() const { return values_.num_elements(); }
  const std::vector<Entry>& entries() const { return entries_; }

  // A step: begin_step, then add_loss for every micro-batch, then step. None of them waits for the
  // device; outcome() does.
  void begin_step();                  // zeroes the gradients and the loss
  void add_loss(const Tensor& loss);  // one element
  // Clips to max_grad_norm (0: no clipping) with torch's clip_grad_norm_ rule, then AdamW; nothing
  // changes where the loss or the norm is not finite. Weight decay spares parameters with "bias" or
  // "norm" in their name, as the transformers Trainer does. With LoRA+ (adamw.lr_ratio) B and the
  // vectors, such as DoRA's m, have the rate of B, as PEFT's create_loraplus_optimizer has it.
  void step(const AdamWStep& adamw, double max_grad_norm);  // update(), publish()
  void update(const AdamWStep& adamw, double max_grad_norm);
  struct Outcome {
    double loss;       // the sum of what add_loss got
    double grad_norm;  // L2 over all gradients, before clipping
  };
  Outcome outcome() const;
  static bool has_rate_of_b(const std::string& name, const Variable& variable);

  Tensor& values() { return values_; }  // flat F32, as the gradients are
  Tensor& gradients() { return gradients_; }
  Tensor& m() { return m_; }  // those that are F32
  Tensor& v() { return v_; }
  // What a checkpoint holds: the values, and all of m and v, by name.
  std::vector<std::pair<std::string, Tensor>> state() const;
  void publish();  // values -> working copies; after loading a checkpoint too
  // Called at the end of every publish(): what else is made from the values follows them.
  void on_publish(std::function<void()> follow) { follow_ = std::move(follow); }

 private:
  int64_t lay_out(std::vector<std::pair<std::string, Variable>>& leaves, Moments moments);
  void update_entries(size_t first, size_t last, const AdamWStep& adamw);

  std::vector<Entry> entries_;
  Tensor values_, gradients_;
  Tensor m_, v_;    // F32, of entries that are not in 8 bits; undefined where there are none
  State8 m8_, v8_;  // of those that are
  int64_t state_elements_[2] = {};  // F32, 8 bits
  Tensor outcome_;                  // (3) F64: loss, gradient norm, factor (Backend::clip_factor)
  std::function<void()> follow_;
};

}  // namespace graft
