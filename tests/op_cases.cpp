// The rows of the table of ops, and the random inputs they run on.
#include "tests/op_cases.h"

#include <cmath>

#include "tensor/backend.h"
#include "tensor/nf4.h"
#include "tensor/random.h"

namespace graft {

namespace {

constexpr InputKind kX = InputKind::Activation;
constexpr InputKind kW = InputKind::Weight;
constexpr InputKind kA = InputKind::Adapter;

using Inputs = std::vector<Variable>;

Tensor random_ids(int64_t n, int64_t below, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i) ids.push_back(int32_t(random.below(uint64_t(below))));
  return Tensor::from_ints({n}, ids);
}

// Two of three rows have a label, the first does not.
Tensor some_labels(int64_t T, int64_t V) {
  Tensor labels = random_ids(T, V, 77);
  for (int64_t t = 0; t < T; t += 3) labels.data<int32_t>()[t] = ops::kIgnoreLabel;
  return labels;
}

// (positions, D): cos in the first half, sin in the second, base 100.
Tensor rotary_table(int64_t positions, int64_t D, DType dtype) {
  std::vector<double> table;
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t c = 0; c < D; ++c) {
      const double angle = double(p) * std::pow(100.0, -2.0 * double(c % (D / 2)) / double(D));
      table.push_back(c < D / 2 ? std::cos(angle) : std::sin(angle));
    }
  return Tensor::from_floats({positions, D}, table, dtype == DType::F64 ? dtype : DType::F32);
}

ops::LoraArguments lora_of(const Inputs& in, double dropout_p) {
  ops::LoraArguments lora{in[in.size() - 2], in[in.size() - 1], 1.5, dropout_p, {}};
  lora.key = {.seed = 0x123456789abcdef0u, .step = 3, .module = 5, .first_row = 1000};
  return lora;
}

Variable run_lora(const Inputs& in, bool with_bias, double dropout_p) {
  return ops::lora_linear(in[0], in[1], with_bias ? in[2] : Variable(), lora_of(in, dropout_p));
}

// A frozen weight, (N, H).
Variable nf4_weight(const OpSizes& s, const Inputs& in, bool double_quant) {
  const Tensor dense = random_tensor({s.N, s.H}, DType::F32, 31, 1 / std::sqrt(double(s.H)));
  return Variable(nf4_quantise(dense, double_quant).to(in[0].value().device()));
}

// Three layers as q, k, v: the second has no adapter, the others differ in rank, scaling and, where
// there is dropout, mask. Weights are constants; borders are made from the adapters given.
ops::LoraGroup make_group(const Inputs& in, const OpSizes& s, DType dtype, bool bordered,
                          double dropout_p) {
  const Device device = in[0].value().device();
  const int64_t H = s.H, outs[] = {s.N, s.N / 2, s.N + s.N / 2};
  const int64_t N = outs[0] + outs[1] + outs[2];
  ops::LoraGroup group;
  group.weight = random_tensor({N, H}, dtype, 11, 1 / std::sqrt(double(H))).to(device);
  group.bias = random_tensor({N}, dtype, 12).to(device);
  for (int i = 0; i < 3; ++i) group.layers.push_back({outs[i], {}});
  group.layers[0].lora = {in[1], in[2], 1.5, dropout_p, {}};
  group.layers[2].lora = {in[3], in[4], 0.5, dropout_p, {}};
  for (uint32_t i : {0u, 2u})
    group.layers[i].lora.key = {.seed = 99, .step = 3, .module = 5 + i, .first_row = 1000};
  if (!bordered) return group;
  const int64_t R = ops::border_columns(group), r = in[1].shape()[0];
  Tensor whole = Tensor::zeros({N + R, H + R}, dtype, device);
  const auto put = [&](int64_t row, int64_t col, const Tensor& what, double alpha) {
    Tensor place = whole.slice_rows(row, row + what.size(0)).slice_cols(col, col + what.size(1));
    if (what.dtype() == DType::F32 && alpha != 1) {
      const ScaledCopy copy{place, what, alpha};
      backend_of(whole).copy_scaled({&copy, 1});
    } else {
      backend_of(whole).copy(place, what);
      if (alpha != 1) backend_of(whole).scale(place, place, alpha);
    }
  };
  put(0, 0, group.weight, 1);
  put(N, 0, in[1].value(), 1);
  put(N + r, 0, in[3].value(), 1);
  put(0, H, in[2].value(), 1.5);
  put(outs[0] + outs[1], H + r, in[4].value(), 0.5);
  group.bordered = whole;
  return group;
}

OpCase group_case(const std::string& name, const OpSizes& s, bool bordered, bool spare,
                  double dropout_p) {
  const int64_t r2 = s.r + 1;
  return {
      name,
      {{kX, {s.T, s.H}},
       {kA, {s.r, s.H}},
       {kA, {s.N, s.r}},
       {kA, {r2, s.H}},
       {kA, {s.N + s.N / 2, r2}}},
      [=](const Inputs& in, DType dtype) {
        ops::LoraGroup group = make_group(in, s, dtype, bordered, dropout_p);
        if (!spare) return ops::lora_linear_group(in[0], group);
        // As a layer has it: x from a norm, dy from SwiGLU, both with room for the rest.
        const int64_t columns = ops::border_columns(group);
        group.wide_output = true;
        const Variable ones(Tensor::from_floats({s.H}, std::vector<double>(size_t(s.H), 1.0), dtype)
                                .to(in[0].value().device()));
        const Variable x = ops::rms_norm(in[0], ones, 1e-6, columns);
        return ops::swiglu_merged(ops::lora_linear_group(x, group), columns);
      }};
}

// The lengths of rows that a DoRA layer is told: constants, not of the weight, for the op takes
// them as they come; one is 0, as of a row of zeros.
Tensor some_norms(int64_t N, const Variable& like) {
  const DType dtype = like.value().dtype() == DType::F64 ? DType::F64 : DType::F32;
  std::vector<double> norms = random_tensor({N}, DType::F64, 31).to_doubles();
  for (double& norm : norms) norm = 0.5 + std::abs(norm);
  norms[size_t(N / 2)] = 0;
  return Tensor::from_floats({N}, norms, dtype).to(like.value().device());
}

// Inputs x, then a bias where there is one, A, B, m. The weight is a constant.
OpCase dora_case(const std::string& name, const OpSizes& s, bool bias, double dropout_p) {
  std::vector<OpInput> inputs{{kX, {s.T, s.H}}};
  if (bias) inputs.push_back({kW, {s.N}});
  for (const Shape& shape : {Shape{s.r, s.H}, Shape{s.N, s.r}, Shape{s.N}})
    inputs.push_back({kA, shape});
  return {name, inputs, [=](const Inputs& in, DType dtype) {
            const Device device = in[0].value().device();
            const Variable weight(
                random_tensor({s.N, s.H}, dtype, 11, 1 / std::sqrt(double(s.H))).to(device));
            const size_t at = bias ? 2 : 1;
            ops::LoraArguments lora{in[at], in[at + 1], 1.5, dropout_p, {}};
            lora.key = {.seed = 7, .step = 3, .module = 5, .first_row = 1000};
            return ops::dora_linear(in[0], weight, bias ? in[1] : Variable(), lora,
                                    {in[at + 2], some_norms(s.N, in[at + 2])});
          }};
}

OpCase dora_swiglu_case(const std::string& name, const OpSizes& s, bool both) {
  std::vector<OpInput> inputs{{kX, {s.T, s.H}}, {kX, {s.T, s.H}}, {kA, {s.H}}};
  if (both) inputs.push_back({kA, {s.H}});
  return {name, inputs, [=](const Inputs& in, DType) {
            const ops::DoraFactor first{in[2], some_norms(s.H, in[2])};
            if (!both) return ops::dora_swiglu(in[0], in[1], {}, first);
            return ops::dora_swiglu(in[0], in[1], first, {in[3], some_norms(s.H, in[3])});
          }};
}

OpCase merged_attention_case(const std::string& name, const OpSizes& s, bool norm) {
  return {
      name, {{kX, {s.T, (s.heads + 2 * s.kv_heads) * s.D}}}, [=](const Inputs& in, DType dtype) {
        const Device device = in[0].value().device();
        ops::MergedHeads h;
        h.heads = s.heads;
        h.kv_heads = s.kv_heads;
        h.head_dim = s.D;
        if (norm) {
          h.q_norm = Variable(random_tensor({s.D}, dtype, 21).to(device));
          h.k_norm = Variable(random_tensor({s.D}, dtype, 22).to(device));
          h.eps = 1e-5;
        }
        h.positions = random_ids(s.T, 2 * s.T, 4);
        h.cos_sin = rotary_table(2 * s.T, s.D, dtype).to(device);
        h.cu_seqlens = make_cu_seqlens(s.T);
        h.scale = 1 / std::sqrt(double(s.D));
        return ops::attention_merged(in[0], h);
      }};
}

OpCase attention_case(const std::string& name, int64_t T, int64_t heads, int64_t kv_heads,
                      int64_t D) {
  return {name,
          {{kX, {T, heads, D}}, {kX, {T, kv_heads, D}}, {kX, {T, kv_heads, D}}},
          [T, D](const Inputs& in, DType) {
            return ops::attention(in[0], in[1], in[2], make_cu_seqlens(T),
                                  1 / std::sqrt(double(D)));
          }};
}

std::vector<OpCase> elementwise_cases(const OpSizes& s) {
  const int64_t T = s.T, H = s.H;
  return {
      {"add",
       {{kX, {T, H}}, {kX, {T, H}}},
       [](const Inputs& in, DType) { return ops::add(in[0], in[1]); }},
      {"add_to_itself",
       {{kX, {T, H}}},
       [](const Inputs& in, DType) { return ops::add(in[0], in[0]); }},
      {"reshape",
       {{kX, {T, H}}},
       [T, H](const Inputs& in, DType) {
         return ops::reshape(in[0], {T, 1, H});
       }},
      {"scale", {{kX, {T, H}}}, [](const Inputs& in, DType) { return ops::scale(in[0], -1.7); }},
      {"swiglu",
       {{kX, {T, H}}, {kX, {T, H}}},
       [](const Inputs& in, DType) { return ops::swiglu(in[0], in[1]); }},
      {"embedding",
       {{kW, {s.V, H}}},
       [T, s](const Inputs& in, DType dtype) {
         return ops::embedding(random_ids(T, s.V, 3), in[0], dtype);
       }},

      {"embedding_low_rank",
       {{kX, {T, s.H}}, {kA, {s.r, s.H}}, {kA, {s.V, s.r}}},
       [T, s](const Inputs& in, DType) {
         return ops::add_embedding_low_rank(in[0], random_ids(T, s.V, 3),
                                            {in[1], in[2], 0.7, 0, {}});
       }},
      {"rms_norm",
       {{kX, {T, H}}, {kW, {H}}},
       [](const Inputs& in, DType) { return ops::rms_norm(in[0], in[1], 1e-5); }},
      {"rms_norm_of_heads",
       {{kX, {T, s.heads, s.D}}, {kW, {s.D}}},
       [](const Inputs& in, DType) { return ops::rms_norm(in[0], in[1], 1e-6); }},
      {"rope",
       {{kX, {T, s.heads, s.D}}},
       [T, s](const Inputs& in, DType dtype) {
         return ops::rope(in[0], random_ids(T, 2 * T, 4),
                          rotary_table(2 * T, s.D, dtype).to(in[0].value().device()));
       }},
      {"qk_norm_rope",
       {{kX, {T, s.heads, s.D}}, {kW, {s.D}}},
       [T, s](const Inputs& in, DType dtype) {
         return ops::qk_norm_rope(in[0], in[1], 1e-6, random_ids(T, 2 * T, 4),
                                  rotary_table(2 * T, s.D, dtype).to(in[0].value().device()));
       }},
      {"qk_norm_rope_without_a_norm",
       {{kX, {T, s.heads, s.D}}},
       [T, s](const Inputs& in, DType dtype) {
         return ops::qk_norm_rope(in[0], {}, 1e-6, random_ids(T, 2 * T, 4),
                                  rotary_table(2 * T, s.D, dtype).to(in[0].value().device()));
       }},
  };
}

std::vector<OpCase> product_cases(const OpSizes& s) {
  const int64_t T = s.T, H = s.H, N = s.N, r = s.r, V = s.V;
  return {
      {"linear",
       {{kX, {T, H}}, {kW, {N, H}}},
       [](const Inputs& in, DType) { return ops::linear(in[0], in[1]); }},
      {"linear_with_bias",
       {{kX, {T, H}}, {kW, {N, H}}, {kW, {N}}},
       [](const Inputs& in, DType) { return ops::linear(in[0], in[1], in[2]); }},
      {"lora_linear",
       {{kX, {T, H}}, {kW, {N, H}}, {kA, {r, H}}, {kA, {N, r}}},
       [](const Inputs& in, DType) { return run_lora(in, false, 0); }},
      {"lora_linear_with_bias_and_dropout",
       {{kX, {T, H}}, {kW, {N, H}}, {kW, {N}}, {kA, {r, H}}, {kA, {N, r}}},
       [](const Inputs& in, DType) { return run_lora(in, true, 0.3); }},
      {"scale_columns",
       {{kX, {T, N}}},
       [N](const Inputs& in, DType dtype) {
         const DType adapter = dtype == DType::F64 ? dtype : DType::F32;
         const Device device = in[0].value().device();
         const Tensor m = random_tensor({N}, adapter, 33), norm = random_tensor({N}, adapter, 34);
         const Variable bias(random_tensor({N}, dtype, 35).to(device));
         return ops::scale_columns(in[0], {Variable(m.to(device)), norm.to(device)}, bias);
       }},
      {"add_low_rank",
       {{kX, {T, N}}, {kX, {T, H}}},
       [N, H, r](const Inputs& in, DType dtype) {
         const DType adapter = dtype == DType::F64 ? dtype : DType::F32;
         const Device device = in[0].value().device();
         const Tensor a = random_tensor({r, H}, adapter, 31, 1 / std::sqrt(double(H)));
         const Tensor b = random_tensor({N, r}, adapter, 32, 1 / std::sqrt(double(r)));
         return ops::add_low_rank(in[0], in[1], a.to(device), b.to(device), 0.7);
       }},
      {"linear_nf4",
       {{kX, {T, H}}, {kW, {N}}},
       [s](const Inputs& in, DType) { return ops::linear(in[0], nf4_weight(s, in, true), in[1]); }},
      {"linear_nf4_single",
       {{kX, {T, H}}},
       [s](const Inputs& in, DType) { return ops::linear(in[0], nf4_weight(s, in, false)); }},
      {"lora_linear_nf4",
       {{kX, {T, H}}, {kA, {r, H}}, {kA, {N, r}}},
       [s](const Inputs& in, DType) {
         return ops::lora_linear(in[0], nf4_weight(s, in, true), {}, lora_of(in, 0.3));
       }},
      {"linear_cross_entropy",
       {{kX, {T, H}}, {kW, {V, H}}},
       [T, V](const Inputs& in, DType) {
         return ops::linear_cross_entropy(in[0], in[1], some_labels(T, V), 0.1);
       }},
      {"linear_cross_entropy_in_chunks",
       {{kX, {T, H}}, {kW, {V, H}}},
       [T, V](const Inputs& in, DType) {
         return ops::linear_cross_entropy(in[0], in[1], some_labels(T, V), 0.1, nullptr, 1 + T / 4);
       }},
      {"linear_cross_entropy_with_adapters",
       {{kX, {T, H}}, {kW, {V, H}}, {kA, {r, H}}, {kA, {V, r}}, {kA, {r + 1, H}}, {kA, {V, r + 1}}},
       [T, V](const Inputs& in, DType) {
         const DropoutKey key{.seed = 99, .step = 3, .module = 5, .first_row = 1000};
         return ops::linear_cross_entropy(
             in[0], in[1], some_labels(T, V), 0.1, nullptr, 1 + T / 4,
             {{in[2], in[3], 0.7, 0.3, key}, {in[4], in[5], 0.5, 0, {}}});
       }},
  };
}

}  // namespace

std::vector<OpCase> op_cases(const OpSizes& s) {
  std::vector<OpCase> cases = elementwise_cases(s);
  for (OpCase& op : product_cases(s)) cases.push_back(std::move(op));
  cases.push_back(group_case("lora_group_merged", s, false, false, 0));
  cases.push_back(group_case("lora_group_merged_with_dropout", s, false, false, 0.3));
  cases.push_back(group_case("lora_group_bordered", s, true, false, 0));
  cases.push_back(group_case("lora_group_bordered_with_room", s, true, true, 0));
  cases.push_back(dora_case("dora_linear", s, false, 0));
  cases.push_back(dora_case("dora_linear_with_bias", s, true, 0));
  cases.push_back(dora_case("dora_linear_with_dropout", s, false, 0.3));
  cases.push_back(dora_case("dora_linear_with_bias_and_dropout", s, true, 0.3));
  cases.push_back(dora_swiglu_case("dora_swiglu", s, true));
  cases.push_back(dora_swiglu_case("dora_swiglu_of_up_alone", s, false));
  cases.push_back({"swiglu_merged", {{kX, {s.T, 2 * s.H}}}, [](const Inputs& in, DType) {
                     return ops::swiglu_merged(in[0], 5);
                   }});
  cases.push_back(merged_attention_case("attention_merged", s, false));
  cases.push_back(merged_attention_case("attention_merged_with_norms", s, true));
  cases.push_back(attention_case("attention_grouped", s.T, s.heads, s.kv_heads, s.D));
  cases.push_back(attention_case("attention_multi_query", s.T, s.heads, 1, s.D));
  cases.push_back(attention_case("attention_multi_head", s.T, s.heads, s.heads, s.D));
  return cases;
}

Tensor random_tensor(Shape shape, DType dtype, uint64_t seed, double stddev) {
  Random random(seed);
  std::vector<double> values;
  for (int64_t i = 0; i < shape.num_elements(); ++i) values.push_back(stddev * random.normal());
  return Tensor::from_floats(shape, values, dtype);
}

Tensor make_cu_seqlens(int64_t T) {
  const auto end = int32_t(T);
  return Tensor::from_ints({5}, {0, 1, 1, end / 3 + 1, end});
}

std::vector<Variable> make_inputs(const OpCase& op, const OpDtypes& dtypes, uint64_t mask) {
  const DType adapter = dtypes.activation == DType::F64 ? DType::F64 : DType::F32;
  std::vector<Variable> inputs;
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    const OpInput& input = op.inputs[i];
    const DType dtype = input.kind == kX   ? dtypes.activation
                        : input.kind == kW ? dtypes.weight
                                           : adapter;
    // Products of matrices keep a variance near 1.
    const bool matrix = input.kind != kX && input.shape.rank() == 2;
    const double stddev = matrix ? 1 / std::sqrt(double(input.shape[1])) : 1;
    inputs.emplace_back(random_tensor(input.shape, dtype, 100 + i, stddev), (mask >> i & 1) != 0);
  }
  return inputs;
}

}  // namespace graft
