// PiSSA and OLoRA on the device: the residual base, A and B are the bytes that the CPU gets, and
// the saved adapter is the converted one.
#include "models/residual_base.h"

#include <gtest/gtest.h>

#include "cuda/cuda_backend.h"
#include "models/adapter.h"
#include "models/weights.h"
#include "tensor/backend.h"
#include "tests/golden_case.h"

namespace graft {
namespace {

constexpr const char* kModel = "tests/golden/models/qwen3_tied";
const nlohmann::json kRows = {{5, 17, 80, 3, 44, 9, 61, 12}};

class DeviceResidualBase : public testing::TestWithParam<LoraConfig::Init> {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
    config_.r = 4;
    config_.init_lora_weights = GetParam();
  }
  std::unique_ptr<Decoder> begun(DType dtype, Device device) const {
    auto model = load_model(kModel, dtype, device);
    attach_lora(*model, config_, 3);
    take_out_adapters(*model, config_, 3);
    model->refresh_adapters();
    return model;
  }
  LoraConfig config_;
};

TEST_P(DeviceResidualBase, IsThatOfTheCpu) {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    const auto cpu = begun(dtype, Device::CPU), cuda = begun(dtype, Device::CUDA);
    const auto wanted = linear_layers(*cpu), got = linear_layers(*cuda);
    for (size_t i = 0; i < wanted.size(); ++i) {
      const Linear &a = *got[i].linear, &b = *wanted[i].linear;
      if (!b.lora) continue;
      EXPECT_EQ(a.weight.value().device(), Device::CUDA);
      EXPECT_EQ(a.weight.value().dtype(), dtype);
      for (const auto& [x, y] : {std::pair{a.weight, b.weight}, std::pair{a.lora->a, b.lora->a},
                                 std::pair{a.lora->b, b.lora->b}})
        EXPECT_EQ(x.value().to(Device::CPU).to_doubles(), y.value().to_doubles()) << got[i].name;
    }
  }
}

TEST_P(DeviceResidualBase, SavesWhatTheUntouchedBaseTakes) {
  config_.use_dora = true;  // its norms are made from the residual on the device
  const ScratchFolder folder;
  const auto trained = begun(DType::F32, Device::CUDA);
  const auto base = load_model(kModel, DType::F32);
  const auto before = logits_of(*base, kRows);
  EXPECT_LT(worst_share(logits_of(*trained, kRows), before), 1e-5);
  for (const NamedLinear& layer : linear_layers(*trained))
    if (layer.linear->lora) {
      Tensor b = layer.linear->lora->b.value();
      Tensor larger = b.to(Device::CPU).clone();
      for (int64_t i = 0; i < larger.num_elements(); ++i) larger.data<float>()[i] *= 1.5f;
      backend_of(b).copy(b, larger);
    }
  trained->refresh_adapters();
  save_adapter(*trained, config_, folder / "a");
  load_adapter(*base, folder / "a");
  EXPECT_LT(worst_share(logits_of(*base, kRows), logits_of(*trained, kRows)), 1e-5);
  EXPECT_GT(worst_share(before, logits_of(*trained, kRows)), 1e-3);
}

INSTANTIATE_TEST_SUITE_P(Init, DeviceResidualBase,
                         testing::Values(LoraConfig::Init::Pissa, LoraConfig::Init::Olora),
                         [](const auto& info) {
                           return info.param == LoraConfig::Init::Pissa ? "Pissa" : "Olora";
                         });

}  // namespace
}  // namespace graft
