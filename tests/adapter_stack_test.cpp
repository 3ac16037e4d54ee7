// Several frozen adapters on one model, against PEFT's merges of each (tests/golden/stacks); and
// that switching leaves the base where it is.
#include "models/adapter_stack.h"

#include <algorithm>

#include "models/adapter_delta.h"
#include "models/weights.h"
#include "tests/golden_case.h"

namespace graft {
namespace {

using Json = nlohmann::json;
const std::string kAdapters = "tests/golden/adapters/";
const std::string kQwen3 = "tests/golden/models/qwen3_tied";

class Stacked : public testing::TestWithParam<const char*> {
 protected:
  Json golden() const {
    return golden_json(std::string("tests/golden/stacks/") + GetParam() + ".json");
  }
};

TEST_P(Stacked, GivesTheSumOfPeftsDeltas) {
  const Json golden = this->golden();
  auto model = load_model(golden["model"]);
  AdapterStack stack(*model);
  EXPECT_GT(worst_share(logits_of(*model, golden["input_ids"]), golden_numbers(golden["logits"])),
            1e-2);
  for (const Json& one : golden["adapters"]) stack.attach(one[0], one[1]);
  EXPECT_LT(worst_share(logits_of(*model, golden["input_ids"]), golden_numbers(golden["logits"])),
            1e-5);
}

// BF16: within one rounding of the activations, as with a single adapter.
TEST_P(Stacked, AgreesInBf16) {
  const Json golden = this->golden();
  auto model = load_model(golden["model"], DType::BF16);
  AdapterStack stack(*model);
  for (const Json& one : golden["adapters"]) stack.attach(one[0], one[1]);
  EXPECT_LT(worst_share(logits_of(*model, golden["input_ids"]), golden_numbers(golden["logits"])),
            4e-2);
}
INSTANTIATE_TEST_SUITE_P(Golden, Stacked,
                         testing::Values("mixed_ranks", "mixed_rslora", "three", "one", "dora",
                                         "dora_and_lora", "dora_patterns"),
                         [](const auto& info) { return std::string(info.param); });

std::vector<const void*> addresses(Decoder& model) {
  struct Collect : Visitor {
    std::vector<const void*> all;
    void parameter(const std::string&, Variable& value) override {
      all.push_back(value.value().raw());
    }
  } collect;
  model.visit("", collect);
  return collect.all;
}

TEST(AdapterStack, SwitchesWithoutTouchingTheBase) {
  const Json golden = golden_json("tests/golden/stacks/mixed_ranks.json");
  const Json alone = golden_json(kAdapters + "qwen3_tied/golden.json");
  auto model = load_model(kQwen3);
  const std::vector<const void*> before = addresses(*model);
  const std::vector<double> bare = logits_of(*model, alone["input_ids"]);
  const int64_t weights = allocator_of(Device::CPU).stats().live[int(Scope::Weights)];

  AdapterStack stack(*model);
  const int64_t first = stack.attach(kAdapters + "qwen3_tied");
  EXPECT_LT(worst_share(logits_of(*model, alone["input_ids"]), golden_numbers(alone["logits"])),
            1e-5);
  const int64_t second = stack.attach(kAdapters + "patterns", -0.4);
  stack.set_weight(first, 0.7);
  EXPECT_LT(worst_share(logits_of(*model, golden["input_ids"]), golden_numbers(golden["logits"])),
            1e-5);
  stack.set_weight(second, 0);
  stack.set_weight(first, 1);
  EXPECT_LT(worst_share(logits_of(*model, alone["input_ids"]), golden_numbers(alone["logits"])),
            1e-5);
  stack.detach(first);
  stack.detach(second);
  EXPECT_EQ(logits_of(*model, alone["input_ids"]), bare);
  EXPECT_EQ(addresses(*model), before);
  EXPECT_EQ(allocator_of(Device::CPU).stats().live[int(Scope::Weights)], weights);
  EXPECT_NE(error_of([&] { stack.detach(first); }), "");
}

TEST(AdapterStack, IsAsItWasWhenAnAdapterDoesNotFit) {
  const Json alone = golden_json(kAdapters + "qwen3_tied/golden.json");
  auto model = load_model(kQwen3);
  AdapterStack stack(*model);
  stack.attach(kAdapters + "qwen3_tied");
  EXPECT_NE(error_of([&] { stack.attach(kAdapters + "llama_gqa"); }), "");
  EXPECT_NE(error_of([&] { stack.attach(kAdapters + "qwen3_tied", NAN); }), "");
  EXPECT_LT(worst_share(logits_of(*model, alone["input_ids"]), golden_numbers(alone["logits"])),
            1e-5);
}

// A trained pair over frozen ones, DoRA among them: loss and gradients are those on a base into
// which the frozen ones are merged. A trained DoRA counts from the base's own rows, so only LoRA
// can be compared so.
class OnTop : public testing::TestWithParam<const char*> {};

std::vector<double> loss_and_gradients(const Json& golden, bool stacked) {
  auto model = load_model(golden["model"]);
  AdapterStack stack(*model);
  for (const Json& one : golden["adapters"]) {
    if (stacked) {
      stack.attach(one[0], one[1]);
      continue;
    }
    const AdapterFile file = read_adapter(one[0]);
    const auto bare = load_model(golden["model"]);
    const auto from = linear_layers(*bare), to = linear_layers(*model);
    for (size_t i = 0; i < to.size(); ++i) {
      const AdapterModule* module = file.find(to[i].name);
      if (!module) continue;
      Tensor w = to[i].linear->weight.value().clone();
      add_delta(w, from[i].linear->weight.value(), *module, one[1]);
      to[i].linear->weight.set_value(w);
    }
  }
  LoraConfig config;
  config.r = 3;
  config.init_lora_weights = LoraConfig::Init::Random;
  attach_lora(*model, config, 5);
  ForwardContext context;
  context.training = true;  // with dropout, whose mask is the same
  context.dropout.seed = 9;
  const std::vector<int32_t> row = {5, 17, 80, 3, 44, 9, 61, 12};
  const Variable loss = model->loss(pack({row}, {row}), context, 1.0 / 7, true);
  backward(loss);
  std::vector<double> all = {loss.value().item()};
  for (const NamedLinear& layer : linear_layers(*model)) {
    if (!layer.linear->lora) continue;
    for (const Variable& leaf : {layer.linear->lora->a, layer.linear->lora->b})
      for (const double x : leaf.grad().to_doubles()) all.push_back(x);
  }
  return all;
}

TEST_P(OnTop, ATrainedPairLearnsAsOnAMergedBase) {
  const Json golden = golden_json(std::string("tests/golden/stacks/") + GetParam() + ".json");
  const std::vector<double> merged = loss_and_gradients(golden, false);
  ASSERT_GT(merged.size(), 1000u);
  EXPECT_LT(worst_share(loss_and_gradients(golden, true), merged), 1e-5);
}
INSTANTIATE_TEST_SUITE_P(Golden, OnTop, testing::Values("mixed_ranks", "dora", "dora_and_lora"),
                         [](const auto& info) { return std::string(info.param); });

// DoRA on top of a stack: the sum of both deltas, each from the base, whichever of the two is the
// trained one.
TEST(AdapterStack, CarriesATrainedDora) {
  const Json golden = golden_json("tests/golden/stacks/dora_and_lora.json");
  auto model = load_model(golden["model"]);
  AdapterStack stack(*model);
  stack.attach(golden["adapters"][0][0], golden["adapters"][0][1]);
  const int64_t second = stack.attach(golden["adapters"][1][0], 1);
  const std::vector<double> wanted = logits_of(*model, golden["input_ids"]);
  stack.detach(second);
  load_adapter(*model, golden["adapters"][1][0]);
  EXPECT_LT(worst_share(logits_of(*model, golden["input_ids"]), wanted), 1e-5);
}

TEST(AdapterChoice, TakesAWeightBehindTheLastColonOfAPathThatExists) {
  const ScratchFolder scratch;
  for (const char* name : {"a", "a:0.5", "b:c"})
    std::filesystem::create_directories(scratch / name);
  const auto parsed = [&](const std::string& text) {
    const AdapterChoice choice = parse_adapter_choice(scratch / text);
    return choice.directory.substr((scratch / "").size()) + " " + std::to_string(choice.weight);
  };
  EXPECT_EQ(parsed("a"), "a 1.000000");
  EXPECT_EQ(parsed("a:2"), "a 2.000000");
  EXPECT_EQ(parsed("a:-1e-1"), "a -0.100000");
  EXPECT_EQ(parsed("a:0.5"), "a:0.5 1.000000") << "a directory of that name is there";
  EXPECT_EQ(parsed("a:0.5:0.25"), "a:0.5 0.250000");
  EXPECT_EQ(parsed("b:c"), "b:c 1.000000");
  EXPECT_EQ(parsed("b:c:3"), "b:c 3.000000");
  EXPECT_EQ(parsed("a:x"), "a:x 1.000000");
  EXPECT_EQ(parsed("a:"), "a: 1.000000");
  EXPECT_EQ(parsed("none:1"), "none:1 1.000000");
  EXPECT_NE(error_of([&] { parsed("a:nan"); }), "");
}

}  // namespace
}  // namespace graft
