// The layouts of a layer's products (nn/linear_group.h) on the device: merged and bordered give the
// loss and the gradients of the plain composition, and of the plain loops on the CPU.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "autograd/tape.h"
#include "cuda/blas.h"
#include "cuda/cuda_backend.h"
#include "models/weights.h"
#include "nn/lora.h"
#include "nn/parameter_buffer.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"
#include "train/demo_data.h"
#include "train/finetune.h"

namespace graft {
namespace {

constexpr LoraLayout kLayouts[] = {LoraLayout::Plain, LoraLayout::Merged, LoraLayout::Bordered};
const char* name_of(LoraLayout layout) {
  return layout == LoraLayout::Plain    ? "plain"
         : layout == LoraLayout::Merged ? "merged"
                                        : "bordered";
}

using Ids = std::vector<int32_t>;
const std::vector<Ids> kRows = {{3, 9, 27, 1, 3, 8, 22}, {5}, {25, 5, 25, 31}};

ModelConfig tiny() {
  ModelConfig config;
  config.architecture = "LlamaForCausalLM";
  config.vocab_size = 40;
  config.hidden_size = 24;
  config.intermediate_size = 56;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.max_position_embeddings = 64;
  return config;
}

struct Case {
  std::string name;
  ModelConfig config;
  LoraConfig lora;
};

std::vector<Case> cases() {
  Case qwen2{"biases, all layers, a rank for each", tiny(), {}};
  qwen2.config.attention_bias = true;
  qwen2.lora.r = 4;
  qwen2.lora.rank_pattern = {{"q_proj", 5}, {"v_proj", 3}, {"gate_proj", 1}, {"down_proj", 7}};
  qwen2.lora.alpha_pattern = {{"k_proj", 3.0}, {"up_proj", 11.0}};
  Case qwen3{"norms by head, q and v alone, rank-stabilised", tiny(), {}};
  qwen3.config.qk_norm = true;
  qwen3.lora.r = 3;
  qwen3.lora.use_rslora = true;
  qwen3.lora.target_modules = {"q_proj", "v_proj"};
  Case llama{"o, up and down alone, in one layer of two", tiny(), {}};
  llama.lora.r = 2;
  llama.lora.target_modules = {"o_proj", "up_proj", "down_proj"};
  llama.lora.layers_to_transform = {1};
  std::vector<Case> all{qwen2, qwen3, llama};
  for (Case& one : all) {
    one.lora.lora_dropout = 0;
    one.lora.init_lora_weights = LoraConfig::Init::Random;  // else B, and with it dA, is zero
  }
  return all;
}

std::unique_ptr<Decoder> make_model(const Case& test, DType dtype, Device device,
                                    LoraLayout layout) {
  auto model = random_model(test.config, dtype, 1, 0.3, device);
  // Biases other than zero; the same on every device.
  struct Shift : Visitor {
    void parameter(const std::string& name, Variable& value) override {
      if (!name.ends_with("bias")) return;
      Tensor bias = value.value();
      std::vector<double> values;
      for (int64_t i = 0; i < bias.num_elements(); ++i)
        values.push_back(0.25 * double(i % 7) - 0.5);
      backend_of(bias).copy(bias, Tensor::from_floats(bias.shape(), values, bias.dtype()));
    }
  } shift;
  model->visit("", shift);
  attach_lora(*model, test.lora, 2);
  model->set_lora_layout(layout);
  return model;
}

ForwardContext training() {
  ForwardContext context;
  context.training = true;
  context.dropout = {.seed = 4, .step = 2, .module = 0, .first_row = 100};
  return context;
}

// The loss, and the gradients of all adapters, on the CPU.
std::map<std::string, Tensor> step(Decoder& model, bool checkpointing = false) {
  std::map<std::string, Tensor> result;
  const Variable loss = model.loss(pack(kRows, kRows), training(), 0.125, checkpointing);
  result["loss"] = loss.value().to(Device::CPU);
  backward(loss);
  for (auto& [name, linear] : linear_layers(model)) {
    if (!linear->lora) continue;
    for (auto [leaf, half] :
         {std::pair{&linear->lora->a, ".lora_A"}, {&linear->lora->b, ".lora_B"}}) {
      result[name + half] = leaf->grad().to(Device::CPU);
      leaf->set_grad(Tensor());
    }
  }
  return result;
}

void expect_step(const std::map<std::string, Tensor>& got,
                 const std::map<std::string, Tensor>& want, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (const auto& [name, tensor] : want)
    expect_close(got.at(name), tensor, tolerance, concat(what, ", ", name));
}

class LoraLayouts : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
};

// Three layers of one input, as a group and one by one: y, dx, and dA and dB of each.
struct Projections {
  Linear q, k, v;
  std::vector<Linear*> all() { return {&q, &k, &v}; }
};

// Ranks 5 and 3, scalings that differ, none on k; biases on two of three.
Projections make_projections(DType dtype, Device device, int64_t in) {
  Projections p;
  uint64_t seed = 30;
  uint32_t module = 0;
  for (Linear* layer : p.all()) {
    const int64_t out = 40 - 9 * int64_t(module), r = 5 - int64_t(module);
    const auto draw = [&](Shape shape, DType type, double stddev) {
      return random_tensor(shape, type, ++seed, stddev).to(device);
    };
    layer->weight = Variable(draw({out, in}, dtype, 1 / std::sqrt(double(in))));
    if (module != 1) layer->bias = Variable(draw({out}, dtype, 1));
    if (module != 1) {
      layer->lora = std::make_unique<LoraPair>();
      layer->lora->a = Variable(draw({r, in}, DType::F32, 1 / std::sqrt(double(in))), true);
      layer->lora->b = Variable(draw({out, r}, DType::F32, 1 / std::sqrt(double(r))), true);
      layer->lora->scaling = module == 0 ? 1.25 : 0.5;
      layer->lora->module = module;
    }
    ++module;
  }
  return p;
}

// What a run gives, by name, on the CPU; y and dy by layer.
std::map<std::string, Tensor> run_projections(DType dtype, Device device, LoraLayout layout) {
  const int64_t T = 37, in = 51;
  Projections p = make_projections(dtype, device, in);
  const Variable x(random_tensor({T, in}, dtype, 1).to(device), true);
  std::map<std::string, Tensor> result;
  const auto dy_of = [&](int64_t layer, int64_t out) {
    return random_tensor({T, out}, dtype, 70 + uint64_t(layer)).to(device);
  };
  if (layout == LoraLayout::Plain) {
    int64_t i = 0;
    for (Linear* layer : p.all()) {
      const Variable y = layer->forward(x, {});
      result[concat("y", i)] = y.value().to(Device::CPU);
      backward(y, dy_of(i, y.shape()[1]));
      ++i;
    }
  } else {
    const LinearGroup group(p.all(), layout == LoraLayout::Bordered, false);
    std::vector<ScaledCopy> copies;
    group.add_border_copies(copies);
    backend_of(device).copy_scaled(copies);
    const Variable y = group.forward(x, {});
    Tensor dy = Tensor::empty(y.shape(), dtype, device);
    int64_t i = 0, begin = 0;
    for (Linear* layer : p.all()) {
      const int64_t end = begin + layer->out_features();
      result[concat("y", i)] = y.value().slice_cols(begin, end).to(Device::CPU).clone();
      Tensor part = dy.slice_cols(begin, end);
      backend_of(device).copy(part, dy_of(i, end - begin));
      begin = end;
      ++i;
    }
    backward(y, dy);
  }
  result["dx"] = x.grad().to(Device::CPU);
  for (Linear* layer : p.all())
    if (layer->lora) {
      result[concat("dA", layer->lora->module)] = layer->lora->a.grad().to(Device::CPU);
      result[concat("dB", layer->lora->module)] = layer->lora->b.grad().to(Device::CPU);
    }
  return result;
}

TEST_F(LoraLayouts, OfAGroupAgreeWithItsLayersOneByOne) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    std::map<std::string, Tensor> on_cpu;
    {
      const UseReferenceBackend reference;
      on_cpu = run_projections(dtype, Device::CPU, LoraLayout::Plain);
    }
    const auto plain = run_projections(dtype, Device::CUDA, LoraLayout::Plain);
    for (LoraLayout layout : kLayouts) {
      const auto got = run_projections(dtype, Device::CUDA, layout);
      expect_step(got, on_cpu, tolerance_of(dtype),
                  concat(name_of(layout), " against the CPU, ", dtype_name(dtype)));
      expect_step(got, plain, tolerance_of(dtype),
                  concat(name_of(layout), " against plain, ", dtype_name(dtype)));
    }
  }
}

TEST_F(LoraLayouts, AgreeWithThePlainLoopsOnTheCpu) {
  for (const Case& test : cases()) {
    std::map<std::string, Tensor> want;
    {
      const UseReferenceBackend reference;
      want = step(*make_model(test, DType::F32, Device::CPU, LoraLayout::Plain));
    }
    for (LoraLayout layout : kLayouts)
      expect_step(step(*make_model(test, DType::F32, Device::CUDA, layout)), want, 1e-4,
                  concat(test.name, ", ", name_of(layout)));
  }
}

// sqrt(sum (got - want)^2 / sum want^2) over all gradients.
double distance(const std::map<std::string, Tensor>& got,
                const std::map<std::string, Tensor>& want) {
  double error = 0, all = 0;
  for (const auto& [name, tensor] : want) {
    const auto g = got.at(name).to_doubles(), w = tensor.to_doubles();
    for (size_t i = 0; i < w.size(); ++i) {
      error += (g[i] - w[i]) * (g[i] - w[i]);
      all += w[i] * w[i];
    }
  }
  return std::sqrt(error / all);
}

// Through two layers BF16 rounds some fifty times, and the plain composition itself strays from
// F32. Merged rounds as it does and may differ by chance; bordered rounds once for base and adapter
// (in plain u, du and every term of a product are rounded) and must be nearer to F32 than plain.
TEST_F(LoraLayouts, AreInBf16AsNearToF32AsTheirRoundingsAllow) {
  for (const Case& test : cases()) {
    std::map<std::string, Tensor> want, loops;
    {
      const UseReferenceBackend reference;
      const auto model = make_model(test, DType::F32, Device::CPU, LoraLayout::Plain);
      struct Round : Visitor {
        void parameter(const std::string&, Variable& value) override {
          value.set_value(value.value().to(DType::BF16).to(DType::F32, Scope::Weights));
        }
      } round;
      model->visit("", round);  // the weights that BF16 has
      want = step(*model);
      loops = step(*make_model(test, DType::BF16, Device::CPU, LoraLayout::Plain));
    }
    const auto stray = [&](LoraLayout layout) {
      const auto got = step(*make_model(test, DType::BF16, Device::CUDA, layout));
      expect_close(got.at("loss"), want.at("loss"), 2e-2, concat(test.name, ", ", name_of(layout)));
      return distance(got, want);
    };
    const double plain = stray(LoraLayout::Plain), merged = stray(LoraLayout::Merged),
                 bordered = stray(LoraLayout::Bordered);
    // What BF16 costs by itself: plain loops, and the CPU's fast kernels.
    const double by_loops = distance(loops, want);
    const double by_cpu =
        distance(step(*make_model(test, DType::BF16, Device::CPU, LoraLayout::Plain)), want);
    EXPECT_GT(bordered, 0) << test.name;
    EXPECT_LT(plain, 1.5 * by_cpu) << test.name;
    EXPECT_LT(merged, 1.5 * by_cpu) << test.name;
    EXPECT_LT(merged, 1.25 * plain) << test.name;
    EXPECT_LT(bordered, plain) << test.name;
    EXPECT_LT(bordered, 1.25 * by_loops) << test.name;
  }
}

TEST_F(LoraLayouts, MergedDrawsTheMasksOfThePlainOne) {
  Case test = cases()[0];
  test.lora.lora_dropout = 0.3;
  const auto plain = step(*make_model(test, DType::F32, Device::CUDA, LoraLayout::Plain));
  const auto merged = step(*make_model(test, DType::F32, Device::CUDA, LoraLayout::Merged));
  expect_step(merged, plain, 1e-4, "merged");
  test.lora.lora_dropout = 0;
  const auto without = step(*make_model(test, DType::F32, Device::CUDA, LoraLayout::Plain));
  EXPECT_GT(std::abs(without.at("loss").item() - plain.at("loss").item()), 1e-3);
}

TEST_F(LoraLayouts, BorderedIsMergedWhereThereIsDropout) {
  Case test = cases()[0];
  auto model = make_model(test, DType::F32, Device::CUDA, LoraLayout::Plain);
  EXPECT_EQ(model->set_lora_layout(LoraLayout::Bordered), LoraLayout::Bordered);
  test.lora.lora_dropout = 0.3;
  model = make_model(test, DType::F32, Device::CUDA, LoraLayout::Plain);
  EXPECT_EQ(model->set_lora_layout(LoraLayout::Bordered), LoraLayout::Merged);
}

TEST_F(LoraLayouts, GiveTheSameBytesUnderCheckpointingAndTwice) {
  for (LoraLayout layout : kLayouts) {
    const auto model = make_model(cases()[0], DType::BF16, Device::CUDA, layout);
    const auto once = step(*model), again = step(*model), recomputed = step(*model, true);
    for (const auto& [name, tensor] : once) {
      expect_same_bytes(again.at(name), tensor, concat(name_of(layout), ", again, ", name));
      expect_same_bytes(recomputed.at(name), tensor, concat(name_of(layout), ", anew, ", name));
    }
  }
}

TEST_F(LoraLayouts, LeaveWeightsUnderTheirNamesWithTheirValues) {
  struct Collect : Visitor {
    std::map<std::string, Tensor> values;
    void parameter(const std::string& name, Variable& value) override {
      values[name] = value.value().to(Device::CPU).clone();
    }
  };
  Collect plain;
  make_model(cases()[0], DType::BF16, Device::CUDA, LoraLayout::Plain)->visit("", plain);
  for (LoraLayout layout : {LoraLayout::Merged, LoraLayout::Bordered}) {
    Collect other;
    make_model(cases()[0], DType::BF16, Device::CUDA, layout)->visit("", other);
    ASSERT_EQ(other.values.size(), plain.values.size());
    for (const auto& [name, value] : plain.values)
      expect_same_bytes(other.values.at(name), value, concat(name_of(layout), ", ", name));
  }
}

TEST_F(LoraLayouts, LeaveNoByteBehindAfterAStep) {
  const auto live = [] { return allocator_of(Device::CUDA).stats().live_total; };
  for (LoraLayout layout : kLayouts) {
    const auto model = make_model(cases()[0], DType::BF16, Device::CUDA, layout);
    step(*model);  // the table of angles is made
    const int64_t before = live();
    step(*model);
    EXPECT_EQ(live(), before) << name_of(layout);
  }
}

TEST_F(LoraLayouts, BordersFollowTheAdapters) {
  std::map<std::string, Tensor> results[2];
  for (int bordered : {0, 1}) {
    const auto model = make_model(cases()[0], DType::F32, Device::CUDA,
                                  bordered ? LoraLayout::Bordered : LoraLayout::Plain);
    std::vector<std::pair<std::string, Variable>> leaves;
    for (auto& [name, linear] : linear_layers(*model))
      if (linear->lora) {
        leaves.emplace_back(name + "A", linear->lora->a);
        leaves.emplace_back(name + "B", linear->lora->b);
      }
    ParameterBuffer parameters(leaves, Device::CUDA, Scope::Adapters);
    parameters.on_publish([&] { model->refresh_adapters(); });
    parameters.begin_step();
    const Variable before = model->loss(pack(kRows, kRows), training(), 0.125);
    parameters.add_loss(before.value());
    backward(before);
    // Steps by sign, so that what rounding does to a small gradient cannot grow.
    parameters.step({.learning_rate = 0.01,
                     .beta1 = 0.9,
                     .beta2 = 0.999,
                     .epsilon = 1e-2,
                     .weight_decay = 0,
                     .step = 1},
                    0);
    const Variable after = model->loss(pack(kRows, kRows), training(), 0.125);
    EXPECT_LT(after.value().item(), 0.95 * before.value().item());
    results[bordered]["loss"] = after.value().to(Device::CPU);
  }
  expect_close(results[1]["loss"], results[0]["loss"], 1e-4, "after a step");
}

// --- whole runs
// -----------------------------------------------------------------------------------

class LayoutRuns : public LoraLayouts {
 protected:
  void SetUp() override {
    LoraLayouts::SetUp();
    folder_ = std::filesystem::temp_directory_path() / concat("graft_layouts_", getpid());
    std::filesystem::create_directories(folder_);
    std::ofstream file(folder_ / "data.jsonl");
    for (const DemoItem& item : demo_split(1, 3, 1).train)
      file << nlohmann::json{{"prompt", item.prompt}, {"completion", item.completion}} << "\n";
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  TrainOptions options(DType dtype, LoraLayout layout, const std::string& name) {
    TrainOptions o;
    o.model = "models/demo";
    o.data = {(folder_ / "data.jsonl").string()};
    o.output_dir = (folder_ / name).string();
    o.device = TrainOptions::DeviceChoice::Cuda;
    o.dtype = dtype;
    o.lora_layout = layout;
    o.lora.r = 4;
    o.lora.lora_dropout = 0;
    o.lora.base_model_name_or_path = o.model;
    o.learning_rate = 2e-3;
    o.lr_scheduler_type = Schedule::Type::Constant;
    o.gradient_accumulation_steps = 1;
    o.max_seq_length = 32;
    o.max_steps = 3;
    o.save_steps = 0;
    return o;
  }
  std::string bytes(const std::string& file) {
    std::ostringstream text;
    text << std::ifstream(folder_ / file, std::ios::binary).rdbuf();
    return text.str();
  }
  std::filesystem::path folder_;
};

TEST_F(LayoutRuns, LoseAsThePlainOneDoes) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    TrainResult plain;
    for (LoraLayout layout : kLayouts) {
      const TrainResult run =
          finetune(options(dtype, layout, concat(name_of(layout), dtype_name(dtype))));
      ASSERT_EQ(run.losses.size(), 3u);
      if (layout == LoraLayout::Plain) plain = run;
      for (size_t i = 0; i < 3; ++i)
        EXPECT_NEAR(run.losses[i] / plain.losses[i], 1, dtype == DType::F32 ? 1e-5 : 2e-2)
            << name_of(layout) << ", step " << i + 1;
    }
  }
}

TEST_F(LayoutRuns, RepeatATunedRunByItsPlan) {
  if (!cublas_lt_functions()) GTEST_SKIP() << "there is no cublasLt";
  TrainOptions first = options(DType::F32, LoraLayout::Bordered, "first");
  first.tune = true;
  finetune(first);
  const std::string plan = bytes("first/gemm_plan.json");
  ASSERT_GT(nlohmann::json::parse(plan)["products"].size(), 10u);
  for (bool tune : {true, false}) {
    const std::string name = tune ? "second" : "third";
    TrainOptions again = options(DType::F32, LoraLayout::Bordered, name);
    again.tune = tune;
    std::filesystem::create_directories(again.output_dir);
    std::ofstream(folder_ / name / "gemm_plan.json") << plan;
    finetune(again);
    EXPECT_EQ(bytes(name + "/gemm_plan.json"), plan);
    EXPECT_EQ(bytes(name + "/adapter_model.safetensors"), bytes("first/adapter_model.safetensors"));
  }
}

}  // namespace
}  // namespace graft
