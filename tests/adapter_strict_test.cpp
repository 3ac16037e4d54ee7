// Adapters that do not fit: one line each, with what is wrong and what is nearest, and the model
// stays without any adapter.
#include <functional>

#include "models/adapter.h"
#include "models/weights.h"
#include "tests/golden_case.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Tensors = std::vector<NamedTensor>;

const std::string kGood = "tests/golden/adapters/llama_gqa";
const std::string kModel = "tests/golden/models/llama_gqa";
const std::string kQ = "base_model.model.model.layers.0.self_attn.q_proj";

struct Fault {
  const char* name;
  std::vector<std::string> parts;  // of the message
  std::function<void(Tensors&, Json&)> change;
};

NamedTensor& find(Tensors& tensors, const std::string& name) {
  for (NamedTensor& one : tensors)
    if (one.name == name) return one;
  throw Error("the test's tensor " + name + " is not there");
}

// What the names say.
std::vector<Fault> name_faults() {
  return {
      {"unknown key",
       {"'base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight' has no place",
        "nearest that has is 'base_model.model.model.layers.0.self_attn.q_proj.lora_"},
       [](Tensors& t, Json&) {
         t.push_back({kQ + ".lora_C.weight", t[0].tensor});
       }},
      {"misspelt module",
       {"'model.layers.0.self_attn.qq_proj'", "nearest module is 'model.layers.0.self_attn.q_proj'",
        "(32, 32)"},
       [](Tensors& t, Json& config) {
         for (const char* half : {".lora_A.weight", ".lora_B.weight"})
           find(t, kQ + half).name =
               "base_model.model.model.layers.0.self_attn.qq_proj" + std::string(half);
         config["target_modules"].push_back("qq_proj");
       }},
      {"a module that target_modules do not name",
       {"q_prj.lora_A.weight' has no place", "their nearest is 'q_proj'"},
       [](Tensors& t, Json&) {
         for (const char* half : {".lora_A.weight", ".lora_B.weight"})
           find(t, kQ + half).name =
               "base_model.model.model.layers.0.self_attn.q_prj" + std::string(half);
       }},
      {"misspelt half",
       {kQ + ".lora_A.weight' is missing",
        "is it 'base_model.model.model.layers.0.self_attn.qq_proj.lora_A.weight', misspelt?"},
       [](Tensors& t, Json&) {
         find(t, kQ + ".lora_A.weight").name =
             "base_model.model.model.layers.0.self_attn.qq_proj.lora_A.weight";
       }},
      {"names with the adapter's own, as in a state_dict",
       {".lora_A.default.weight' has no place",
        "expected names as 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'"},
       [](Tensors& t, Json&) {
         for (NamedTensor& one : t) one.name.insert(one.name.rfind(".weight"), ".default");
       }},
      {"DoRA's vector under another name",
       {kQ + ".lora_magnitude_vector.weight' has no place",
        "nearest that has is '" + kQ + ".lora_magnitude_vector'"},
       [](Tensors& t, Json& config) {
         t.push_back({kQ + ".lora_magnitude_vector.weight", Tensor::zeros({32}, DType::F32)});
         config["use_dora"] = true;
       }},
      {"missing A",
       {kQ + ".lora_A.weight' is missing", "is the file whole?"},
       [](Tensors& t, Json&) {
         std::erase_if(t, [](auto& one) { return one.name == kQ + ".lora_A.weight"; });
       }},
      {"missing B",
       {kQ + ".lora_B.weight' is missing", "is the file whole?"},
       [](Tensors& t, Json&) {
         std::erase_if(t, [](auto& one) { return one.name == kQ + ".lora_B.weight"; });
       }},
      {"missing module",
       {"'model.layers.0.self_attn.q_proj' are missing", "(13 modules are there)"},
       [](Tensors& t, Json&) {
         std::erase_if(t, [](auto& one) { return one.name.starts_with(kQ); });
       }},
      {"another family",
       {"'transformer.h.0.attn.c_attn'", "LlamaForCausalLM", "another model or family?"},
       [](Tensors& t, Json& config) {
         t = {{"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
               Tensor::zeros({4, 32}, DType::F32)},
              {"base_model.model.transformer.h.0.attn.c_attn.lora_B.weight",
               Tensor::zeros({96, 4}, DType::F32)}};
         config["target_modules"] = {"c_attn"};
       }},
      {"resized vocabulary",
       {"has 101 tokens, but the model has 96", "resized"},
       [](Tensors& t, Json&) {
         t.push_back(
             {"base_model.model.model.embed_tokens.weight", Tensor::zeros({101, 32}, DType::F32)});
       }},
  };
}

// What the tensors and the config say.
std::vector<Fault> tensor_faults() {
  return {
      {"transposed A",
       {kQ + ".lora_A.weight' is (32, 4), which looks transposed"},
       [](Tensors& t, Json&) {
         Tensor& a = find(t, kQ + ".lora_A.weight").tensor;
         a = a.reshape({32, 4});
       }},
      {"transposed B",
       {kQ + ".lora_B.weight' is (4, 32), which looks transposed"},
       [](Tensors& t, Json&) {
         Tensor& b = find(t, kQ + ".lora_B.weight").tensor;
         b = b.reshape({4, 32});
       }},
      {"r mismatch",
       {"is (4, 32), expected (8, 32) by r 8 of adapter_config.json"},
       [](Tensors&, Json& config) { config["r"] = 8; }},
      {"another width",
       {"'model.layers.0.self_attn.q_proj' has A (4, 48)", "expected (r, 32)"},
       [](Tensors& t, Json&) {
         find(t, kQ + ".lora_A.weight").tensor = Tensor::zeros({4, 48}, DType::F32);
       }},
      {"overlapping patterns",
       {"rank_pattern has two keys for model.layers.0.self_attn.q_proj"},
       [](Tensors&, Json& config) {
         config["rank_pattern"] = {{"q_proj", 4}, {"self_attn.q_proj", 4}};
       }},
      {"no lora_alpha",
       {"lora_alpha is null, expected a number"},
       [](Tensors&, Json& config) { config["lora_alpha"] = nullptr; }},
      {"NaN",
       {kQ + ".lora_B.weight' holds NaN or infinity at element 5"},
       [](Tensors& t, Json&) {
         Tensor& b = find(t, kQ + ".lora_B.weight").tensor;
         b = b.clone();
         b.data<float>()[5] = NAN;
       }},
      {"no LoRA at all", {"holds no LoRA tensors"}, [](Tensors& t, Json&) { t.clear(); }},
      {"DoRA's vector of another length",
       {"is (31), expected (32)"},
       [](Tensors& t, Json& config) {
         t.push_back({kQ + ".lora_magnitude_vector", Tensor::zeros({31}, DType::F32)});
         config["use_dora"] = true;
       }},
      {"DoRA's vector without use_dora",
       {"lora_magnitude_vector' has no place", "use_dora false"},
       [](Tensors& t, Json&) {
         t.push_back({kQ + ".lora_magnitude_vector", Tensor::zeros({32}, DType::F32)});
       }},
      {"use_dora without DoRA's vectors",
       {kQ + ".lora_magnitude_vector' is missing"},
       [](Tensors&, Json& config) { config["use_dora"] = true; }},
  };
}

TEST(StrictAdapter, SaysInOneLineWhatDoesNotFit) {
  const auto model = load_model(kModel);
  std::vector<Fault> faults = name_faults();
  for (const Fault& fault : tensor_faults()) faults.push_back(fault);
  for (const Fault& fault : faults) {
    SCOPED_TRACE(fault.name);
    const ScratchFolder scratch;
    Tensors tensors;
    {
      const SafetensorsFile file(kGood + "/adapter_model.safetensors");
      for (const SafetensorsEntry& entry : file.entries())
        tensors.push_back({entry.name, file.tensor(entry.name)});
    }
    Json config = golden_json(kGood + "/adapter_config.json");
    fault.change(tensors, config);
    fs::create_directories(scratch / "a");
    std::ofstream(scratch / "a/adapter_config.json") << config.dump();
    write_safetensors(scratch / "a/adapter_model.safetensors", tensors);
    const std::string error = error_of([&] { load_adapter(*model, scratch / "a"); });
    EXPECT_NE(error.find(scratch / "a"), std::string::npos) << error;
    for (const std::string& part : fault.parts)
      EXPECT_NE(error.find(part), std::string::npos)
          << "got      " << error << "\nexpected " << part;
    for (const NamedLinear& layer : linear_layers(*model)) EXPECT_EQ(layer.linear->lora, nullptr);
  }
}

TEST(StrictAdapter, RefusesAnUntrainedOneWhereAsked) {
  const ScratchFolder scratch;
  const auto model = load_model(kModel);
  LoraConfig config;
  config.r = 2;
  attach_lora(*model, config, 1);  // B is zero
  save_adapter(*model, config, scratch / "a");
  EXPECT_EQ(error_of([&] { load_adapter(*model, scratch / "a"); }), "");
  const std::string error =
      error_of([&] { load_adapter(*model, scratch / "a", {.allow_empty = false}); });
  EXPECT_NE(error.find("B is zero in all 14 modules"), std::string::npos) << error;
  EXPECT_NE(error.find("--allow-empty"), std::string::npos) << error;
}

}  // namespace
}  // namespace graft
