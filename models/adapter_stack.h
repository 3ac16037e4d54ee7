// Frozen adapters on a loaded model: any number of them, each with a weight. The model computes
// with W + sum_i weight_i (W'_i - W), W'_i being what adapter i alone makes of a weight W. Biases
// and whole modules that an adapter has of its own stand in the place of the base's while it is on;
// one adapter may have those of a name, with a weight of 1. Attaching, detaching and weighing touch
// the adapters alone: the base stays where it is, so switching costs what reading the adapter
// costs, or nothing.
#pragma once

#include <string>
#include <vector>

#include "models/adapter.h"

namespace graft {

class AdapterStack {
 public:
  // Starts with what is stacked on the model already being nothing; one stack for each model.
  explicit AdapterStack(Decoder& model) : model_(model) {}

  // Reads the adapter as load_adapter does and puts it on top; the number that it is known by.
  // Throws Error for what load_adapter refuses, and the stack is as it was.
  int64_t attach(const std::string& directory, double weight = 1, const AdapterChecks& checks = {});
  // The same of what read_adapter gave.
  int64_t put_on(const AdapterFile& file, double weight = 1, const AdapterChecks& checks = {});
  // 0 turns the adapter off without forgetting it.
  void set_weight(int64_t id, double weight);
  void detach(int64_t id);

 private:
  template <class Change>
  void change(int64_t id, Change change);
  Decoder& model_;
  int64_t next_id_ = 1;
};

// An adapter and its weight, as people write them: "DIR" or "DIR:0.5".
struct AdapterChoice {
  std::string directory;
  double weight = 1;
};
// What follows the last colon is a weight if it is a number and what stands before it exists, while
// the whole does not: a path may have colons in it.
AdapterChoice parse_adapter_choice(const std::string& text);

}  // namespace graft
