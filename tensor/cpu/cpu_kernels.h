// The inner loops of the fast CPU kernels, as a table of functions: one table per instruction set,
// all compiled from the same sources (cpu/kernels/*.cpp) with other flags. cpu_backend.cpp
// cuts the work into pieces for the thread pool and calls these on a piece.
//
// A file in cpu/kernels/ is compiled once per instruction set into namespace GRAFT_ISA (portable,
// avx2, avx512, avx512_bf16, and wide16, which is the shape of the last under AVX2 flags so that
// its logic is tested everywhere; the matrix product also for amx). It includes nothing that
// instantiates library templates: such code would be shared between the objects by the linker, and
// could run AVX-512 on a machine without it.
#pragma once

#include <cstdint>

#include "tensor/cpu/cpu_info.h"
#include "tensor/dtype.h"

namespace graft {

struct CpuKernels;  // tensor/cpu/kernels/table.h

const CpuKernels& cpu_kernels(CpuPath path);
const CpuKernels& cpu_kernels();         // of cpu_choice()
const CpuKernels& cpu_kernels_wide16();  // for tests

}  // namespace graft
