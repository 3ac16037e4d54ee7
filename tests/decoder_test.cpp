// What holds of any decoder, whatever its weights: rows of a batch do not see each other, nothing
// sees the future, checkpointing changes no bit, Meta counts what the CPU takes, and the gradient
// of every adapter is the one that finite differences give.
#include "models/decoder.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "autograd/tape.h"
#include "models/weights.h"
#include "nn/lora.h"

namespace graft {
namespace {

using Ids = std::vector<int32_t>;

// Every flag is on: q/k norms, biases everywhere, GQA, a stretched rotary table.
ModelConfig tiny() {
  ModelConfig config;
  config.architecture = "Qwen3ForCausalLM";
  config.vocab_size = 40;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 6;
  config.max_position_embeddings = 64;
  config.attention_bias = config.attention_out_bias = config.mlp_bias = config.qk_norm = true;
  config.rope.type = RopeConfig::Type::Yarn;
  config.rope.factor = 4;
  config.rope.original_max_position_embeddings = 16;
  return config;
}

LoraConfig adapters(double dropout) {
  LoraConfig config;
  config.r = 3;
  config.lora_dropout = dropout;
  config.init_lora_weights = LoraConfig::Init::Random;  // so that B, and with it dA, is not zero
  return config;
}

const std::vector<Ids> kRows = {{3, 9, 27, 1, 3, 8}, {5}, {25, 5, 25}};

ForwardContext training(uint64_t seed) {
  ForwardContext context;
  context.training = true;
  context.dropout.seed = seed;
  return context;
}

// The gradients of all adapters after one backward, by name.
std::map<std::string, std::vector<double>> gradients(Decoder& model, bool checkpointing) {
  backward(model.loss(pack(kRows, kRows), training(4), 0.125, checkpointing));
  std::map<std::string, std::vector<double>> result;
  for (auto& [name, linear] : linear_layers(model)) {
    if (!linear->lora) continue;
    result[name + ".lora_A"] = linear->lora->a.grad().to_doubles();
    result[name + ".lora_B"] = linear->lora->b.grad().to_doubles();
  }
  return result;
}

TEST(Pack, ShiftsLabelsWithinEachRowAndCountsPositionsAnew) {
  const PackedBatch batch = pack({{1, 2, 3}, {4}, {5, 6}}, {{-100, 2, 3}, {4}, {5, 6}});
  EXPECT_EQ(batch.input_ids.to_doubles(), (std::vector<double>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(batch.positions.to_doubles(), (std::vector<double>{0, 1, 2, 0, 0, 1}));
  EXPECT_EQ(batch.cu_seqlens.to_doubles(), (std::vector<double>{0, 3, 4, 6}));
  EXPECT_EQ(batch.labels.to_doubles(), (std::vector<double>{2, 3, -100, -100, 6, -100}));
  EXPECT_EQ(pack({{1, 2}}).labels.to_doubles(), (std::vector<double>{-100, -100}));
  EXPECT_THROW(pack({{1, 2}}, {{1}}), Error);
  EXPECT_THROW(pack({{1, 2}}, {{1, 2}, {3}}), Error);
}

TEST(Decoder, ComputesEachRowAsIfItWereAlone) {
  const auto model = random_model(tiny(), DType::F32, 1, 0.3);
  NoRecord off;
  const std::vector<double> together =
      model->logits(model->forward(pack(kRows), {}).value()).to_doubles();
  std::vector<double> alone;
  for (const Ids& row : kRows) {
    const auto part = model->logits(model->forward(pack({row}), {}).value()).to_doubles();
    alone.insert(alone.end(), part.begin(), part.end());
  }
  ASSERT_EQ(together.size(), alone.size());
  for (size_t i = 0; i < alone.size(); ++i) EXPECT_NEAR(together[i], alone[i], 1e-5);
}

TEST(Decoder, DoesNotSeeTheFuture) {
  const auto model = random_model(tiny(), DType::F32, 1, 0.3);
  NoRecord off;
  const auto first = model->forward(pack({{3, 9, 27, 1}}), {}).value().to_doubles();
  const auto other = model->forward(pack({{3, 9, 30, 2}}), {}).value().to_doubles();
  for (size_t i = 0; i < 2 * 16; ++i) EXPECT_NEAR(first[i], other[i], 1e-6);
  EXPECT_GT(std::fabs(first[2 * 16] - other[2 * 16]), 1e-3);
}

TEST(Decoder, GivesBitIdenticalGradientsWithCheckpointing) {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    const auto plain = random_model(tiny(), dtype, 1, 0.3);
    const auto checkpointed = random_model(tiny(), dtype, 1, 0.3);
    attach_lora(*plain, adapters(0.2), 5);
    attach_lora(*checkpointed, adapters(0.2), 5);
    const auto wanted = gradients(*plain, false);
    EXPECT_EQ(wanted.size(), 2u * 7 * 2);
    EXPECT_EQ(gradients(*checkpointed, true), wanted) << dtype_name(dtype);
  }
}

TEST(Decoder, AdapterGradientsAgreeWithFiniteDifferencesInF64) {
  const auto model = random_model(tiny(), DType::F64, 1, 0.3);
  attach_lora(*model, adapters(0.2), 5);
  std::map<std::string, Variable> leaves;
  for (auto& [name, linear] : linear_layers(*model)) {
    if (!linear->lora) continue;
    for (auto [leaf, half] :
         {std::pair{&linear->lora->a, ".lora_A"}, {&linear->lora->b, ".lora_B"}}) {
      leaf->set_value(leaf->value().to(DType::F64).clone());
      leaves[name + half] = *leaf;
    }
  }
  const auto analytic = gradients(*model, true);
  const auto loss = [&] {
    NoRecord off;
    return model->loss(pack(kRows, kRows), training(4), 0.125).value().item();
  };
  constexpr double kStep = 1e-5;
  for (auto& [name, leaf] : leaves) {
    double* values = leaf.value().data<double>();
    double scale = 0;
    for (const double g : analytic.at(name)) scale = std::max(scale, std::fabs(g));
    for (int64_t i = 0; i < leaf.value().num_elements(); i += 7) {
      const double kept = values[i];
      values[i] = kept + kStep;
      const double above = loss();
      values[i] = kept - kStep;
      const double below = loss();
      values[i] = kept;
      EXPECT_NEAR(analytic.at(name)[size_t(i)], (above - below) / (2 * kStep), 1e-6 * scale)
          << name << " element " << i;
    }
  }
}

// With everything frozen there is nothing to differentiate and no graph is kept.
TEST(Decoder, RecordsNothingWithoutAnAdapter) {
  const auto model = random_model(tiny(), DType::F32, 1);
  const MemoryStats before = allocator_of(Device::CPU).stats();
  const Variable loss = model->loss(pack(kRows, kRows), training(4), 1);
  EXPECT_FALSE(loss.requires_grad());
  const MemoryStats after = allocator_of(Device::CPU).stats();
  EXPECT_LE(after.live[int(Scope::Activations)] - before.live[int(Scope::Activations)], 64);
}

TEST(Decoder, LeavesNothingAliveAfterTheBackward) {
  for (const bool checkpointing : {false, true}) {
    const auto model = random_model(tiny(), DType::F32, 1);
    attach_lora(*model, adapters(0.1), 5);
    gradients(*model, checkpointing);  // makes the gradients of the leaves
    const MemoryStats before = allocator_of(Device::CPU).stats();
    gradients(*model, checkpointing);
    const MemoryStats after = allocator_of(Device::CPU).stats();
    EXPECT_EQ(after.live_total, before.live_total);
  }
}

// The batch lies on the CPU in both cases.
TEST(Decoder, TakesOnMetaTheActivationsThatItTakesOnTheCpu) {
  Ids row(48);
  for (size_t i = 0; i < row.size(); ++i) row[i] = int32_t(i % 40);
  const PackedBatch batch = pack({row}, {row});
  const auto peak = [&](Device device) {
    const auto model = random_model(tiny(), DType::F32, 1, 0.02, device);
    attach_lora(*model, adapters(0), 5);
    Allocator& allocator = allocator_of(device);
    const int64_t before = allocator.stats().live[int(Scope::Activations)];
    allocator.reset_peak();
    backward(model->loss(batch, training(4), 1));
    return allocator.stats().peak[int(Scope::Activations)] - before;
  };
  const int64_t cpu = peak(Device::CPU);
  const int64_t meta = peak(Device::Meta);
  EXPECT_NEAR(double(meta), double(cpu), 0.05 * double(cpu));
}

TEST(Decoder, RefusesIdsOutsideTheVocabularyAndEmptyBatches) {
  const auto model = random_model(tiny(), DType::F32, 1);
  EXPECT_THROW(model->forward(pack({{40}}), {}), Error);
  EXPECT_THROW(model->forward(pack({{-1}}), {}), Error);
  EXPECT_THROW(model->forward(pack({{}}), {}), Error);
  KvCache cache = model->make_cache(2);
  EXPECT_THROW(model->forward_cached({1, 2, 3}, cache), Error);
  EXPECT_THROW(model->forward_cached({}, cache), Error);
}

TEST(Decoder, VisitsModulesUnderTheirHuggingFaceNames) {
  ModelConfig config = tiny();
  config.tie_word_embeddings = true;
  const auto model = random_model(config, DType::F32, 1);
  struct Names : Visitor {
    std::vector<std::string> parameters, linears;
    void parameter(const std::string& name, Variable&) override { parameters.push_back(name); }
    void linear(const std::string& name, Linear&) override { linears.push_back(name); }
  } names;
  model->visit("", names);
  EXPECT_EQ(names.parameters.front(), "model.embed_tokens.weight");
  EXPECT_EQ(names.parameters.back(), "model.norm.weight");  // tied: the head has none of its own
  EXPECT_EQ(names.parameters.size(), 1u + 2 * (2 + 7 * 2 + 2) + 1);
  EXPECT_EQ(names.linears.front(), "model.layers.0.self_attn.q_proj");
  EXPECT_EQ(names.linears.back(), "lm_head");
  EXPECT_EQ(names.linears.size(), 15u);
}

}  // namespace
}  // namespace graft
