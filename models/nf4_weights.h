// NF4 weights of a model: those that bitsandbytes has quantised and transformers has saved, and
// those that are quantised here.
#pragma once

#include <functional>
#include <string>

#include "models/decoder.h"
#include "nn/lora.h"

namespace graft {

// What load_model is to do with the weights of linear layers, lm_head excepted (as transformers
// does it; embeddings, norms and biases stay as they are too).
struct Quantisation {
  bool load_in_4bit = false;  // NF4; else as the files have them
  bool double_quant = true;
};

// One weight as bitsandbytes saves it: `NAME` has the codes, U8, and NAME.absmax, .quant_map,
// .quant_state.bitsandbytes__nf4 (JSON in U8), where scales are quantised too .nested_absmax and
// .nested_quant_map, say how to read them. tensor/nf4.h has the layout that they get here.
class BitsandbytesWeight {
 public:
  // What a checkpoint knows of a tensor by its name.
  struct Files {
    std::function<bool(const std::string& name)> has;
    std::function<Tensor(const std::string& name)> tensor;
    std::function<std::string(const std::string& name)> path;  // of the file that holds it
  };
  // Whether `name` is quantised. Throws Error for what is and cannot be read: int8, fp4, or a
  // weight whose state is missing.
  static bool is_there(const Files& files, const std::string& name);

  // Checks all parts against each other and `shape`; an Error is one line with the file and what
  // was wanted.
  BitsandbytesWeight(const Files& files, const std::string& name, Shape shape);
  Tensor load() const;                                              // on the CPU
  const std::vector<std::string>& parts() const { return parts_; }  // names, the codes' first
  int64_t num_bytes() const;

 private:
  Tensor part(const std::string& suffix, DType dtype, int64_t elements);
  void read_state(const Tensor& text);

  const Files& files_;
  std::string name_;
  Shape shape_;
  bool nested_ = false;
  float offset_ = 0;
  std::vector<std::string> parts_;
  Tensor codes_, absmax_, scales_, map_;  // in the mapped files
};

// The weights of a model in memory (random ones), as load_model would have quantised them.
void quantise_model(Decoder& model, bool double_quant);

// Whether any weight is NF4.
bool has_nf4_weights(Decoder& model);

}  // namespace graft
