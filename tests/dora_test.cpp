// DoRA against PEFT (tests/golden, folders dora_*) and against its definition: norms, gradients,
// fresh adapters, memory, layouts. Training by steps is in trajectory_test.cpp.
#include "nn/dora.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "models/adapter.h"
#include "models/weights.h"
#include "nn/parameter_buffer.h"
#include "tensor/safetensors.h"
#include "tests/golden_case.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"
#include "train/memory_plan.h"
#include "train/run_setup.h"

namespace graft {
namespace {

using Json = nlohmann::json;

const std::string kGolden = "tests/golden/";

DoraNorm random_layer(int64_t N, int64_t K, int64_t r, DType weight_dtype, double scaling) {
  DoraNorm layer;
  layer.weight = random_tensor({N, K}, weight_dtype, 1, 0.1);
  layer.a = random_tensor({r, K}, DType::F32, 2, 0.1);
  layer.b = random_tensor({N, r}, DType::F32, 3, 0.3);
  layer.scaling = scaling;
  layer.squares = Tensor::zeros({N}, DType::F32);
  layer.norm = Tensor::zeros({N}, DType::F32);
  backend_of(layer.weight).row_squares(layer.squares, layer.weight);
  return layer;
}

std::vector<double> norms_of(Backend& backend, const DoraNorm& layer) {
  backend.dora_norms({&layer, 1});
  return layer.norm.to_doubles();
}

// The reference backend makes W + s B A and takes its lengths.
TEST(DoraNorms, OfTheFactorisedFormAreThoseOfTheDenseMatrix) {
  for (const DType dtype : {DType::F32, DType::BF16, DType::F16})
    for (const int64_t r : {1, 3, 16, 70}) {
      const DoraNorm layer = random_layer(133, 301, r, dtype, 1.5);
      const auto fast = norms_of(cpu_backend(), layer);
      const auto dense = norms_of(reference_backend(), layer);
      for (size_t n = 0; n < fast.size(); ++n)
        EXPECT_NEAR(fast[n], dense[n], 1e-5 * dense[n]) << dtype_name(dtype) << ", r " << r;
      // B A is no small part of it: a wrong sign or factor would show.
      double lengths = 0, without = 0;
      for (size_t n = 0; n < dense.size(); ++n) {
        lengths += dense[n];
        without += std::sqrt(layer.squares.to_doubles()[n]);
      }
      EXPECT_GT(std::abs(lengths / without - 1), 0.005) << "r " << r;
    }
}

// Where W and s B A cancel, the sum of squares may come out below zero.
TEST(DoraNorms, AreNeverNaN) {
  DoraNorm layer = random_layer(64, 256, 1, DType::F32, 1);
  const GemmTerm term{.a = layer.b, .b = layer.a, .alpha = -1};
  backend_of(layer.weight).gemm(layer.weight, {&term, 1});
  backend_of(layer.weight).row_squares(layer.squares, layer.weight);
  for (const double norm : norms_of(cpu_backend(), layer)) {
    EXPECT_GE(norm, 0);
    EXPECT_LT(norm, 1e-2);  // of rows as long as 0.5: F32 leaves this much when it cancels
  }
}

// A row of zeros has no direction: it gives zeros and no gradient, where PEFT gives NaN.
TEST(Dora, ARowOfZerosStaysOne) {
  Linear layer;
  Tensor weight = random_tensor({4, 6}, DType::F32, 1);
  for (int64_t k = 0; k < 6; ++k) weight.data<float>()[2 * 6 + k] = 0;
  layer.weight = Variable(weight);
  layer.lora = std::make_unique<LoraPair>();
  layer.lora->a = Variable(random_tensor({2, 6}, DType::F32, 2), true);
  layer.lora->b = Variable(Tensor::zeros({4, 2}, DType::F32), true);
  start_dora(*layer.lora, weight);
  const Variable y = layer.forward(Variable(random_tensor({5, 6}, DType::F32, 3)), {});
  backward(y, random_tensor({5, 4}, DType::F32, 4));
  for (int64_t t = 0; t < 5; ++t) EXPECT_EQ(y.value().data<float>()[t * 4 + 2], 0);
  for (const Variable* leaf : {&layer.lora->a, &layer.lora->b, &layer.lora->magnitude})
    for (const double g : leaf->grad().to_doubles()) EXPECT_TRUE(std::isfinite(g));
  EXPECT_EQ(layer.lora->magnitude.grad().to_doubles()[2], 0);
  EXPECT_NE(layer.lora->magnitude.grad().to_doubles()[1], 0);
}

// --- PEFT's loss and gradients
// --------------------------------------------------------------------

struct PeftCase {
  const char *name, *folder, *adapter;
};

class DoraByPeft : public testing::TestWithParam<PeftCase> {};

TEST_P(DoraByPeft, GivesPeftsLossAndGradientsOfABAndM) {
  const std::string folder = kGolden + GetParam().folder;
  const Json golden = golden_json(folder + "/golden.json");
  auto model = load_model(golden["model"]);
  load_adapter(*model, folder + GetParam().adapter);
  ForwardContext context;
  if (golden.contains("p")) {  // under our masks
    context.training = true;
    context.dropout.seed = golden["seed"];
    context.dropout.step = golden["step"];
    context.dropout.first_row = golden["first_row"];
  }
  const auto labels = golden["labels"].get<std::vector<int32_t>>();
  const auto& rows = golden["input_ids"];
  const auto ids = (rows[0].is_array() ? rows[0] : rows).get<std::vector<int32_t>>();
  const double count =
      double(std::count_if(labels.begin() + 1, labels.end(), [](int32_t l) { return l >= 0; }));
  const Variable loss = model->loss(pack({ids}, {labels}), context, 1 / count);
  const double expected_loss = golden["loss"];
  EXPECT_NEAR(loss.value().item(), expected_loss, 1e-5 * expected_loss);
  backward(loss);

  const SafetensorsFile gradients(folder + "/gradients.safetensors");
  size_t compared = 0;
  for (const auto& [name, linear] : linear_layers(*model)) {
    if (!linear->lora) continue;
    for (const auto& [leaf, variable] : adapter_leaves(name, *linear->lora)) {
      const bool is_m = leaf.ends_with("magnitude_vector");
      const auto expected =
          gradients.tensor("base_model.model." + leaf + (is_m ? "" : ".weight")).to_doubles();
      const auto actual = variable.grad().to_doubles();
      ASSERT_EQ(actual.size(), expected.size()) << leaf;
      double worst = 0, largest = 0;
      for (size_t i = 0; i < expected.size(); ++i) {
        worst = std::max(worst, std::abs(actual[i] - expected[i]));
        largest = std::max(largest, std::abs(expected[i]));
      }
      EXPECT_LT(worst, 1e-4 * largest) << leaf;
      ++compared;
    }
  }
  EXPECT_EQ(compared, gradients.entries().size());
  EXPECT_EQ(compared % 3, 0u);
}

INSTANTIATE_TEST_SUITE_P(Golden, DoraByPeft,
                         testing::Values(PeftCase{"llama_gqa", "adapters/dora_llama_gqa", ""},
                                         PeftCase{"biases", "adapters/dora_bias", ""},
                                         PeftCase{"qwen2_rslora", "adapters/dora_qwen2_tied", ""},
                                         PeftCase{"qwen3_patterns", "adapters/dora_patterns", ""},
                                         PeftCase{"dropout", "dora_dropout", "/adapter"}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Dora, CountsTheMagnitudesAsPeftDoes) {
  for (const char* name : {"dora_llama_gqa", "dora_patterns"}) {
    const Json golden = golden_json(kGolden + "adapters/" + name + "/golden.json");
    TrainOptions options;
    options.model = golden["model"];
    options.max_seq_length = 16;
    options.lora = load_adapter_config(kGolden + "adapters/" + name);
    const MemoryPlan plan = plan_memory(ModelConfig::load(options.model), options, DType::F32);
    EXPECT_EQ(trainable_parameters_line(plan.trainable_parameters, plan.all_parameters),
              golden["parameters_line"].get<std::string>());
  }
}

// --- the life of an adapter
// ------------------------------------------------------------------------

std::unique_ptr<Decoder> model_with_dora(LoraConfig::Init init, DType dtype = DType::F32) {
  auto model = load_model(kGolden + "models/llama_bias", dtype);
  LoraConfig lora;
  lora.r = 4;
  lora.lora_dropout = 0;
  lora.use_dora = true;
  lora.init_lora_weights = init;
  attach_lora(*model, lora, 7);
  return model;
}

std::vector<double> logits_of(Decoder& model) {
  return model.logits(model.forward(pack({{5, 17, 80, 3, 44, 9}}), {}).value()).to_doubles();
}

// m is made from the norms in F32, so that even over a BF16 base nothing is moved but by rounding.
TEST(Dora, AFreshAdapterChangesNothing) {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    auto plain = load_model(kGolden + "models/llama_bias", dtype);
    const auto expected = logits_of(*plain);
    const auto actual = logits_of(*model_with_dora(LoraConfig::Init::KaimingUniform, dtype));
    for (size_t i = 0; i < expected.size(); ++i)
      EXPECT_NEAR(actual[i], expected[i], tolerance_of(dtype) * 10) << dtype_name(dtype);
  }
}

// With B random from the start, m is the length of W + s B A, and so that changes nothing either.
TEST(Dora, WithARandomPairTheMagnitudesAreTheLengthsOfTheSum) {
  auto model = model_with_dora(LoraConfig::Init::Random);
  for (const auto& [name, linear] : linear_layers(*model)) {
    if (!linear->lora) continue;
    const DoraNorm norm = dora_norm_of(*linear->lora, linear->weight.value());
    const auto lengths = norms_of(reference_backend(), norm);
    const auto m = linear->lora->magnitude.value().to_doubles();
    for (size_t n = 0; n < m.size(); ++n) EXPECT_NEAR(m[n], lengths[n], 1e-5 * lengths[n]) << name;
  }
}

TEST(Dora, NormsFollowTheOptimizer) {
  auto model = model_with_dora(LoraConfig::Init::KaimingUniform);
  ParameterBuffer parameters(trained_leaves(*model, TrainOptions::Method::Dora), Device::CPU,
                             Scope::Adapters);
  parameters.on_publish([&] { model->refresh_adapters(); });
  const std::vector<int32_t> ids = {5, 17, 80, 3, 44, 9};
  for (int64_t step = 1; step <= 2; ++step) {  // the second is the first that moves the norms by A
    parameters.begin_step();
    backward(model->loss(pack({ids}, {ids}), {}, 0.2));
    parameters.step({.learning_rate = 0.1,
                     .beta1 = 0.9,
                     .beta2 = 0.999,
                     .epsilon = 1e-8,
                     .weight_decay = 0,
                     .step = step},
                    1);
  }
  for (const auto& [name, linear] : linear_layers(*model)) {
    if (!linear->lora) continue;
    const auto kept = linear->lora->norm.to_doubles();
    const auto squares = linear->lora->weight_squares.to_doubles();
    const DoraNorm norm = dora_norm_of(*linear->lora, linear->weight.value());
    const auto now = norms_of(reference_backend(), norm);
    double moved = 0;
    for (size_t n = 0; n < kept.size(); ++n) {
      EXPECT_NEAR(kept[n], now[n], 1e-5 * now[n]) << name;
      moved = std::max(moved, std::abs(kept[n] - std::sqrt(squares[n])));
    }
    EXPECT_GT(moved, 1e-3) << name;
  }
}

TEST(Dora, MagnitudesThatDoNotFitAreRefusedAndTheModelIsLeftBare) {
  const std::string good = kGolden + "adapters/dora_llama_gqa";
  const std::string m = "base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector";
  const SafetensorsFile file(good + "/adapter_model.safetensors");
  auto model = load_model(kGolden + "models/llama_gqa");
  const std::pair<const char*, Tensor> faults[] = {
      {"' is missing", Tensor()},
      {"expected (32)", Tensor::zeros({3}, DType::F32)},
      {"has 2 dimensions, expected 1", Tensor::zeros({1, 32}, DType::F32)},
      {"NaN or infinity", Tensor::from_floats({32}, std::vector<double>(32, NAN), DType::F32)}};
  for (const auto& [message, tensor] : faults) {
    const auto folder =
        std::filesystem::temp_directory_path() / ("graft_dora_" + std::to_string(getpid()));
    std::filesystem::create_directories(folder);
    std::filesystem::copy_file(good + "/adapter_config.json", folder / "adapter_config.json");
    std::vector<NamedTensor> tensors;
    for (const auto& entry : file.entries()) {
      const bool changed = entry.name == m;
      if (!changed || tensor.defined())
        tensors.push_back({entry.name, changed ? tensor : file.tensor(entry.name)});
    }
    write_safetensors(folder / "adapter_model.safetensors", std::move(tensors));
    try {
      load_adapter(*model, folder);
      ADD_FAILURE() << "was loaded";
    } catch (const Error& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find(m), std::string::npos) << text;
      EXPECT_NE(text.find(message), std::string::npos) << text;
      EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    }
    for (const auto& layer : linear_layers(*model)) EXPECT_EQ(layer.linear->lora, nullptr);
    std::filesystem::remove_all(folder);
  }
}

// Token by token, as generation runs it, from the norms that loading made.
TEST(Dora, DecodesAsItForwards) {
  auto model = load_model(kGolden + "models/llama_bias");
  load_adapter(*model, kGolden + "adapters/dora_bias");
  const std::vector<int32_t> ids = {5, 17, 80, 3, 44, 9};
  const auto whole = logits_of(*model);
  KvCache cache = model->make_cache(8);
  size_t at = 0;
  for (const int32_t id : ids)
    for (const double logit : model->logits(model->forward_cached({id}, cache)).to_doubles())
      EXPECT_NEAR(logit, whole[at++], 1e-4);
  EXPECT_EQ(at, whole.size());
}

// Layers of a group are scaled one by one.
TEST(Dora, TakesThePlainLayout) {
  auto model = model_with_dora(LoraConfig::Init::Random);
  EXPECT_EQ(model->set_lora_layout(LoraLayout::Bordered), LoraLayout::Plain);
  EXPECT_EQ(model->set_lora_layout(LoraLayout::Merged), LoraLayout::Plain);
}

// What DoRA keeps beside LoRA is the output of o, down and, where nobody keeps it anyway, of q, k
// and v; of gate and up SwiGLU does. Qwen2.5's q, k and v have biases, before which the output is
// kept; those of Qwen3 are kept by the norms of the heads, and by attention.
TEST(Dora, KeepsTheOutputsThatNobodyKeepsAnyway) {
  for (const char* name : {"bench/models/qwen2.5-0.5b.json", "bench/models/qwen3-0.6b.json"}) {
    const ModelConfig config = ModelConfig::load(name);
    TrainOptions options;
    options.max_seq_length = 512;
    options.lora.lora_dropout = 0;
    const auto activations = [&](TrainOptions::Method method, bool recomputed) {
      options.method = method;
      options.gradient_checkpointing = recomputed;
      return double(plan_memory(config, options, DType::BF16).activations);
    };
    int64_t columns = 2 * config.hidden_size;
    if (config.attention_bias)
      columns += config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads);
    const double layer = double(512 * columns * dtype_size(DType::BF16));
    using Method = TrainOptions::Method;
    for (const bool recomputed : {false, true}) {
      const double more =
          activations(Method::Dora, recomputed) - activations(Method::Lora, recomputed);
      const double layers = recomputed ? 1 : double(config.num_hidden_layers);
      EXPECT_GT(more, layer) << name;
      EXPECT_LT(more, 1.02 * layer * layers + layer) << name;
    }
  }
}

}  // namespace
}  // namespace graft
