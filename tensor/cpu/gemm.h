// The CPU's matrix product, Backend::gemm of cpu_backend. Weights are read as they lie in the file,
// row-major, and packed on the fly; see gemm.cpp for the blocking and kernels/gemm_kernels.cpp for
// the inner loops.
#pragma once

#include <cstdint>
#include <span>

#include "tensor/backend.h"
#include "tensor/cpu/cpu_info.h"
#include "tensor/thread_pool.h"

namespace graft {

struct GemmKernels;  // tensor/cpu/kernels/gemm_kernels.h

// c (M, N) = addend + bias + sum of the terms, as Backend::gemm says. c F32 or BF16; a and b F32,
// BF16 or F16. The bytes of c depend on the instruction set, and on nothing else but the arguments.
void cpu_gemm(Tensor& c, std::span<const GemmTerm> terms, const Tensor& addend, const Tensor& bias);

// The same with a given instruction set and pool, for tests and benchmarks.
void cpu_gemm(const GemmKernels& kernels, ThreadPool& pool, Tensor& c,
              std::span<const GemmTerm> terms, const Tensor& addend, const Tensor& bias);

// The most bytes of Scope::Scratch that products keep between calls with so many threads.
int64_t gemm_scratch_bytes(int threads);

// The inner loops of an instruction set. wide16 is AVX-512's tile shape under AVX2 instructions;
// wide16_amx besides has AMX's tiles in plain C++, slow, for tests.
const GemmKernels& gemm_kernels(CpuPath path);
const GemmKernels& gemm_kernels_wide16();
const GemmKernels& gemm_kernels_wide16_amx();

}  // namespace graft
