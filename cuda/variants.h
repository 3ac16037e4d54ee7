// Every rung of every ladder by name: what tests/cuda/ladder_test.cpp checks against the CPU's
// plain loops, and what bench/cuda_ladder.cpp times and lists in cuda/README.md. A new rung is one
// row of the table in variants.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tensor/tensor.h"

namespace graft {

struct LadderRung {
  int number;            // the argument `rung` or `variant` of the family's host function
  const char* name;      // two or three words
  const char* sentence;  // what is new in it
  const char* source;    // the file with the kernel
  const char* kernel;    // how the demangled name of its main kernel ends, before "(": one instance
};

// Inputs and outputs of one call, on the CPU as they are made; on_device moves them.
struct LadderProblem {
  std::vector<Tensor> inputs;
  std::vector<Tensor> host_inputs;  // which stay on the CPU
  std::vector<Tensor> outputs;      // with what they hold before the call
};
LadderProblem on_device(const LadderProblem& problem);

// The least that a call must do.
struct LadderCosts {
  double bytes;  // inputs read once, outputs written once
  double flop;   // that the equations ask for
};

struct LadderFamily {
  const char* name;
  const char* equation;
  const char* dimensions;  // names of the sizes, in order
  std::vector<int64_t> bench_sizes;
  std::vector<int64_t> small_sizes;  // no ragged edges; small enough to emulate
  std::vector<LadderRung> rungs;

  LadderCosts (*costs)(const std::vector<int64_t>& sizes);
  // Values from a fixed seed; needs no GPU.
  LadderProblem (*make)(const std::vector<int64_t>& sizes);
  // On the CPU, by tensor/cpu/reference.
  void (*reference)(LadderProblem& problem);
  // On the device; asynchronous.
  void (*run)(int rung, LadderProblem& problem, cudaStream_t stream);
  // What the backend does for the same equation, where a library does it; null elsewhere.
  void (*library)(LadderProblem& problem);
  const char* library_name;
};

std::vector<LadderFamily> ladder_families();

}  // namespace graft
