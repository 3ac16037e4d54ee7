// PEFT's file format, tensor by tensor; adapter_config.cpp has the configuration.
#include "models/adapter.h"

#include <cmath>
#include <filesystem>
#include <set>

#include "models/adapter_config.h"
#include "models/json_file.h"
#include "tensor/backend.h"
#include "tensor/safetensors.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

const char* const kConfigFile = "adapter_config.json";
const char* const kWeightsFile = "adapter_model.safetensors";

// By the name of a leaf (adapter_leaves): a magnitude's has no ".weight" on disk.
std::string tensor_name(const std::string& leaf) {
  const bool is_magnitude = leaf.ends_with(".lora_magnitude_vector");
  return concat("base_model.model.", leaf, is_magnitude ? "" : ".weight");
}

// The tensor as F32, checked against the shape that the model and the config imply.
Tensor read_half(const SafetensorsFile& file, const std::string& name, const Shape& shape) {
  const SafetensorsEntry* entry = file.find(name);
  CHECK(entry, file.path(), ": tensor '", name, "' is missing (", file.entries().size(),
        " tensors); is the file whole, and does adapter_config.json belong to it?");
  CHECK(entry->dtype == "F32" || entry->dtype == "BF16" || entry->dtype == "F16", file.path(),
        ": tensor '", name, "' is ", entry->dtype, ", expected F32, BF16 or F16");
  const Tensor tensor = file.tensor(name);
  CHECK(tensor.shape() == shape, file.path(), ": tensor '", name, "' is ", tensor.shape(),
        ", expected ", shape,
        " by the model and adapter_config.json; is this the base model of the adapter?");
  const Tensor value = tensor.to(DType::F32, Scope::Adapters);
  for (int64_t i = 0; i < value.num_elements(); ++i)
    CHECK(std::isfinite(value.data<float>()[i]), file.path(), ": tensor '", name,
          "' holds NaN or infinity at element ", i);
  return value;
}

void fill_pairs(const std::vector<NamedLinear>& layers, const SafetensorsFile& file) {
  std::set<std::string> expected;
  for (const auto& [name, linear] : layers) {
    if (!linear->lora) continue;
    for (const auto& [leaf, variable] : adapter_leaves(name, *linear->lora))
      expected.insert(tensor_name(leaf));
  }
  for (const auto& entry : file.entries()) {
    CHECK(expected.contains(entry.name) || !entry.name.ends_with(".lora_magnitude_vector"),
          file.path(), ": tensor '", entry.name,
          "' has no place: it belongs to a DoRA layer, and adapter_config.json has use_dora false "
          "or does not target it");
    CHECK(expected.contains(entry.name), file.path(), ": tensor '", entry.name,
          "' has no place in this model with this adapter_config.json; the adapter is refused");
  }
  for (const auto& [name, linear] : layers) {
    if (!linear->lora) continue;
    for (const auto& [leaf, variable] : adapter_leaves(name, *linear->lora)) {
      Tensor value = variable.value();
      backend_of(value).copy(value, read_half(file, tensor_name(leaf), value.shape()));
    }
  }
}

std::vector<std::string> short_names(const std::vector<NamedLinear>& layers) {
  std::set<std::string> names;
  for (const auto& [name, linear] : layers)
    if (linear->lora) names.insert(name.substr(name.rfind('.') + 1));
  return {names.begin(), names.end()};
}

}  // namespace

LoraConfig load_adapter_config(const std::string& directory) {
  const std::string path = (fs::path(directory) / kConfigFile).string();
  CHECK(fs::exists(path), path, ": no such file; expected the directory of a PEFT adapter");
  return parse_adapter_config(read_json_object(path), path);
}

LoraConfig load_adapter(Decoder& model, const std::string& directory) {
  const LoraConfig config = load_adapter_config(directory);
  const fs::path weights = fs::path(directory) / kWeightsFile;
  CHECK(fs::exists(weights) || !fs::exists(fs::path(directory) / "adapter_model.bin"), directory,
        ": holds adapter_model.bin alone, which graft does not read; save it again as safetensors "
        "(PEFT: model.save_pretrained with safe_serialization=True)");
  const SafetensorsFile file(weights.string());
  const auto layers = linear_layers(model);
  try {
    attach_lora(layers, config, 0);
    fill_pairs(layers, file);
    model.refresh_adapters();
  } catch (const Error& error) {
    for (const auto& layer : layers) layer.linear->lora.reset();  // never half an adapter
    const std::string text = error.what();
    if (text.find(directory) != std::string::npos) throw;
    fail(directory, ": ", text);
  }
  return config;
}

void save_adapter(Decoder& model, const LoraConfig& config, const std::string& directory) {
  std::vector<NamedTensor> tensors;
  const auto layers = linear_layers(model);
  for (const auto& [name, linear] : layers) {
    if (!linear->lora) continue;
    for (const auto& [leaf, variable] : adapter_leaves(name, *linear->lora))
      tensors.push_back({tensor_name(leaf), variable.value()});
  }
  CHECK(!tensors.empty(), "save_adapter: the model has no adapter");
  fs::create_directories(directory);
  // The weights first: a directory with a config alone would look whole to a reader.
  write_safetensors((fs::path(directory) / kWeightsFile).string(), std::move(tensors), DType::F32);
  write_file_atomically((fs::path(directory) / kConfigFile).string(),
                        format_adapter_config(config, short_names(layers)));
}

}  // namespace graft
