// Parameters of the base that an adapter has its own of, in whose place they stand while it is on
// the model: biases (`bias`) and whole modules (`modules_to_save`). They are trained beside A and
// B, and written and read with them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "models/decoder.h"
#include "nn/lora.h"

namespace graft {

// Those that this config asks for, with their shapes, in the model's order; the pairs are attached
// already.
// Throws Error for an entry of modules_to_save that matches nothing, or another module than
// embeddings, head or norms.
std::vector<std::pair<std::string, Shape>> replaced_parameters(Decoder& model,
                                                               const LoraConfig& config);

// Puts `own`, a leaf to be trained, in the place of a parameter: brought to the model's device, and
// where it is a matrix to the dtype that the model computes in. Biases and norms are F32, whose
// small steps BF16 would lose (PEFT leaves all of them in the base's dtype).
void replace_parameter(Decoder& model, const std::string& name, const Tensor& own);

// Copies of the base's values for all that the config asks for: what training starts from.
void start_replaced_parameters(Decoder& model, const LoraConfig& config);

// Gives back the base's, of what one adapter (its number in AdapterStack, 0: the one that is
// trained) has put in their place, and forgets that adapter's.
void restore_parameters(Decoder& model, int64_t adapter = 0);

// Turns what an adapter of the stack has put there off and on again.
void show_replaced(Decoder& model, int64_t adapter, bool on);

// PEFT trains biases where they are, and whole modules as copies: these are additional parameters.
inline bool is_bias(const std::string& parameter) { return parameter.ends_with(".bias"); }

}  // namespace graft
