// The table of one instruction set.
#include "tensor/cpu/kernels/table.h"

#include "tensor/cpu/kernels/install.h"
#include "tensor/cpu/kernels/simd.h"

namespace graft::GRAFT_ISA {

CpuKernels make_table(const char* name) {
  CpuKernels kernels{};
  kernels.name = name;
  kernels.lanes = kLanes;
  install_elementwise(kernels);
  install_swiglu(kernels);
  install_dora(kernels);
  install_adamw(kernels);
  install_rms_norm(kernels);
  install_rope(kernels);
  install_qk_norm_rope(kernels);
  install_cross_entropy(kernels);
  install_dropout(kernels);
  install_attention(kernels);
  install_attention_backward(kernels);
  install_attention_decode(kernels);
  return kernels;
}

}  // namespace graft::GRAFT_ISA
