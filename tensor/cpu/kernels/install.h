// Each file of kernels fills its part of the table.
#pragma once

#include "tensor/cpu/kernels/table.h"

#ifndef GRAFT_ISA
#define GRAFT_ISA portable
#endif

namespace graft::GRAFT_ISA {

void install_elementwise(CpuKernels& kernels);
void install_swiglu(CpuKernels& kernels);
void install_dora(CpuKernels& kernels);
void install_adamw(CpuKernels& kernels);
void install_rms_norm(CpuKernels& kernels);
void install_rope(CpuKernels& kernels);
void install_qk_norm_rope(CpuKernels& kernels);
void install_cross_entropy(CpuKernels& kernels);
void install_dropout(CpuKernels& kernels);
void install_attention(CpuKernels& kernels);
void install_attention_backward(CpuKernels& kernels);
void install_attention_decode(CpuKernels& kernels);

}  // namespace graft::GRAFT_ISA
