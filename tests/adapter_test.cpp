// Adapters on disk: those that peft 0.21.2 wrote load and give its logits (tests/golden/adapters),
// ours survive the round trip, and what is not understood is refused by name. That PEFT loads ours
// is checked by tests/golden/check_adapter.py.
#include "models/adapter.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "models/replaced_parameters.h"
#include "models/weights.h"
#include "tensor/safetensors.h"
#include "tests/golden_case.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

const std::string kGolden = "tests/golden/";

// The largest difference of the rows' logits, as a share of the largest golden logit.
double logits_error(Decoder& model, const Json& golden) {
  double worst = 0, largest = 0;
  for (size_t row = 0; row < golden["input_ids"].size(); ++row) {
    const PackedBatch batch = pack({golden["input_ids"][row].get<std::vector<int32_t>>()});
    const auto logits = model.logits(model.forward(batch, {}).value()).to_doubles();
    size_t i = 0;
    for (const auto& position : golden["logits"][row])
      for (const double expected : position) {
        worst = std::max(worst, std::abs(logits[i++] - expected));
        largest = std::max(largest, std::abs(expected));
      }
    EXPECT_EQ(i, logits.size());
  }
  return worst / largest;
}

std::vector<std::string> adapters(bool refused) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(kGolden + "adapters")) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("refused_") == refused) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

class WrittenByPeft : public testing::TestWithParam<std::string> {};

TEST_P(WrittenByPeft, GivesPeftsLogits) {
  const std::string directory = kGolden + "adapters/" + GetParam();
  const Json golden = golden_json(directory + "/golden.json");
  auto model = load_model(golden["model"]);
  const double without = logits_error(*model, golden);
  load_adapter(*model, directory);
  EXPECT_LT(logits_error(*model, golden), 1e-5);
  EXPECT_GT(without, 1e-2) << "the adapter of this case changes nothing: the test can't fail";
}

TEST_P(WrittenByPeft, SurvivesTheRoundTrip) {
  const std::string directory = kGolden + "adapters/" + GetParam();
  const Json golden = golden_json(directory + "/golden.json");
  const ScratchFolder scratch;
  {
    auto model = load_model(golden["model"]);
    const LoraConfig config = load_adapter(*model, directory);
    save_adapter(*model, config, scratch / "a");
  }
  auto model = load_model(golden["model"]);
  load_adapter(*model, scratch / "a");
  EXPECT_LT(logits_error(*model, golden), 1e-5);
  const SafetensorsFile theirs(directory + "/adapter_model.safetensors");
  const SafetensorsFile ours(scratch / "a/adapter_model.safetensors");
  size_t of_the_base = 0;  // PEFT keeps a copy of an embedding or a head beside an adapter on it
  for (const auto& entry : theirs.entries()) {
    if (entry.name.ends_with(".base_layer.weight")) {
      ++of_the_base;
      continue;
    }
    EXPECT_EQ(ours.tensor(entry.name).to_doubles(), theirs.tensor(entry.name).to_doubles())
        << entry.name;
  }
  EXPECT_EQ(ours.entries().size(), theirs.entries().size() - of_the_base);
}
INSTANTIATE_TEST_SUITE_P(Adapters, WrittenByPeft, testing::ValuesIn(adapters(false)),
                         [](const auto& info) { return info.param; });

class Refused : public testing::TestWithParam<std::string> {};

TEST_P(Refused, ByNameAndWhole) {
  const std::string directory = kGolden + "adapters/" + GetParam();
  const Json config = golden_json(directory + "/adapter_config.json");
  auto model = load_model(config["base_model_name_or_path"].get<std::string>());
  try {
    load_adapter(*model, directory);
    FAIL() << "was loaded";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(directory), std::string::npos) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
  }
  for (const auto& layer : adaptable_layers(*model)) EXPECT_EQ(layer.linear->lora, nullptr);
}
INSTANTIATE_TEST_SUITE_P(Adapters, Refused, testing::ValuesIn(adapters(true)),
                         [](const auto& info) { return info.param; });

// Each change to a good adapter that must be refused, and a word of the message.
TEST(Adapter, RefusesWhatDoesNotFitAndLeavesTheModelBare) {
  const std::string good = kGolden + "adapters/llama_gqa";
  const SafetensorsFile file(good + "/adapter_model.safetensors");
  std::vector<NamedTensor> tensors;
  for (const auto& entry : file.entries()) tensors.push_back({entry.name, file.tensor(entry.name)});

  struct Fault {
    const char* name;
    const char* message;
    std::function<void(std::vector<NamedTensor>&)> change;
  };
  const std::vector<Fault> faults = {
      {"missing half", "is missing", [](auto& t) { t.pop_back(); }},
      {"half of another module", "is missing",
       [](auto& t) {
         t.push_back({"base_model.model.x.lora_A.weight", t[0].tensor});
       }},
      {"DoRA vector", "DoRA",
       [](auto& t) {
         t.push_back({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
                      Tensor::zeros({32}, DType::F32)});
       }},
      {"transposed", "expected",
       [](auto& t) {
         t[0].tensor = t[0].tensor.reshape({t[0].tensor.size(1), t[0].tensor.size(0)});
       }},
      {"other rank", "expected",
       [](auto& t) {
         t[0].tensor = Tensor::zeros({1, 1}, DType::F32);
       }},
      {"NaN", "NaN",
       [](auto& t) {
         t[1].tensor = t[1].tensor.clone();
         t[1].tensor.template data<float>()[3] = std::nanf("");
       }},
      {"integers", "I32", [](auto& t) { t[0].tensor = Tensor::from_ints({1}, {1}); }},
  };
  auto model = load_model(kGolden + "models/llama_gqa");
  for (const auto& fault : faults) {
    SCOPED_TRACE(fault.name);
    const ScratchFolder scratch;
    fs::create_directories(scratch / "a");
    fs::copy_file(good + "/adapter_config.json", scratch / "a/adapter_config.json");
    auto changed = tensors;
    fault.change(changed);
    write_safetensors(scratch / "a/adapter_model.safetensors", changed);
    try {
      load_adapter(*model, scratch / "a");
      ADD_FAILURE() << "was loaded";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(fault.message), std::string::npos) << error.what();
    }
    for (const auto& layer : linear_layers(*model)) EXPECT_EQ(layer.linear->lora, nullptr);
  }
}

TEST(Adapter, OfPicklesAloneSaysWhatToDo) {
  const ScratchFolder scratch;
  fs::create_directories(scratch / "a");
  fs::copy_file(kGolden + "adapters/llama_gqa/adapter_config.json",
                scratch / "a/adapter_config.json");
  write_file_atomically(scratch / "a/adapter_model.bin", "PK");
  const auto model = load_model(kGolden + "models/llama_gqa");
  try {
    load_adapter(*model, scratch / "a");
    ADD_FAILURE() << "was loaded";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("safe_serialization=True"), std::string::npos)
        << error.what();
  }
}

TEST(Adapter, OfAnotherModelIsRefused) {
  auto model = load_model(kGolden + "models/llama_head_dim");
  EXPECT_THROW(load_adapter(*model, kGolden + "adapters/llama_gqa"), Error);
  EXPECT_THROW(load_adapter(*model, kGolden + "adapters/no_such_adapter"), Error);
}

// The other direction. tests/golden/written holds adapters that graft wrote, with graft's logits;
// PEFT loaded them and gave the same logits (check_adapter.py; its words are in peft.txt). The test
// holds graft to these files, byte by byte. GRAFT_WRITE_GOLDEN=1 writes them anew; then run
// check_adapter.py again.
struct Written {
  const char* name;
  const char* model;
  LoraConfig config;
};

std::vector<Written> written() {
  LoraConfig plain;
  plain.r = 4;
  plain.init_lora_weights = LoraConfig::Init::Random;
  LoraConfig patterns = plain;
  patterns.use_rslora = true;
  patterns.rank_pattern = {{"q_proj", 2}};
  patterns.alpha_pattern = {{"up_proj", 3.5}};
  patterns.layers_to_transform = {1};
  LoraConfig all = plain;
  all.target_modules = {"all-linear"};
  all.exclude_modules = {"layers.0.mlp.down_proj"};
  LoraConfig dora = patterns;
  dora.use_dora = true;
  LoraConfig regex = plain;
  regex.target_modules = {R"(.*\.1\..*(q|v)_proj)"};
  regex.target_is_regex = true;
  LoraConfig biases = plain;
  biases.target_modules = {"q_proj", "down_proj"};
  biases.bias = LoraConfig::Bias::All;
  LoraConfig whole = plain;
  whole.target_modules = {"v_proj"};
  whole.bias = LoraConfig::Bias::LoraOnly;
  whole.modules_to_save = {"lm_head", "norm"};
  return {{"plain", "qwen3_tied", plain},    {"biases", "llama_bias", biases},
          {"whole", "qwen2_tied", whole},    {"patterns", "llama_gqa", patterns},
          {"all_linear", "qwen2_tied", all}, {"dora", "qwen2_tied", dora},
          {"regex", "llama_gqa", regex}};
}

// Away from the norms, which are not of the same last bit on every machine.
void set_magnitudes(Decoder& model) {
  for (const auto& layer : linear_layers(model)) {
    if (!layer.linear->lora || !layer.linear->lora->magnitude.defined()) continue;
    const Tensor& m = layer.linear->lora->magnitude.value();
    for (int64_t i = 0; i < m.num_elements(); ++i) m.data<float>()[i] = 0.5f + float(i % 17) / 16;
  }
}

// Away from the base's.
void set_own_parameters(Decoder& model) {
  for (const ReplacedParameter& one : model.replaced)
    for (int64_t i = 0; i < one.own.shape().num_elements(); ++i)
      one.own.value().data<float>()[i] += float(i % 17 - 8) / 64;
}

TEST(Adapter, WritesTheFilesThatPeftHasRead) {
  auto tests = written();
  for (Written& test : tests) {
    SCOPED_TRACE(test.name);
    const std::string fixture = kGolden + "written/" + test.name;
    const bool write = std::getenv("GRAFT_WRITE_GOLDEN") != nullptr;
    const ScratchFolder scratch;
    const std::string directory = write ? fixture : scratch / "a";
    auto model = load_model(kGolden + "models/" + test.model);
    test.config.base_model_name_or_path = kGolden + "models/" + test.model;
    attach_lora(*model, test.config, 7);
    start_replaced_parameters(*model, test.config);
    set_magnitudes(*model);
    set_own_parameters(*model);
    save_adapter(*model, test.config, directory);
    for (const char* file : {"/adapter_config.json", "/adapter_model.safetensors"})
      EXPECT_EQ(golden_bytes(directory + file), golden_bytes(fixture + file)) << file;
    if (write) {
      Json logits = {{"input_ids", {{5, 17, 80, 3, 44, 9}}}, {"logits", {Json::array()}}};
      const PackedBatch batch = pack({{5, 17, 80, 3, 44, 9}});
      const Tensor rows = model->logits(model->forward(batch, {}).value());
      for (int64_t t = 0; t < rows.size(0); ++t) {
        const auto row = rows.slice_rows(t, t + 1).to_doubles();
        logits["logits"][0].push_back(std::vector<float>(row.begin(), row.end()));
      }
      std::ofstream(fixture + "/logits.json") << logits.dump();
      continue;  // peft.txt is check_adapter.py's
    }
    EXPECT_LT(logits_error(*model, golden_json(fixture + "/logits.json")), 1e-5);
    EXPECT_NE(golden_bytes(fixture + "/peft.txt").find("largest difference"), std::string::npos);
  }
}

// PEFT's forward and backward under our own masks: tests/golden/dropout.
TEST(Dropout, UnderOurMasksIsPefts) {
  const std::string directory = kGolden + "dropout";
  const Json golden = golden_json(directory + "/golden.json");
  auto model = load_model(golden["model"]);
  load_adapter(*model, directory + "/adapter");
  for (const auto& layer : linear_layers(*model))
    if (layer.linear->lora) layer.linear->lora->dropout_p = golden["p"];

  ForwardContext context;
  context.training = true;
  context.dropout.seed = golden["seed"];
  context.dropout.step = golden["step"];
  context.dropout.first_row = golden["first_row"];
  const auto ids = golden["input_ids"].get<std::vector<int32_t>>();
  const auto labels = golden["labels"].get<std::vector<int32_t>>();
  const PackedBatch batch = pack({ids}, {labels});
  const double count =
      double(std::count_if(labels.begin() + 1, labels.end(), [](int32_t l) { return l >= 0; }));
  const Variable loss = model->loss(batch, context, 1 / count);
  EXPECT_NEAR(loss.value().item(), golden["loss"].get<double>(),
              1e-5 * golden["loss"].get<double>());
  backward(loss);

  const SafetensorsFile gradients(directory + "/gradients.safetensors");
  int compared = 0;
  for (const auto& [name, linear] : linear_layers(*model)) {
    if (!linear->lora) continue;
    for (auto [variable, half] :
         {std::pair{&linear->lora->a, "lora_A"}, {&linear->lora->b, "lora_B"}}) {
      const auto expected =
          gradients.tensor(concat("base_model.model.", name, ".", half, ".weight")).to_doubles();
      const auto actual = variable->grad().to_doubles();
      ASSERT_EQ(actual.size(), expected.size());
      double worst = 0, largest = 0;
      for (size_t i = 0; i < expected.size(); ++i) {
        worst = std::max(worst, std::abs(actual[i] - expected[i]));
        largest = std::max(largest, std::abs(expected[i]));
      }
      EXPECT_LT(worst, 1e-4 * largest) << name << " " << half;
      ++compared;
    }
  }
  EXPECT_EQ(compared, 28);
}

// Off in evaluation: the context decides, not the adapter.
TEST(Dropout, IsOffOutsideTraining) {
  const Json golden = golden_json(kGolden + "adapters/qwen3_tied/golden.json");
  auto model = load_model(golden["model"]);
  load_adapter(*model, kGolden + "adapters/qwen3_tied");
  for (const auto& layer : linear_layers(*model))
    if (layer.linear->lora) layer.linear->lora->dropout_p = 0.5;
  EXPECT_LT(logits_error(*model, golden), 1e-5);
}

}  // namespace
}  // namespace graft
