// Biases and whole modules that an adapter has of its own: read as PEFT wrote them
// (tests/golden/adapters/bias_*, whole_*), put on and taken off, trained, resumed, merged; and what
// does not fit is refused. tests/trajectory_test.cpp has the training by PEFT.
#include "models/replaced_parameters.h"

#include <functional>

#include "models/adapter_stack.h"
#include "models/combine.h"
#include "models/merge.h"
#include "models/weights.h"
#include "tests/golden_case.h"
#include "train/memory_plan.h"
#include "train/run_setup.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Tensors = std::vector<NamedTensor>;

const std::string kAdapters = "tests/golden/adapters/", kModels = "tests/golden/models/";
const Json kRow = {{5, 17, 80, 3, 44, 9, 61, 12}};

class OwnParameters : public testing::TestWithParam<const char*> {
 protected:
  std::string directory() const { return kAdapters + GetParam(); }
  Json golden() const { return golden_json(directory() + "/golden.json"); }
};

TEST_P(OwnParameters, GoWithTheAdapterAndComeBack) {
  const Json golden = this->golden();
  const std::vector<double> wanted = golden_numbers(golden["logits"]);
  auto model = load_model(golden["model"]);
  const std::vector<double> bare = logits_of(*model, golden["input_ids"]);
  const bool tied = model->is_tied();
  AdapterStack stack(*model);
  const int64_t id = stack.attach(directory());
  EXPECT_LT(worst_share(logits_of(*model, golden["input_ids"]), wanted), 1e-5);
  stack.set_weight(id, 0);
  EXPECT_EQ(logits_of(*model, golden["input_ids"]), bare);
  stack.set_weight(id, 1);
  EXPECT_LT(worst_share(logits_of(*model, golden["input_ids"]), wanted), 1e-5);
  stack.detach(id);
  EXPECT_EQ(logits_of(*model, golden["input_ids"]), bare);
  EXPECT_EQ(model->is_tied(), tied);
  EXPECT_TRUE(model->replaced.empty());
}

TEST_P(OwnParameters, GiveWayToTheNextAdapter) {
  const Json golden = this->golden();
  std::string plain = kAdapters + golden["model"].get<std::string>().substr(kModels.size());
  if (!fs::exists(plain)) plain = kAdapters + "dora_bias";  // what there is on llama_bias
  auto model = load_model(golden["model"]);
  load_adapter(*model, plain);
  const std::vector<double> wanted = logits_of(*model, kRow);
  load_adapter(*model, directory());
  EXPECT_GT(worst_share(logits_of(*model, kRow), wanted), 1e-2);
  load_adapter(*model, plain);
  EXPECT_EQ(logits_of(*model, kRow), wanted);
}

TEST_P(OwnParameters, AreMerged) {
  const Json golden = this->golden();
  const ScratchFolder scratch;
  const AdapterFile file = read_adapter(directory());
  bool tied = true;
  for (const auto& [name, own] : file.replaced) tied = tied && is_bias(name);
  for (const bool attached : {false, true}) {  // the command puts the adapter on first
    const auto base = load_model(golden["model"]);
    const bool was_tied = base->is_tied();
    AdapterStack stack(*base);
    if (attached) stack.put_on(file);
    const std::string folder = scratch / (attached ? "attached" : "bare");
    write_merged(*base, golden["model"], {{file, 1}}, DType::F32, folder);
    auto merged = load_model(folder);
    EXPECT_LT(
        worst_share(logits_of(*merged, golden["input_ids"]), golden_numbers(golden["logits"])),
        1e-5);
    EXPECT_EQ(ModelConfig::load(folder).tie_word_embeddings, was_tied && tied);
    EXPECT_EQ(merged->is_tied(), was_tied && tied);
    EXPECT_NE(error_of([&] {
                write_merged(*base, golden["model"], {{file, 0.5}}, DType::F32, scratch / "half");
              }),
              "");
  }
}

TEST_P(OwnParameters, AreCountedAsPeftDoes) {
  const Json golden = this->golden();
  TrainOptions options;
  options.model = golden["model"];
  options.max_seq_length = 16;
  options.lora = load_adapter_config(directory());
  const MemoryPlan plan = plan_memory(ModelConfig::load(options.model), options, DType::F32);
  EXPECT_EQ(trainable_parameters_line(plan.trainable_parameters, plan.all_parameters),
            golden["parameters_line"].get<std::string>());
  EXPECT_EQ(plan.replaced.size(), read_adapter(directory()).replaced.size());
}

// Their values are those of the file in F32; in BF16 matrices are rounded, biases and norms are
// not.
TEST_P(OwnParameters, KeepVectorsInF32) {
  const AdapterFile file = read_adapter(directory());
  auto model = load_model(golden()["model"], DType::BF16);
  load_adapter(*model, directory());
  ASSERT_EQ(model->replaced.size(), file.replaced.size());
  for (const ReplacedParameter& one : model->replaced)
    EXPECT_EQ(one.own.value().dtype(), one.own.shape().rank() == 1 ? DType::F32 : DType::BF16)
        << one.name;
  const std::vector<double> logits = logits_of(*model, golden()["input_ids"]);
  EXPECT_LT(worst_share(logits, golden_numbers(golden()["logits"])), 4e-2);
}
INSTANTIATE_TEST_SUITE_P(Golden, OwnParameters,
                         testing::Values("bias_lora_only", "bias_all", "whole_head",
                                         "whole_embeddings_of_tied", "whole_head_of_tied"),
                         [](const auto& info) { return std::string(info.param); });

TEST(OwnParametersStack, AddToPlainAdapters) {
  const ScratchFolder scratch;
  const std::string model = kModels + "qwen2_tied", biased = kAdapters + "bias_lora_only";
  const auto base = load_model(model);
  write_merged(*base, model, {{read_adapter(biased), 1}}, DType::F32, scratch / "m");
  auto merged = load_model(scratch / "m");
  AdapterStack on_merged(*merged), on_base(*base);
  on_merged.attach(kAdapters + "qwen2_tied", 0.5, {.allow_other_base = true});
  on_base.attach(kAdapters + "qwen2_tied", 0.5);
  on_base.attach(biased);
  EXPECT_LT(worst_share(logits_of(*base, kRow), logits_of(*merged, kRow)), 1e-5);
}

TEST(OwnParametersStack, StandAloneAndUnweighted) {
  auto model = load_model(kModels + "qwen2_tied");
  const std::vector<double> bare = logits_of(*model, kRow);
  const std::string biased = kAdapters + "bias_lora_only";
  AdapterStack stack(*model);
  const auto says = [](const std::string& error, const std::string& part) {
    EXPECT_NE(error.find(part), std::string::npos) << error;
  };
  says(error_of([&] { stack.attach(biased, 0.5); }), "its weight must be 1, and is 0.5");
  EXPECT_EQ(logits_of(*model, kRow), bare);
  const int64_t id = stack.attach(biased);
  const std::vector<double> with = logits_of(*model, kRow);
  says(error_of([&] { stack.attach(biased); }), "so has another adapter on the model");
  says(error_of([&] { stack.set_weight(id, 2); }), "must be 1, or 0 for off");
  EXPECT_EQ(logits_of(*model, kRow), with);
  stack.detach(id);
  EXPECT_EQ(logits_of(*model, kRow), bare);
  const AdapterFile file = read_adapter(biased);
  says(error_of([&] { combine_cat({{file, 1}}); }), "which is no sum of matrices");
  says(error_of([&] { combine_svd({{file, 1}}, 2); }), "which is no sum of matrices");
}

// A trained one of its own beside a frozen one: each keeps to its names.
TEST(OwnParametersStack, LeaveTheTrainedOnesAlone) {
  auto model = load_model(kModels + "qwen2_tied");
  load_adapter(*model, kAdapters + "whole_embeddings_of_tied");
  const std::vector<double> trained = logits_of(*model, kRow);
  AdapterStack stack(*model);
  const int64_t id = stack.attach(kAdapters + "bias_lora_only");
  EXPECT_GT(worst_share(logits_of(*model, kRow), trained), 1e-2);
  const auto leaves = trained_leaves(*model, TrainOptions::Method::Lora);
  for (const auto& [name, leaf] : leaves) EXPECT_FALSE(is_bias(name)) << name;
  EXPECT_EQ(leaves.size(), 1u + 2 * 14);
  stack.detach(id);
  EXPECT_EQ(logits_of(*model, kRow), trained);
}

TEST(OwnParametersLayout, StaysPlainWhereBiasesAreTrained) {
  auto model = load_model(kModels + "qwen2_tied");
  LoraConfig config;
  config.lora_dropout = 0;
  config.modules_to_save = {"lm_head"};
  attach_fresh_adapter(*model, config, 1);
  EXPECT_EQ(model->set_lora_layout(LoraLayout::Merged), LoraLayout::Merged);
  model = load_model(kModels + "qwen2_tied");
  config.bias = LoraConfig::Bias::LoraOnly;
  attach_fresh_adapter(*model, config, 1);
  EXPECT_EQ(model->set_lora_layout(LoraLayout::Merged), LoraLayout::Plain);
}

TEST(OwnParametersConfig, RefusesWhatThereIsNot) {
  const auto error = [](const std::string& name, const std::function<void(LoraConfig&)>& change) {
    auto model = load_model(kModels + name);
    LoraConfig config;
    change(config);
    return error_of([&] { attach_fresh_adapter(*model, config, 1); });
  };
  const auto says = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  using Bias = LoraConfig::Bias;
  says(error("llama_gqa", [](auto& c) { c.bias = Bias::All; }), "the model has no biases");
  says(error("qwen2_tied",
             [](auto& c) {
               c.bias = Bias::LoraOnly;
               c.target_modules = {"o_proj"};
             }),
       "no adapted layer has a bias");
  const auto whole = [&](const std::string& entry) {
    return error("llama_gqa", [&](auto& c) { c.modules_to_save = {entry}; });
  };
  says(whole("classifier"), "names 'classifier', which is no module of the model");
  says(whole("up_proj"), "matches model.layers.0.mlp.up_proj; lm_head, embed_tokens and norms");
  says(whole("mlp"), "matches model.layers.0.mlp; lm_head");
  says(whole(""), "empty name");
  EXPECT_EQ(whole("layernorm"), "");
  // Nothing in a module that is trained whole is adapted, whatever target_modules say.
  auto model = load_model(kModels + "llama_gqa");
  LoraConfig config;
  config.target_modules = {"lm_head", "q_proj"};
  config.modules_to_save = {"lm_head"};
  EXPECT_EQ(attach_fresh_adapter(*model, config, 1).size(), 2u);
  EXPECT_EQ(model->lm_head.lora, nullptr);
}

// --- training
// ------------------------------------------------------------------------

class OwnParametersTraining : public testing::Test {
 protected:
  static TrainOptions options() {
    TrainOptions o;
    o.model = kModels + "qwen2_tied";
    o.learning_rate = 1e-2;
    o.max_steps = 6;
    o.save_steps = 0;
    o.warmup_steps = 1;
    o.lora.r = 4;
    o.lora.target_modules = {"q_proj", "up_proj"};
    o.lora.bias = LoraConfig::Bias::All;
    o.lora.modules_to_save = {"lm_head", "embed_tokens", "norm"};
    return o;
  }
  static TrainData rows() {
    TrainData data;
    for (int i = 0; i < 8; ++i) {
      std::vector<int32_t> ids;
      for (int t = 0; t < 9 + i % 3; ++t) ids.push_back(3 + (7 * i + t * (1 + i % 3)) % 90);
      data.train.rows.push_back({ids, ids});
    }
    data.eval = data.train;
    return data;
  }
  TrainResult run(TrainOptions o, const std::string& name) {
    o.output_dir = scratch_ / name;
    return finetune(o, rows());
  }
  std::string bytes(const std::string& name) const {
    return golden_bytes(scratch_ / (name + "/adapter_model.safetensors"));
  }
  ScratchFolder scratch_;
};

TEST_F(OwnParametersTraining, ResumesWithTheSameBytesAndLoads) {
  for (const DType dtype : {DType::F32, DType::BF16})
    for (const auto optim : {TrainOptions::Optimizer::AdamW, TrainOptions::Optimizer::AdamW8bit}) {
      const std::string name = concat(dtype_name(dtype), int(optim));
      SCOPED_TRACE(name);
      TrainOptions o = options();
      o.dtype = dtype;
      o.optim = optim;
      o.save_steps = 3;
      const TrainResult whole = run(o, name);
      EXPECT_LT(*whole.last_eval_loss, *whole.first_eval_loss);
      const std::string wanted = bytes(name);
      fs::remove_all(scratch_ / (name + "/checkpoint-6"));
      fs::remove(scratch_ / (name + "/adapter_model.safetensors"));
      o.resume = true;
      EXPECT_EQ(run(o, name).losses.size(), 3u);
      EXPECT_EQ(bytes(name), wanted);
      // A run that starts from it begins where this one has ended.
      TrainOptions next = o;
      next.resume = false;
      next.adapter = scratch_ / name;
      const TrainResult further = run(next, name + "_further");
      EXPECT_NEAR(*further.first_eval_loss, *whole.last_eval_loss,
                  dtype == DType::F32 ? 1e-6 : 1e-3);
    }
}

TEST_F(OwnParametersTraining, CheckpointingGivesTheSameBytes) {
  TrainOptions o = options();
  o.lora.modules_to_save = {"embed_tokens", "norm"};
  run(o, "plain");
  o.gradient_checkpointing = true;
  run(o, "checkpointing");
  EXPECT_EQ(bytes("checkpointing"), bytes("plain"));
}

TEST_F(OwnParametersTraining, GoesWithDora) {
  TrainOptions o = options();
  o.lora.modules_to_save = {"lm_head"};
  o.method = TrainOptions::Method::Dora;
  o.lora.lora_dropout = 0.1;
  const TrainResult result = run(o, "dora");
  EXPECT_LT(*result.last_eval_loss, *result.first_eval_loss);
  auto model = load_model(o.model);
  load_adapter(*model, scratch_ / "dora");
  const std::vector<double> wanted = logits_of(*model, kRow);
  write_merged(*load_model(o.model), o.model, {{read_adapter(scratch_ / "dora"), 1}}, DType::F32,
               scratch_ / "m");
  EXPECT_LT(worst_share(logits_of(*load_model(scratch_ / "m"), kRow), wanted), 1e-5);
}

TEST_F(OwnParametersTraining, GoesOnAQuantisedBase) {
  TrainOptions o = options();
  o.model = "tests/golden/quantised/base";
  o.method = TrainOptions::Method::Qlora;
  o.lora.bias = LoraConfig::Bias::None;
  o.dtype = DType::F32;
  const TrainResult result = run(o, "qlora");
  EXPECT_LT(*result.last_eval_loss, *result.first_eval_loss);
  const Quantisation nf4{true, true};
  auto model = load_model(o.model, DType::F32, Device::CPU, nf4);
  load_adapter(*model, scratch_ / "qlora");
  const std::vector<double> wanted = logits_of(*model, kRow);
  write_merged(*load_model(o.model, DType::F32, Device::CPU, nf4), o.model,
               {{read_adapter(scratch_ / "qlora"), 1}}, DType::F32, scratch_ / "m");
  EXPECT_LT(worst_share(logits_of(*load_model(scratch_ / "m"), kRow), wanted), 1e-5);
}

// --- files that do not fit
// ------------------------------------------------------------------------

struct Fault {
  const char* name;
  const char* adapter;
  const char* part;  // of the message
  std::function<void(Tensors&, Json&)> change;
};

const std::string kPrefix = "base_model.model.";
const std::string kQBias = kPrefix + "model.layers.0.self_attn.q_proj.base_layer.bias";
const std::string kKBias = kPrefix + "model.layers.1.self_attn.k_proj.bias";
const std::string kHead = kPrefix + "lm_head.weight";

NamedTensor& find(Tensors& tensors, const std::string& name) {
  for (NamedTensor& one : tensors)
    if (one.name == name) return one;
  throw Error("the test's tensor " + name + " is not there");
}
void drop(Tensors& tensors, const std::string& name) {
  find(tensors, name);
  std::erase_if(tensors, [&](const auto& one) { return one.name == name; });
}
void put(Tensors& tensors, const std::string& name, Shape shape) {
  tensors.push_back({name, Tensor::zeros(shape, DType::F32)});
}

std::vector<Fault> faults() {
  return {
      {"missing bias", "bias_lora_only",
       "the tensor of 'model.layers.0.self_attn.q_proj.bias' is missing, but bias of",
       [](Tensors& t, Json&) { drop(t, kQBias); }},
      {"missing bias beside the adapters", "bias_all",
       "the tensor of 'model.layers.1.self_attn.k_proj.bias' is missing",
       [](Tensors& t, Json&) { drop(t, kKBias); }},
      {"short bias", "bias_lora_only", "q_proj.bias' is (31), expected (32)",
       [](Tensors& t, Json&) { find(t, kQBias).tensor = Tensor::zeros({31}, DType::F32); }},
      {"matrix as bias", "bias_lora_only", "q_proj.base_layer.bias' has 2 dimensions, expected 1",
       [](Tensors& t, Json&) {
         find(t, kQBias).tensor = Tensor::zeros({32, 1}, DType::F32);
       }},
      {"NaN", "bias_lora_only", "base_layer.bias' holds NaN or infinity at element 3",
       [](Tensors& t, Json&) {
         Tensor& bias = find(t, kQBias).tensor;
         bias = bias.clone();
         bias.data<float>()[3] = NAN;
       }},
      {"bias of a layer without one", "bias_lora_only",
       "'model.layers.0.self_attn.o_proj.bias' has no place in this model",
       [](Tensors& t, Json&) {
         put(t, kPrefix + "model.layers.0.self_attn.o_proj.base_layer.bias", {32});
       }},
      {"bias that the config does not ask for", "bias_lora_only", "bias' has no place",
       [](Tensors&, Json& config) { config["bias"] = "none"; }},
      {"bias beside the adapters with lora_only", "bias_all", "bias' has no place",
       [](Tensors&, Json& config) { config["bias"] = "lora_only"; }},
      {"bias of an adapted layer under its bare name", "bias_lora_only", "bias' has no place",
       [](Tensors& t, Json&) {
         find(t, kQBias).name = kPrefix + "model.layers.0.self_attn.q_proj.bias";
       }},
      {"unknown kind of bias", "bias_all", "bias is \"some\", expected",
       [](Tensors&, Json& config) { config["bias"] = "some"; }},
      {"missing module", "whole_head",
       "the tensor of 'lm_head.weight' is missing, but modules_to_save of",
       [](Tensors& t, Json&) { drop(t, kHead); }},
      {"resized vocabulary", "whole_head", "'lm_head.weight' is (97, 32), expected (96, 32)",
       [](Tensors& t, Json&) {
         find(t, kHead).tensor = Tensor::zeros({97, 32}, DType::F32);
       }},
      {"vector as matrix", "whole_head", "'lm_head.weight' is (96), expected (96, 32)",
       [](Tensors& t, Json&) { find(t, kHead).tensor = Tensor::zeros({96}, DType::F32); }},
      {"unknown module", "whole_head", "names 'score', which is no module of the model",
       [](Tensors&, Json& config) { config["modules_to_save"].push_back("score"); }},
      {"modules_to_save is text", "whole_head", "expected a list of names",
       [](Tensors&, Json& config) { config["modules_to_save"] = "lm_head"; }},
      {"module that the config does not ask for", "whole_head", "has no place",
       [](Tensors&, Json& config) { config["modules_to_save"] = nullptr; }},
      {"wrapped module", "whole_head", "lm_head.base_layer.weight' has no place",
       [](Tensors& t, Json&) {
         put(t, kPrefix + "lm_head.base_layer.weight", {96, 32});
       }},
      {"tied in the adapter", "whole_embeddings_of_tied", "ensure_weight_tying is true",
       [](Tensors&, Json& config) { config["ensure_weight_tying"] = true; }},
  };
}

TEST(OwnParametersFile, IsRefusedInOneLineAndLeavesTheModelBare) {
  for (const Fault& fault : faults()) {
    SCOPED_TRACE(fault.name);
    const std::string good = kAdapters + fault.adapter;
    const ScratchFolder scratch;
    Tensors tensors;
    {
      const SafetensorsFile file(good + "/adapter_model.safetensors");
      for (const SafetensorsEntry& entry : file.entries())
        tensors.push_back({entry.name, file.tensor(entry.name)});
    }
    Json config = golden_json(good + "/adapter_config.json");
    fault.change(tensors, config);
    fs::create_directories(scratch / "a");
    std::ofstream(scratch / "a/adapter_config.json") << config.dump();
    write_safetensors(scratch / "a/adapter_model.safetensors", tensors);
    auto model = load_model(golden_json(good + "/golden.json")["model"]);
    const std::vector<double> bare = logits_of(*model, kRow);
    for (const bool stacked : {false, true}) {
      AdapterStack stack(*model);
      const std::string error = error_of([&] {
        if (stacked)
          stack.attach(scratch / "a");
        else
          load_adapter(*model, scratch / "a");
      });
      EXPECT_NE(error.find(scratch / "a"), std::string::npos) << error;
      EXPECT_NE(error.find(fault.part), std::string::npos)
          << "got      " << error << "\nexpected " << fault.part;
      EXPECT_TRUE(model->replaced.empty());
      EXPECT_EQ(logits_of(*model, kRow), bare);
    }
  }
}

}  // namespace
}  // namespace graft
