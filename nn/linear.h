// Linear layer y = x W^T + b, to which a LoRA adapter may be attached, and frozen ones beside it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "autograd/ops.h"
#include "nn/module.h"

namespace graft {

// The low-rank pair of one linear layer. A (r, in), B (out, r): F32 leaves.
struct LoraPair {
  Variable a;
  Variable b;
  Variable magnitude;       // DoRA: (out) F32 leaf, the lengths of the rows; else undefined
  Tensor weight_squares;    // DoRA: (out) F32, |W_n|^2
  Tensor norm;              // DoRA: (out) F32, |W_n + scaling B_n A|, kept up to date by nn/dora.h
  Tensor start_a, start_b;  // PiSSA, OLoRA: F32 on the CPU, what A and B were when scaling B A was
                            // taken out of the weight; else undefined
  double scaling = 1;       // lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
  double dropout_p = 0;
  uint32_t module =
      0;  // number of this layer among the adapted ones, in model order: keys its dropout
};

// A frozen adapter of a layer: it turns W into W + weight (W' - W), W' being what it makes of W
// when it is alone.
struct StackedAdapter {
  int64_t id = 0;  // of the adapter, the same in all its layers (models/adapter_stack.h)
  LoraPair pair;
  double weight = 1;
};

struct Linear {
  Variable weight;                    // (out, in), in the dtype of the file
  Variable bias;                      // (out) or undefined
  std::unique_ptr<LoraPair> lora;     // the one that is trained; null: none attached
  std::vector<StackedAdapter> stack;  // whoever changes it calls restack()

  // Makes one pair of the whole stack, so that any number of adapters costs two narrow products.
  void restack();
  Variable forward(const Variable& x, const ForwardContext& context) const;
  // What is added to W x, as pairs: the trained adapter, and the stack. For a layer whose product
  // is part of another op; DoRA is no sum and has no place there.
  std::vector<ops::LoraArguments> added_pairs(const ForwardContext& context) const;
  void visit(const std::string& prefix, Visitor& visitor);
  int64_t in_features() const { return weight.shape()[1]; }
  int64_t out_features() const { return weight.shape()[0]; }

 private:
  Variable stacked_forward(const Variable& x) const;
  Variable add_stacked(const Variable& y, const Variable& x) const;

  // The sum of the stack (nn/stack.cpp): a pair, undefined where the sum is nothing, and with DoRA
  // what the columns of W x are multiplied by, and that less one.
  LoraPair stacked_;
  ops::DoraFactor stacked_rows_, stacked_excess_;
};

// swiglu of what both layers give for x.
Variable swiglu_of(const Linear& gate_proj, const Linear& up_proj, const Variable& x,
                   const ForwardContext& context);

struct RmsNorm {
  Variable weight;  // (H)
  double eps = 1e-6;
  Variable forward(const Variable& x) const { return ops::rms_norm(x, weight, eps); }
  void visit(const std::string& prefix, Visitor& visitor);
};

// Rows of an embedding that are trained by themselves, PEFT's trainable_token_indices. Beside the
// frozen weight they are a pair: B has a one where the row of an id and its column meet, and A is
// what each row has become less what the base has.
struct TokenRows {
  std::vector<int64_t> ids;
  Variable rows;      // (n, H) F32 leaf
  Tensor minus_base;  // (n, H) F32
  Tensor places;      // (vocabulary, n) F32, the B of the pair
  ops::LoraArguments pair() const;
};

// The weight is (vocabulary, H). An adapter makes W + scaling B A of it as it does of a linear
// layer's, so that B is (vocabulary, r) and A (r, H); in files PEFT has the transposed ones, A for
// B and B for A (models/adapter_file.h). Dropout leaves it alone, as in PEFT.
struct Embedding : Linear {
  std::optional<TokenRows> tokens;

  // Begins with the base's rows. Throws Error for an id that the weight has no row for.
  void train_tokens(const std::vector<int64_t>& ids);
  Variable forward(const Tensor& ids, DType dtype) const;
  void visit(const std::string& prefix, Visitor& visitor);
};

}  // namespace graft
