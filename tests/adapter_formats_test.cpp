// Adapters of mlx-lm and of llama.cpp. What mlx-lm wrote gives mlx-lm's logits; what graft writes
// is, byte by byte, what mlx-lm and gguf-py have read and found to say what PEFT's originals say
// (tests/golden/check_formats.py; its words are beside the files). GRAFT_WRITE_GOLDEN=1 writes them
// anew; then run check_formats.py again.
#include "models/gguf_adapter.h"
#include "models/mlx_adapter.h"

#include "models/adapter.h"
#include "models/combine.h"
#include "models/weights.h"
#include "tests/golden_case.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
const std::string kWritten = "tests/golden/written/";

class MadeByMlx : public testing::TestWithParam<const char*> {};

TEST_P(MadeByMlx, GivesMlxLogits) {
  const std::string directory = std::string("tests/golden/mlx/") + GetParam();
  const Json golden = golden_json(directory + "/golden.json");
  ASSERT_TRUE(is_mlx_adapter(directory));
  const ScratchFolder scratch;
  write_adapter(read_mlx_adapter(directory), scratch / "a");
  const auto model = load_model(golden["model"]);
  EXPECT_GT(worst_share(logits_of(*model, golden["input_ids"]), golden_numbers(golden["logits"])),
            1e-2);
  load_adapter(*model, scratch / "a");
  EXPECT_LT(worst_share(logits_of(*model, golden["input_ids"]), golden_numbers(golden["logits"])),
            1e-5);
}
INSTANTIATE_TEST_SUITE_P(Golden, MadeByMlx, testing::Values("all_layers", "last_layer", "dora"),
                         [](const auto& info) { return std::string(info.param); });

// Plain; rsLoRA and patterns in one layer of two; the same in all layers: ranks 2, 4, 6 and unlike
// scalings, which neither format can hold but folded.
class WrittenElsewhere : public testing::TestWithParam<const char*> {
 protected:
  void expect_same(const std::string& file, const std::string& fixture) const {
    if (std::getenv("GRAFT_WRITE_GOLDEN")) {
      fs::create_directories(fs::path(fixture).parent_path());
      fs::copy_file(file, fixture, fs::copy_options::overwrite_existing);
    }
    EXPECT_TRUE(golden_bytes(file) == golden_bytes(fixture)) << fixture;
  }
  std::string case_name() const { return GetParam(); }
  AdapterFile adapter() const { return read_adapter("tests/golden/adapters/" + case_name()); }
  ModelConfig model() const {
    return ModelConfig::load(
        golden_json("tests/golden/adapters/" + case_name() + "/golden.json")["model"]);
  }
};

TEST_P(WrittenElsewhere, IsWhatMlxHasRead) {
  const ScratchFolder scratch;
  write_mlx_adapter(adapter(), model().num_hidden_layers, scratch / "a");
  for (const char* file : {"/adapters.safetensors", "/adapter_config.json"})
    expect_same(scratch / "a" + file, kWritten + "mlx/" + case_name() + file);
  EXPECT_NE(golden_bytes(kWritten + "mlx/" + case_name() + ".txt").find("gives PEFT's logits"),
            std::string::npos);
}

TEST_P(WrittenElsewhere, IsWhatGgufHasRead) {
  const ScratchFolder scratch;
  if (has_dora(adapter())) {
    EXPECT_NE(error_of([&] {
                write_gguf_adapter(adapter(), model(), scratch / "a.gguf");
              }).find("llama.cpp does not load"),
              std::string::npos);
    return;
  }
  write_gguf_adapter(adapter(), model(), scratch / "a.gguf");
  expect_same(scratch / "a.gguf", kWritten + "gguf/" + case_name() + ".gguf");
  EXPECT_NE(golden_bytes(kWritten + "gguf/" + case_name() + ".txt").find("largest difference of"),
            std::string::npos);
}
INSTANTIATE_TEST_SUITE_P(Golden, WrittenElsewhere,
                         testing::Values("llama_gqa", "patterns", "patterns_all_layers",
                                         "dora_patterns"),
                         [](const auto& info) { return std::string(info.param); });

TEST(MlxAdapter, RefusesWhatItDoesNotKnow) {
  const std::string good = "tests/golden/mlx/last_layer";
  const auto refusal = [&](const std::function<void(Json&, std::vector<NamedTensor>&)>& change) {
    const ScratchFolder scratch;
    Json config = golden_json(good + "/adapter_config.json");
    std::vector<NamedTensor> tensors;
    const SafetensorsFile file(good + "/adapters.safetensors");
    for (const SafetensorsEntry& entry : file.entries())
      tensors.push_back({entry.name, file.tensor(entry.name)});
    change(config, tensors);
    fs::create_directories(scratch / "a");
    std::ofstream(scratch / "a/adapter_config.json") << config.dump();
    write_safetensors(scratch / "a/adapters.safetensors", tensors);
    return error_of([&] { read_mlx_adapter(scratch / "a"); });
  };
  EXPECT_EQ(refusal([](auto&, auto&) {}), "");
  const auto expect = [](const std::string& error, const std::string& part) {
    EXPECT_NE(error.find(part), std::string::npos) << error;
  };
  expect(refusal([](auto& c, auto&) { c["fine_tune_type"] = "full"; }),
         "'full', expected lora or dora");
  expect(refusal([](auto& c, auto&) { c["lora_parameters"].erase("scale"); }), "has no scale");
  expect(refusal([](auto& c, auto&) { c.erase("lora_parameters"); }), "lora_parameters is missing");
  expect(refusal([](auto&, auto& t) { t.pop_back(); }), "its other half is there");
  expect(refusal([](auto&, auto& t) { t.erase(t.begin()); }), "its other half is there");
  expect(refusal([](auto&, auto& t) {
           t.push_back({"model.norm.weight", t[0].tensor});
         }),
         "has no place");
  expect(refusal([](auto&, auto& t) {
           t[0].tensor = Tensor::zeros({2, 3, 4}, DType::F32);
         }),
         "adapters of experts");
  expect(refusal([](auto&, auto& t) {
           t[0].tensor = t[0].tensor.clone();
           t[0].tensor.template data<float>()[2] = NAN;
         }),
         "holds NaN or infinity at element 2");
}

TEST(GgufAdapter, RefusesModulesThatLlamaCppHasNoNameFor) {
  AdapterFile file;
  file.modules.push_back(
      {"lm_head", Tensor::zeros({1, 4}, DType::F32), Tensor::zeros({4, 1}, DType::F32), {}, 1});
  const ScratchFolder scratch;
  const ModelConfig model = ModelConfig::load("tests/golden/models/llama_gqa");
  EXPECT_NE(error_of([&] {
              write_gguf_adapter(file, model, scratch / "a.gguf");
            }).find("lm_head has no name in GGUF"),
            std::string::npos);
  EXPECT_FALSE(fs::exists(scratch / "a.gguf"));
}

}  // namespace
}  // namespace graft
