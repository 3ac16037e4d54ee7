// PEFT's file format, tensor by tensor; adapter_config.cpp has the configuration.
#include "models/adapter_file.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>
#include <set>

#include "models/adapter_config.h"
#include "models/json_file.h"
#include "models/nearest_name.h"
#include "tensor/safetensors.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

const char* const kConfigFile = "adapter_config.json";
const char* const kWeightsFile = "adapter_model.safetensors";
const std::string& kPrefix = kAdapterPrefix;
const std::string kA = ".lora_A.weight", kB = ".lora_B.weight",
                  kMagnitude = ".lora_magnitude_vector", kBaseLayer = ".base_layer",
                  kBias = ".bias", kWeight = ".weight";
const std::string kTokenRows = "model.embed_tokens.token_adapter.trainable_tokens_delta";
const std::string kEmbeddingA = ".lora_embedding_A", kEmbeddingB = ".lora_embedding_B";

// Orders modules as a model computes them: by layer number, then q, k, v, o, gate, up, down.
std::pair<int64_t, std::string> model_order(const std::string& name) {
  static const std::array<const char*, 7> order = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                   "gate_proj", "up_proj", "down_proj"};
  const std::string last = name.substr(name.rfind('.') + 1);
  const auto place = std::find(order.begin(), order.end(), last) - order.begin();
  return {layer_index(name), std::string(1, char('0' + place)) + name};
}

bool is_whole_embedding(const std::string& name) {
  for (const char* end : {"embed_tokens.weight", "embed_tokens.base_layer.weight", "lm_head.weight",
                          "lm_head.base_layer.weight"})
    if (name.ends_with(end)) return true;
  return false;
}

Tensor transposed(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const Tensor from = matrix.to(Device::CPU);
  Tensor to = Tensor::empty({columns, rows}, DType::F32, Device::CPU, Scope::Adapters);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      to.data<float>()[j * rows + i] = from.data<float>()[i * columns + j];
  return to;
}

class Reader {
 public:
  Reader(AdapterFile& adapter, const SafetensorsFile& file) : adapter_(adapter), file_(file) {}

  void read() {
    sort_names();
    CHECK(!halves_.empty(), file_.path(), ": holds no LoRA tensors (", file_.entries().size(),
          " others); is it the adapter_model.safetensors of a LoRA adapter?");
    for (auto& [module, tensors] : halves_) {
      const std::string& there = *std::find_if(tensors.begin(), tensors.end(),
                                               [](const auto& name) { return !name.empty(); });
      for (size_t half : {0, 1})
        if (tensors[half].empty())
          fail(file_.path(), ": tensor '", half_name(module, half), "' is missing, but '", there,
               "' is there; ", misspelt_half(module, half), "is the file whole?");
    }
    std::vector<std::string> names;
    for (const auto& [module, tensors] : halves_) names.push_back(module);
    std::sort(names.begin(), names.end(),
              [](auto& a, auto& b) { return model_order(a) < model_order(b); });
    const std::vector<LoraTarget> targets = targets_of(names);
    for (size_t i = 0; i < names.size(); ++i) {
      CHECK(i < targets.size() && targets[i].name == names[i], file_.path(), ": tensor '",
            halves_[names[i]][0],
            "' has no place: target_modules of adapter_config.json do not "
            "name ",
            names[i], nearest_target(names[i]),
            adapter_.config.modules_to_save.empty() ? "" : ", or modules_to_save takes it out",
            "; do the two files belong together?");
      read_module(targets[i]);
    }
    read_tokens();
  }

 private:
  static std::string half_name(const std::string& module, size_t half) {
    const std::string& suffix =
        is_embedding(module) ? (half ? kEmbeddingB : kEmbeddingA) : (half ? kB : kA);
    return kPrefix + module + suffix;
  }

  // What stands in the file instead, perhaps: the same half of a module that has no other.
  std::string misspelt_half(const std::string& module, size_t half) const {
    std::vector<std::string> alone;
    for (const auto& [other, tensors] : halves_)
      if (tensors[1 - half].empty() && !tensors[half].empty() && other != module)
        alone.push_back(tensors[half]);
    const std::string nearest = nearest_name(half_name(module, half), alone);
    return nearest.empty() ? "" : concat("is it '", nearest, "', misspelt? else ");
  }

  // Of the names in target_modules, where they are names.
  std::string nearest_target(const std::string& module) const {
    const std::string nearest =
        nearest_name(module.substr(module.rfind('.') + 1), adapter_.config.target_modules);
    return nearest.empty() ? "" : concat(", their nearest is '", nearest, "'");
  }

  // Every name that the modules of the file may have.
  std::vector<std::string> names_with_a_place() const {
    std::vector<std::string> names;
    for (const auto& [module, tensors] : halves_) {
      for (size_t half : {0, 1}) names.push_back(half_name(module, half));
      if (adapter_.config.use_dora) names.push_back(kPrefix + module + kMagnitude);
    }
    return names;
  }

  void sort_names() {
    std::vector<const SafetensorsEntry*> others;
    for (const SafetensorsEntry& entry : file_.entries()) {
      const std::string& name = entry.name;
      const auto take = [&](const std::string& suffix, size_t which) {
        if (!name.starts_with(kPrefix) || !name.ends_with(suffix)) return false;
        const std::string module =
            name.substr(kPrefix.size(), name.size() - kPrefix.size() - suffix.size());
        if (is_embedding(module) != (suffix == kEmbeddingA || suffix == kEmbeddingB)) return false;
        halves_[module][which] = name;
        return true;
      };
      if (!take(kA, 0) && !take(kB, 1) && !take(kMagnitude, 2) && !take(kEmbeddingA, 0) &&
          !take(kEmbeddingB, 1))
        others.push_back(&entry);
    }
    for (const SafetensorsEntry* other : others) {
      const SafetensorsEntry& entry = *other;
      const std::string& name = entry.name;
      const std::string parameter = replaced_by(name);
      const size_t rank = name.ends_with(kBias) || entry.shape.size() == 1 ? 1 : 2;
      if (!parameter.empty()) {
        adapter_.replaced.emplace_back(parameter, read_adapter_tensor(file_, name, rank));
        continue;
      }
      if (name == kPrefix + kTokenRows && !adapter_.config.trainable_token_indices.empty())
        continue;
      if (name.starts_with(kPrefix) && is_whole_embedding(name) && entry.shape.size() == 2) {
        adapter_.embeddings.emplace_back(name, entry.shape[0]);
        continue;
      }
      unknown_.push_back(name);
    }
    if (unknown_.empty()) return;
    CHECK(unknown_[0] != kPrefix + kTokenRows, file_.path(), ": tensor '", unknown_[0],
          "' has no place: adapter_config.json has no trainable_token_indices; do the two files "
          "belong together?");
    const std::string nearest = nearest_name(unknown_[0], names_with_a_place());
    fail(file_.path(), ": tensor '", unknown_[0], "' has no place in a LoRA adapter; ",
         nearest.empty()
             ? concat("expected names as '", half_name("model.layers.0.self_attn.q_proj", 0),
                      "', as PEFT's save_pretrained writes them")
             : concat("the nearest that has is '", nearest, "'"),
         "; the adapter is refused rather than half applied");
  }

  // The parameter of the base that a tensor takes the place of, by the config; "" for none.
  std::string replaced_by(const std::string& name) const {
    if (!name.starts_with(kPrefix)) return "";
    std::string module = name.substr(kPrefix.size(), name.rfind('.') - kPrefix.size());
    const LoraConfig& config = adapter_.config;
    const bool wrapped = module.ends_with(kBaseLayer);
    if (wrapped) module.resize(module.size() - kBaseLayer.size());
    if (name.ends_with(kBias)) {
      const bool asked = config.bias == LoraConfig::Bias::All ||
                         (config.bias == LoraConfig::Bias::LoraOnly && wrapped);
      return asked && wrapped == halves_.contains(module) ? module + kBias : "";
    }
    const auto whole = [&](const std::string& entry) { return module.ends_with(entry); };
    const auto& entries = config.modules_to_save;
    const bool asked =
        !wrapped && name.ends_with(kWeight) && std::any_of(entries.begin(), entries.end(), whole);
    return asked ? module + kWeight : "";
  }

  std::vector<LoraTarget> targets_of(const std::vector<std::string>& names) const {
    try {
      return match_targets(adapter_.config, names);
    } catch (const Error& error) {
      fail(adapter_.directory, ": ", error.what());
    }
  }

  void read_tokens() {
    const size_t count = adapter_.config.trainable_token_indices.size();
    const std::string name = kPrefix + kTokenRows;
    if (count == 0) return;
    CHECK(file_.find(name), file_.path(), ": tensor '", name,
          "' is missing, but adapter_config.json has trainable_token_indices; is the file whole?");
    adapter_.token_rows = read_adapter_tensor(file_, name, 2);
    CHECK(adapter_.token_rows.size(0) == int64_t(count), file_.path(), ": tensor '", name, "' has ",
          adapter_.token_rows.size(0), " rows, but trainable_token_indices of adapter_config.json ",
          count, " tokens");
  }

  void read_module(const LoraTarget& target) {
    AdapterModule module;
    module.name = target.name;
    module.scaling = target.scaling;
    const auto& names = halves_[target.name];
    module.a = read_adapter_tensor(file_, names[0], 2);
    module.b = read_adapter_tensor(file_, names[1], 2);
    check_rank(names[0], module.a, {target.r, module.a.size(1)}, 0);
    check_rank(names[1], module.b, {module.b.size(0), target.r}, 1);
    if (is_embedding(target.name)) {
      std::swap(module.a, module.b);
      module.a = transposed(module.a);
      module.b = transposed(module.b);
    }
    CHECK(names[2].empty() || adapter_.config.use_dora, file_.path(), ": tensor '", names[2],
          "' has no place: it belongs to a DoRA layer, and adapter_config.json has use_dora false");
    CHECK(!names[2].empty() || !adapter_.config.use_dora, file_.path(), ": tensor '", kPrefix,
          target.name, kMagnitude, "' is missing, and use_dora is true; is the file whole?");
    if (!names[2].empty()) {
      module.magnitude = read_adapter_tensor(file_, names[2], 1);
      CHECK(module.magnitude.size(0) == module.b.size(0), file_.path(), ": tensor '", names[2],
            "' is ", module.magnitude.shape(), ", expected (", module.b.size(0), ") as '", names[1],
            "' is ", module.b.shape());
    }
    adapter_.modules.push_back(std::move(module));
  }

  // rank_dim: which dimension of the shape is the rank.
  void check_rank(const std::string& name, const Tensor& tensor, const Shape& expected,
                  int rank_dim) const {
    const int64_t r = expected[rank_dim];
    if (tensor.shape() == expected) return;
    if (tensor.size(1 - rank_dim) == r)
      fail(file_.path(), ": tensor '", name, "' is ", tensor.shape(),
           ", which looks transposed: expected (", rank_dim == 0 ? "r, in" : "out, r", ") with r ",
           r);
    fail(file_.path(), ": tensor '", name, "' is ", tensor.shape(), ", expected ", expected,
         " by r ", r, " of adapter_config.json; do the two files belong together?");
  }

  AdapterFile& adapter_;
  const SafetensorsFile& file_;
  std::map<std::string, std::array<std::string, 3>> halves_;  // module to names of A, B, magnitude
  std::vector<std::string> unknown_;
};

std::string metadata_of(const SafetensorsFile& file, const char* key) {
  const auto found = file.metadata().find(key);
  return found == file.metadata().end() ? "" : found->second;
}

// Texts of one scheme, both known, that say something else ("1-..." and "2-..." say nothing).
bool differ(const std::string& a, const std::string& b) {
  return !a.empty() && !b.empty() && a != b && a.substr(0, a.find('-')) == b.substr(0, b.find('-'));
}

}  // namespace

std::vector<std::string> short_names(const AdapterFile& file) {
  std::set<std::string> names;
  for (const AdapterModule& module : file.modules)
    names.insert(module.name.substr(module.name.rfind('.') + 1));
  return {names.begin(), names.end()};
}

Tensor read_adapter_tensor(const SafetensorsFile& file, const std::string& name, size_t rank) {
  const SafetensorsEntry& entry = *file.find(name);
  CHECK(entry.dtype == "F32" || entry.dtype == "BF16" || entry.dtype == "F16", file.path(),
        ": tensor '", name, "' is ", entry.dtype, ", expected F32, BF16 or F16");
  CHECK(entry.shape.size() == rank, file.path(), ": tensor '", name, "' has ", entry.shape.size(),
        " dimensions, expected ", rank);
  const Tensor value = file.tensor(name).to(DType::F32, Scope::Adapters);
  for (int64_t i = 0; i < value.num_elements(); ++i)
    CHECK(std::isfinite(value.data<float>()[i]), file.path(), ": tensor '", name,
          "' holds NaN or infinity at element ", i);
  return value;
}

const AdapterModule* AdapterFile::find(const std::string& module) const {
  for (const AdapterModule& one : modules)
    if (one.name == module) return &one;
  return nullptr;
}

bool AdapterFile::is_empty() const {
  if (!replaced.empty() || token_rows.defined()) return false;
  for (const AdapterModule& module : modules)
    for (int64_t i = 0; i < module.b.num_elements(); ++i)
      if (module.b.data<float>()[i] != 0) return false;
  return true;
}

LoraConfig load_adapter_config(const std::string& directory) {
  const std::string path = (fs::path(directory) / kConfigFile).string();
  CHECK(fs::exists(path), path, ": no such file; expected the directory of a PEFT adapter");
  return parse_adapter_config(read_json_object(path), path);
}

AdapterFile read_adapter(const std::string& directory) {
  AdapterFile adapter;
  adapter.directory = directory;
  adapter.config = load_adapter_config(directory);
  const fs::path weights = fs::path(directory) / kWeightsFile;
  CHECK(fs::exists(weights) || !fs::exists(fs::path(directory) / "adapter_model.bin"), directory,
        ": holds adapter_model.bin alone, which graft does not read; save it again as safetensors "
        "(PEFT: model.save_pretrained with safe_serialization=True)");
  const SafetensorsFile file(weights.string());
  adapter.base.weights = metadata_of(file, kBaseFingerprintKey);
  adapter.base.tokenizer = metadata_of(file, kTokenizerFingerprintKey);
  Reader(adapter, file).read();
  return adapter;
}

void check_same_base(const BaseFingerprint& got, const BaseFingerprint& wanted,
                     const std::string& what) {
  for (const auto& [a, b, part] : {std::tuple{got.weights, wanted.weights, "weights"},
                                   std::tuple{got.tokenizer, wanted.tokenizer, "tokenizer"}})
    CHECK(!differ(a, b), what, ": belongs to another base: the fingerprint of its ", part, " is ",
          a, ", here it is ", b, "; give the base that it was trained on, or --allow-other-base");
}

void check_pairs_alone(const AdapterFile& file, const std::string& what) {
  CHECK(!file.token_rows.defined(), file.directory, ": has trainable_token_indices, which ", what,
        " cannot keep; graft merge can");
}

void check_not_empty(const AdapterFile& file, const std::string& way_out) {
  CHECK(!file.is_empty(), file.directory, ": B is zero in all ", file.modules.size(),
        " modules, so the adapter changes nothing; was it ever trained? ", way_out);
}

void write_adapter(const AdapterFile& file, const std::string& directory) {
  std::vector<TensorToMake> tensors;
  const auto add = [&](const std::string& name, const Tensor& tensor, DType dtype = DType::F32) {
    tensors.push_back({kPrefix + name, tensor.shape(), dtype, [tensor] { return tensor; }});
  };
  for (const AdapterModule& module : file.modules) {
    if (is_embedding(module.name)) {
      add(module.name + kEmbeddingA, transposed(module.b));
      add(module.name + kEmbeddingB, transposed(module.a));
      continue;
    }
    add(module.name + kA, module.a);
    add(module.name + kB, module.b);
    if (module.magnitude.defined()) add(module.name + kMagnitude, module.magnitude);
  }
  CHECK(!tensors.empty(), "save_adapter: the model has no adapter");
  if (file.token_rows.defined()) add(kTokenRows, file.token_rows);
  for (const auto& [name, tensor] : file.replaced) {
    const std::string module = name.substr(0, name.rfind('.'));
    add(module + (file.find(module) ? kBaseLayer : "") + name.substr(module.size()), tensor,
        tensor.dtype());
  }
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (!file.base.weights.empty()) metadata[kBaseFingerprintKey] = file.base.weights;
  if (!file.base.tokenizer.empty()) metadata[kTokenizerFingerprintKey] = file.base.tokenizer;
  fs::create_directories(directory);
  // The weights first: a directory with a config alone would look whole to a reader.
  write_safetensors((fs::path(directory) / kWeightsFile).string(), std::move(tensors), metadata);
  write_file_atomically((fs::path(directory) / kConfigFile).string(),
                        format_adapter_config(file.config, short_names(file)));
}

}  // namespace graft
