// DoRA (Liu et al. 2024): what a layer needs beside its low-rank pair. ops::dora_linear has the
// equations, Backend::dora_norms the norm.
#pragma once

#include <vector>

#include "nn/linear.h"
#include "tensor/backend.h"

namespace graft {

// Makes the pair of a layer of this weight a DoRA one: a magnitude equal to the lengths of the rows
// of W + scaling B A, so that it changes nothing yet. a, b and scaling are set already. F32, where
// PEFT rounds the magnitude to the weight's dtype once.
void start_dora(LoraPair& pair, const Tensor& weight);

// Brings the norms of these layers up to date (those without DoRA are left alone): to be called
// after A or B has changed, which is after loading and after every optimizer step. It waits for
// nothing and allocates only scratch.
void refresh_dora(const std::vector<const Linear*>& layers);

// The same for pairs that hang elsewhere.
DoraNorm dora_norm_of(const LoraPair& pair, const Tensor& weight);

}  // namespace graft
