// Linear layers that share their input, merged into one product on the GPU (autograd/ops.h has the
// layouts): q, k and v; gate and up.
#pragma once

#include <vector>

#include "nn/linear.h"
#include "tensor/backend.h"

namespace graft {

// How the products of a layer lie: one by one (Plain), base weights of q, k, v and of gate, up in
// one (Merged), or those with the low-rank products inside (Bordered).
enum class LoraLayout { Plain, Merged, Bordered };

class LinearGroup {
 public:
  // Moves the weights of `layers` into one buffer, of which they become views: names, files and
  // the layers themselves stay as they are. Adapters are attached already; the group shares them.
  //   bordered     where a layer has an adapter, and no adapter has dropout
  //   wide_output  ops::LoraGroup
  LinearGroup(const std::vector<Linear*>& layers, bool bordered, bool wide_output);

  // (T, sum of out_features). x should have spare_cols() spare columns.
  Variable forward(const Variable& x, const ForwardContext& context) const;
  int64_t spare_cols() const { return group_.bordered.defined() ? ops::border_columns(group_) : 0; }
  // What brings the border up to date after the adapters have changed (Backend::copy_scaled).
  void add_border_copies(std::vector<ScaledCopy>& copies) const;

 private:
  void move_weights(const std::vector<Linear*>& layers, int64_t border);
  void move_biases(const std::vector<Linear*>& layers);
  ops::LoraGroup group_;
};

}  // namespace graft
