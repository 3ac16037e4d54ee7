// mlx_lm/tuner/utils.py (load_adapters) and lora.py are the readers that this writes for.
#include "models/mlx_adapter.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "models/combine.h"
#include "models/json_file.h"
#include "tensor/backend.h"
#include "tensor/safetensors.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

const char* const kConfig = "adapter_config.json";
const char* const kWeights = "adapters.safetensors";

// The transpose of (rows, cols) F32, times alpha, in the left upper corner of (cols_out, rows_out).
Tensor transposed(const Tensor& t, double alpha, int64_t rows_out, int64_t cols_out) {
  Tensor result = Tensor::zeros({rows_out, cols_out}, DType::F32, Device::CPU, Scope::Adapters);
  const float* from = t.data<float>();
  for (int64_t r = 0; r < t.size(0); ++r)
    for (int64_t c = 0; c < t.size(1); ++c)
      result.data<float>()[c * cols_out + r] = float(alpha * from[r * t.size(1) + c]);
  return result;
}
Tensor transposed(const Tensor& t) { return transposed(t, 1, t.size(1), t.size(0)); }

// "self_attn.q_proj" of "model.layers.3.self_attn.q_proj".
std::string within_layer(const std::string& module) {
  const size_t at = module.find("layers.");
  return at == std::string::npos ? module : module.substr(module.find('.', at + 7) + 1);
}

// Whether every layer from 0 to the last one named has the same modules.
bool is_grid(const AdapterFile& file) {
  std::map<int64_t, std::set<std::string>> layers;
  for (const AdapterModule& module : file.modules)
    layers[layer_index(module.name)].insert(within_layer(module.name));
  int64_t expected = 0;
  for (const auto& [layer, names] : layers)
    if (layer != expected++ || names != layers.begin()->second) return false;
  return true;
}

Tensor read_half(const SafetensorsFile& file, const std::string& name) {
  CHECK(file.find(name), file.path(), ": tensor '", name,
        "' is missing, but its other half is there");
  CHECK(file.find(name)->shape.size() != 3, file.path(), ": tensor '", name,
        "' has 3 dimensions, expected 2; adapters of experts are not supported");
  return transposed(read_adapter_tensor(file, name, 2));
}

Tensor read_magnitude(const SafetensorsFile& file, const std::string& module, int64_t out) {
  const std::string name = module + ".m";
  CHECK(file.find(name), file.path(), ": tensor '", name,
        "' is missing, and fine_tune_type is dora");
  const Tensor value = read_adapter_tensor(file, name, 1);
  CHECK(value.size(0) == out, file.path(), ": tensor '", name, "' is ", value.shape(),
        ", expected (", out, ")");
  return value;
}

}  // namespace

bool is_mlx_adapter(const std::string& directory) {
  return fs::exists(fs::path(directory) / kWeights);
}

AdapterFile read_mlx_adapter(const std::string& directory) {
  const std::string path = (fs::path(directory) / kConfig).string();
  const nlohmann::json json = read_json_object(path);
  const std::string type = JsonReader(path, json).text("fine_tune_type", "lora");
  CHECK(type == "lora" || type == "dora", path, ": fine_tune_type is '", type,
        "', expected lora or dora");
  CHECK(json.contains("lora_parameters") && json["lora_parameters"].is_object(), path,
        ": lora_parameters is missing; expected the adapter_config.json of mlx-lm");
  const JsonReader parameters(path, json["lora_parameters"]);
  CHECK(parameters.has("scale"), path, ": lora_parameters has no scale");
  const double scale = parameters.number("scale", 0);

  AdapterFile adapter;
  adapter.directory = directory;
  const SafetensorsFile file((fs::path(directory) / kWeights).string());
  for (const SafetensorsEntry& entry : file.entries()) {
    if (type == "dora" && entry.name.ends_with(".m")) continue;  // with its A and B
    const bool is_a = entry.name.ends_with(".lora_a"), is_b = entry.name.ends_with(".lora_b");
    CHECK(is_a || is_b, file.path(), ": tensor '", entry.name,
          "' has no place in a LoRA adapter; expected names that end with lora_a and lora_b");
    const std::string module = entry.name.substr(0, entry.name.size() - 7);
    if (is_b) {
      CHECK(file.find(module + ".lora_a"), file.path(), ": tensor '", module,
            ".lora_a' is missing, but its other half is there");
      continue;
    }
    const Tensor a = read_half(file, entry.name), b = read_half(file, module + ".lora_b");
    CHECK(a.size(0) == b.size(1), file.path(), ": ", module, " has ranks ", a.size(0), " and ",
          b.size(1), " in its halves");
    adapter.modules.push_back({module, a, b, {}, scale});
    if (type == "dora") adapter.modules.back().magnitude = read_magnitude(file, module, b.size(0));
  }
  CHECK(!adapter.modules.empty(), file.path(), ": holds no LoRA tensors");
  adapter.config.use_dora = type == "dora";
  adapter.config.lora_dropout = parameters.number("dropout", 0);
  describe_modules(adapter, /*keep_targets=*/false);
  if (is_grid(adapter)) adapter.config.target_modules = short_names(adapter);
  return adapter;
}

void write_mlx_adapter(const AdapterFile& file, int64_t num_layers, const std::string& directory) {
  check_pairs_alone(file, "MLX's format");
  const double scale = file.modules.at(0).scaling;
  int64_t rank = 0, first = num_layers;
  std::set<std::string> keys;
  for (const AdapterModule& module : file.modules) {
    const int64_t layer = layer_index(module.name);
    CHECK(layer >= 0 && layer < num_layers, "convert: ", module.name,
          " is in no layer of a model of ", num_layers, " layers; mlx-lm adapts layers alone");
    rank = std::max(rank, module.a.size(0));
    first = std::min(first, layer);
    keys.insert(within_layer(module.name));
  }
  std::vector<NamedTensor> tensors;
  for (const AdapterModule& module : file.modules) {
    tensors.push_back({module.name + ".lora_a", transposed(module.a, 1, module.a.size(1), rank)});
    tensors.push_back({module.name + ".lora_b",
                       transposed(module.b, module.scaling / scale, rank, module.b.size(0))});
    if (module.magnitude.defined()) tensors.push_back({module.name + ".m", module.magnitude});
  }
  const nlohmann::json config = {
      {"fine_tune_type", has_dora(file) ? "dora" : "lora"},
      {"num_layers", num_layers - first},
      {"lora_parameters",
       {{"rank", rank}, {"scale", scale}, {"dropout", file.config.lora_dropout}, {"keys", keys}}}};
  fs::create_directories(directory);
  write_safetensors((fs::path(directory) / kWeights).string(), std::move(tensors), {},
                    {{"format", "mlx"}});
  write_file_atomically((fs::path(directory) / kConfig).string(), config.dump(4));
}

}  // namespace graft
