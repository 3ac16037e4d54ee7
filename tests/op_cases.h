// The table of differentiable ops. A row per op yields its tests (op_test.cpp): gradient against
// finite differences, fast against reference, every needs mask, bytes live, inputs unchanged,
// threads. To add an op: declare it in autograd/ops.h, write it, add a row in op_cases.cpp.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "autograd/ops.h"

namespace graft {

// What an input is decides its dtype: activations and weights vary, adapters are F32 (F64 in F64).
enum class InputKind { Activation, Weight, Adapter };

struct OpInput {
  InputKind kind;
  Shape shape;
};

struct OpDtypes {
  DType activation, weight;
};

struct OpCase {
  std::string name;
  std::vector<OpInput> inputs;
  // Runs the op on the inputs, in order; dtype is that of activations.
  std::function<Variable(const std::vector<Variable>& inputs, DType dtype)> run;
};

// T tokens, H hidden, N out features, D head_dim, V vocabulary, r rank.
struct OpSizes {
  int64_t T, H, N, r, heads, kv_heads, D, V;
};

std::vector<OpCase> op_cases(const OpSizes& sizes);

// For element-by-element finite differences; sizes that no vector divides; several tiles of each.
constexpr OpSizes kTinySizes{5, 6, 4, 2, 4, 2, 4, 7};
constexpr OpSizes kRaggedSizes{37, 51, 43, 3, 6, 3, 10, 61};
constexpr OpSizes kWideSizes{301, 520, 99, 16, 4, 1, 64, 515};

// A tensor of normal random numbers, the same for the same arguments.
Tensor random_tensor(Shape shape, DType dtype, uint64_t seed, double stddev = 1);

// Documents of T tokens: one of a single token, one empty, and the rest in two.
Tensor make_cu_seqlens(int64_t T);

// The leaves of a case, deterministic; requires_grad by mask (bit i: input i).
std::vector<Variable> make_inputs(const OpCase& op, const OpDtypes& dtypes, uint64_t mask);

}  // namespace graft
