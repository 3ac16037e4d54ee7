// Stacked adapters on the device: the golden sums of tests/golden/stacks, LoRA and DoRA, switched
// without loading the base again, and under a trained pair.
#include "models/adapter_stack.h"

#include <gtest/gtest.h>

#include "cuda/cuda_backend.h"
#include "models/weights.h"
#include "tests/golden_case.h"

namespace graft {
namespace {

using Json = nlohmann::json;

class DeviceStack : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
    golden_ = golden_json(std::string("tests/golden/stacks/") + GetParam() + ".json");
  }
  Json golden_;
};

TEST_P(DeviceStack, GivesTheGoldenSumAndGoesAgain) {
  const auto model = load_model(golden_["model"], DType::F32, Device::CUDA);
  const std::vector<double> bare = logits_of(*model, golden_["input_ids"]);
  AdapterStack stack(*model);
  std::vector<int64_t> ids;
  for (const Json& one : golden_["adapters"]) ids.push_back(stack.attach(one[0], 1));
  for (size_t i = 0; i < ids.size(); ++i) stack.set_weight(ids[i], golden_["adapters"][i][1]);
  EXPECT_LT(worst_share(logits_of(*model, golden_["input_ids"]), golden_numbers(golden_["logits"])),
            1e-5);
  for (const int64_t id : ids) stack.detach(id);
  EXPECT_EQ(logits_of(*model, golden_["input_ids"]), bare);
}

// Loss and gradients of a trained pair over the stack are those of the CPU.
TEST_P(DeviceStack, CarriesATrainedPair) {
  const auto run = [&](Device device) {
    const auto model = load_model(golden_["model"], DType::F32, device);
    AdapterStack stack(*model);
    for (const Json& one : golden_["adapters"]) stack.attach(one[0], one[1]);
    LoraConfig config;
    config.r = 3;
    config.init_lora_weights = LoraConfig::Init::Random;
    attach_lora(*model, config, 5);
    ForwardContext context;
    context.training = true;
    context.dropout.seed = 9;
    const std::vector<int32_t> row = {5, 17, 80, 3, 44, 9, 61, 12};
    const Variable loss = model->loss(pack({row}, {row}), context, 1.0 / 7);
    backward(loss);
    std::vector<double> all = loss.value().to(Device::CPU).to_doubles();
    for (const NamedLinear& layer : linear_layers(*model)) {
      if (!layer.linear->lora) continue;
      for (const Variable& leaf : {layer.linear->lora->a, layer.linear->lora->b})
        for (const double x : leaf.grad().to(Device::CPU).to_doubles()) all.push_back(x);
    }
    return all;
  };
  EXPECT_LT(worst_share(run(Device::CUDA), run(Device::CPU)), 1e-5);
}
INSTANTIATE_TEST_SUITE_P(Golden, DeviceStack, testing::Values("mixed_ranks", "dora_and_lora"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace graft
