// PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024), as PEFT has them: A and B begin as a
// part of the weight, and what is frozen under them is the residual W - scaling B A. nn/lora.h
// attaches, models/low_rank.h takes matrices apart.
#pragma once

#include <utility>

#include "models/decoder.h"
#include "nn/lora.h"

namespace graft {

// Fills the pairs that attach_lora left empty and takes scaling B A out of their weights, so that
// the model computes what it did before, but for one rounding of each weight:
//   PiSSA  B A is the part of the r largest singular values, which are divided by scaling and
//   shared
//          by their square roots
//   OLoRA  W = Q R: B the first r columns of Q, A the first r rows of R
// The residual has the dtype that the model computes in. The same base and seed (which the
// randomised SVD alone takes) give the same bytes on any device and for any number of threads, so a
// resumed run makes its base again. Throws Error where r is larger than a side of a weight.
void take_out_adapters(Decoder& model, const LoraConfig& config, uint64_t seed);

// What was trained over residuals, for the base as its files have it: the difference
// scaling (B A - B0 A0) as one pair of rank 2 r, A' = [A; A0] and B' = [B, -B0]. Any other config
// or pair comes back as it is.
LoraConfig for_untouched_base(LoraConfig config);
std::pair<Tensor, Tensor> factors_for_untouched_base(const LoraPair& pair);

}  // namespace graft
