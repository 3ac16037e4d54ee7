#include "models/weights.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "models/json_file.h"
#include "tensor/backend.h"
#include "tensor/finite.h"
#include "tensor/nf4.h"
#include "tensor/safetensors.h"
#include "tensor/system_memory.h"
#include "tensor/thread_pool.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

// The tensors of a model directory by name, from one file or from shards.
class Checkpoint {
 public:
  explicit Checkpoint(const std::string& directory) : directory_(directory) {
    const std::string single = path_of("model.safetensors");
    const std::string index = path_of("model.safetensors.index.json");
    if (fs::exists(single)) {
      add_file(single);
    } else if (fs::exists(index)) {
      add_shards(index);
    } else {
      fail(directory, ": neither model.safetensors nor model.safetensors.index.json is there",
           fs::exists(path_of("pytorch_model.bin"))
               ? "; pytorch_model.bin is not supported, save the model as safetensors"
               : "");
    }
    strip_or_add_prefix();
  }

  // The file that holds `name`, or the name that its metadata gives as an alias; nullptr: neither.
  const SafetensorsFile* file_of(const std::string& name) const {
    const auto found = where_.find(name);
    return found == where_.end() ? nullptr : found->second.file.get();
  }
  const SafetensorsEntry& entry(const std::string& name) const {
    const Place& place = where_.at(name);
    return *place.file->find(place.stored_name);
  }
  Tensor tensor(const std::string& name) const {
    const Place& place = where_.at(name);
    return place.file->tensor(place.stored_name);
  }
  // Its bytes have been read: the process need not hold them any longer.
  void forget(const std::string& name) const {
    const Place& place = where_.at(name);
    place.file->forget(place.stored_name);
  }
  std::string alias_of(const std::string& name) const {
    for (const auto& file : files_) {
      const auto found = file->metadata().find(name);
      if (found != file->metadata().end() && where_.count(found->second)) return found->second;
    }
    return name;
  }
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& [name, place] : where_) all.push_back(name);
    return all;
  }

 private:
  struct Place {
    std::shared_ptr<const SafetensorsFile> file;
    std::string stored_name;
  };

  std::string path_of(const std::string& file) const {
    return (fs::path(directory_) / file).string();
  }

  void add_file(const std::string& path) {
    files_.push_back(std::make_shared<SafetensorsFile>(path));
    for (const SafetensorsEntry& entry : files_.back()->entries())
      where_[entry.name] = {files_.back(), entry.name};
  }

  // weight_map: {tensor name: file name}. Tensors of a shard that it does not name are not loaded.
  void add_shards(const std::string& index) {
    const nlohmann::json json = read_json_object(index);
    CHECK(json.contains("weight_map") && json["weight_map"].is_object() &&
              !json["weight_map"].empty(),
          index, ": weight_map is missing or empty");
    std::map<std::string, std::shared_ptr<const SafetensorsFile>> opened;
    for (const auto& [name, value] : json["weight_map"].items()) {
      CHECK(value.is_string(), index, ": weight_map gives no file name for tensor '", name, "'");
      const std::string shard = value.get<std::string>();
      CHECK(!shard.empty() && shard.find('/') == std::string::npos && shard != "..", index,
            ": weight_map names the file '", shard, "', wanted a name in the same directory");
      auto& file = opened[shard];
      if (!file) {
        CHECK(fs::exists(path_of(shard)), path_of(shard), ": this shard is missing; ", index,
              " names it for tensor '", name, "'");
        file = std::make_shared<SafetensorsFile>(path_of(shard));
        files_.push_back(file);
      }
      CHECK(file->find(name), path_of(shard), ": tensor '", name, "' is missing; ", index,
            " says it is there");
      where_[name] = {file, name};
    }
  }

  // A base model saved without its head has no "model." before its names; transformers adds it.
  void strip_or_add_prefix() {
    if (!where_.count("embed_tokens.weight") || where_.count("model.embed_tokens.weight")) return;
    std::map<std::string, Place> renamed;
    for (auto& [name, place] : where_) {
      const bool inside = name.rfind("lm_head.", 0) != 0 && name.rfind("model.", 0) != 0;
      renamed[inside ? "model." + name : name] = std::move(place);
    }
    where_ = std::move(renamed);
  }

  std::string directory_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::map<std::string, Place> where_;
};

bool same_bytes(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() &&
         std::memcmp(a.raw(), b.raw(), size_t(a.num_bytes())) == 0;
}

// The dtype that most weights of the file have.
DType stored_dtype(const Checkpoint& checkpoint) {
  std::map<std::string, int64_t> bytes;
  for (const std::string& name : checkpoint.names()) {
    if (name.find(".weight.") != std::string::npos) continue;  // scales of a quantised one
    const SafetensorsEntry& entry = checkpoint.entry(name);
    if (entry.dtype != "U8") bytes[entry.dtype] += entry.end - entry.begin;
  }
  const auto most = std::max_element(bytes.begin(), bytes.end(),
                                     [](auto& a, auto& b) { return a.second < b.second; });
  const std::string name = most == bytes.end() ? "F32" : most->first;
  return name == "BF16" ? DType::BF16 : name == "F16" ? DType::F16 : DType::F32;
}
DType computed_in(DType stored) { return stored == DType::F16 ? DType::F32 : stored; }

// The dtype in which a weight is kept. F32 computes with the bytes of any file exactly as they are;
// BF16 rounds what is not BF16.
DType kept_dtype(DType stored, DType compute) { return compute == DType::F32 ? stored : compute; }

// Gives every parameter of the model its tensor from the checkpoint.
class Loader : public Visitor {
 public:
  Loader(const std::string& directory, const Checkpoint& checkpoint, DType compute, Device device,
         const Quantisation& quantisation)
      : directory_(directory),
        checkpoint_(checkpoint),
        compute_(compute),
        device_(device),
        quantisation_(quantisation) {
    files_.has = [this](const std::string& name) { return checkpoint_.file_of(name) != nullptr; };
    files_.tensor = [this](const std::string& name) { return checkpoint_.tensor(name); };
    files_.path = [this](const std::string& name) { return checkpoint_.file_of(name)->path(); };
  }

  void linear(const std::string& name, Linear&) override {
    if (name != "lm_head") quantisable_ = name + ".weight";
  }

  // First pass: names, shapes, dtypes; nothing is read or allocated before all are right.
  void parameter(const std::string& name, Variable& value) override {
    std::string stored = name;
    if (!checkpoint_.file_of(stored)) stored = checkpoint_.alias_of(name);
    if (!checkpoint_.file_of(stored) && name == "model.embed_tokens.weight" && tied_)
      stored = "lm_head.weight";
    CHECK(checkpoint_.file_of(stored), directory_, ": tensor '", name,
          "' is missing from the weights (", checkpoint_.names().size(), " tensors)",
          name == "lm_head.weight" ? "; should config.json have tie_word_embeddings: true?" : "");
    if (BitsandbytesWeight::is_there(files_, stored)) return plan_quantised(name, stored, value);
    const SafetensorsEntry& entry = checkpoint_.entry(stored);
    const std::string& path = checkpoint_.file_of(stored)->path();
    CHECK(entry.dtype == "F32" || entry.dtype == "BF16" || entry.dtype == "F16", path, ": tensor '",
          name, "' has the dtype ", entry.dtype, ", graft reads F32, BF16 and F16");
    Shape shape;
    std::string got;
    for (const int64_t size : entry.shape) got += (got.empty() ? "" : ", ") + std::to_string(size);
    if (entry.shape.size() <= size_t(Shape::kMaxRank))
      for (const int64_t size : entry.shape) shape.push_back(size);
    CHECK(entry.shape.size() <= size_t(Shape::kMaxRank) && shape == value.shape(), path,
          ": tensor '", name, "' is (", got, "), config.json implies ", value.shape());
    const DType from = entry.dtype == "F32"    ? DType::F32
                       : entry.dtype == "BF16" ? DType::BF16
                                               : DType::F16;
    const bool quantise = quantisation_.load_in_4bit && name == quantisable_;
    if (quantise)
      copied_bytes_ += nf4_bytes(shape.num_elements(),
                                 quantisation_.double_quant ? DType::NF4 : DType::NF4Single);
    else if (const DType kept = kept_dtype(from, compute_); kept != from)
      copied_bytes_ += shape.num_elements() * dtype_size(kept);
    planned_.push_back({stored, &value, quantise, nullptr});
    used_.insert(stored);
  }

  void check_left_over() const {
    for (const std::string& name : checkpoint_.names()) {
      if (used_.count(name) || (tied_ && name == "lm_head.weight")) continue;
      // Tables that older versions of transformers saved; they follow from config.json.
      if (name.find(".rotary_emb.") != std::string::npos) continue;
      fail(checkpoint_.file_of(name)->path(), ": tensor '", name,
           "' has no place in the model that config.json describes");
    }
  }

  void fill() const {
    if (device_ == Device::CPU && copied_bytes_ > 0)
      check_memory(copied_bytes_,
                   concat(directory_, ": weights in ",
                          dtype_name(quantisation_.load_in_4bit ? DType::NF4 : compute_)),
                   "the dtype of the file is used in place");
    for (const auto& [stored, value, quantise, quantised] : planned_) {
      if (quantised) {
        value->set_value(quantised->load().to(device_, Scope::Weights));
        checkpoint_.forget(stored);
        continue;
      }
      const Tensor tensor = checkpoint_.tensor(stored);
      CHECK(all_finite(tensor), checkpoint_.file_of(stored)->path(), ": tensor '", stored,
            "' holds NaN or infinity; the file is damaged, download it again");
      const DType kept = kept_dtype(tensor.dtype(), compute_);
      if (quantise) {  // one weight at a time is dense
        value->set_value(nf4_quantise(tensor.to(kept, Scope::Scratch), quantisation_.double_quant)
                             .to(device_, Scope::Weights));
        checkpoint_.forget(stored);
        continue;
      }
      if (device_ == Device::CPU && kept == tensor.dtype()) {
        value->set_value(tensor);
        continue;
      }
      const bool on_gpu = device_ == Device::CUDA;
      Tensor copied =
          Tensor::empty(tensor.shape(), on_gpu ? compute_ : kept, device_, Scope::Weights);
      backend_of(copied).copy(copied, tensor);
      value->set_value(copied);
    }
  }

  void set_tied(bool tied) { tied_ = tied; }

 private:
  void plan_quantised(const std::string& name, const std::string& stored, Variable& value) {
    CHECK(name == quantisable_, files_.path(stored), ": tensor '", name,
          "' is NF4, which is supported for linear layers other than lm_head alone");
    planned_.push_back(
        {stored, &value, false,
         std::make_shared<BitsandbytesWeight>(files_, stored, value.value().shape())});
    const BitsandbytesWeight& weight = *planned_.back().quantised;
    used_.insert(weight.parts().begin(), weight.parts().end());
    copied_bytes_ += weight.num_bytes();
  }

  struct Planned {
    std::string stored;
    Variable* value;
    bool quantise;
    std::shared_ptr<const BitsandbytesWeight> quantised;  // null: the file's weight is dense
  };
  const std::string& directory_;
  const Checkpoint& checkpoint_;
  DType compute_;
  Device device_;
  Quantisation quantisation_;
  BitsandbytesWeight::Files files_;
  std::string quantisable_;  // the name of the weight of the linear layer visited last
  bool tied_ = false;
  int64_t copied_bytes_ = 0;
  std::vector<Planned> planned_;
  std::set<std::string> used_;
};

}  // namespace

DType dtype_of_files(const std::string& directory) { return stored_dtype(Checkpoint(directory)); }

std::unique_ptr<Decoder> load_model(const std::string& directory, std::optional<DType> dtype,
                                    Device device, const Quantisation& quantisation) {
  CHECK(fs::is_directory(directory), directory, ": not a directory; wanted that of a model");
  ModelConfig config = ModelConfig::load(directory);
  const Checkpoint checkpoint(directory);
  const DType compute = dtype.value_or(computed_in(stored_dtype(checkpoint)));
  CHECK(compute == DType::F32 || compute == DType::BF16 || compute == DType::F64, "load: dtype ",
        dtype_name(compute), " is not computed in; F32 and BF16 are");
  // Both names stored, with different values: then they are two matrices whatever the config says.
  const std::string embed = "model.embed_tokens.weight", head = "lm_head.weight";
  if (config.tie_word_embeddings && checkpoint.file_of(embed) && checkpoint.file_of(head) &&
      !same_bytes(checkpoint.tensor(embed), checkpoint.tensor(head)))
    config.tie_word_embeddings = false;

  auto model = std::make_unique<Decoder>(config, compute, device);
  Loader loader(directory, checkpoint, compute, device, quantisation);
  loader.set_tied(config.tie_word_embeddings);
  model->visit("", loader);
  loader.check_left_over();
  // It maps the files once more, for a moment: now, while nothing else is in memory.
  model->fingerprint = fingerprint_of(directory);
  loader.fill();
  allocator_of(Device::Meta).release_cached();  // the address space of the placeholders
  allocator_of(Device::CPU).release_cached();   // what quantising took
  return model;
}

void widen_weights(Decoder& model) {
  struct Count : Visitor {
    DType dtype;
    int64_t bytes = 0;
    void parameter(const std::string&, Variable& value) override {
      if (value.value().dtype() != dtype) bytes += value.shape().num_elements() * dtype_size(dtype);
    }
  } count;
  count.dtype = model.compute_dtype();
  model.visit("", count);
  if (count.bytes > 0 && model.device() == Device::CPU)
    check_memory(count.bytes, concat("trained weights in ", dtype_name(count.dtype)),
                 "method lora leaves them in the file");
  struct Widen : Visitor {
    DType dtype;
    void parameter(const std::string&, Variable& value) override {
      if (value.value().dtype() == dtype) return;
      Tensor wide = Tensor::empty(value.shape(), dtype, value.value().device(), Scope::Weights);
      backend_of(wide).copy(wide, value.value());
      value.set_value(wide);
    }
  } widen;
  widen.dtype = model.compute_dtype();
  model.visit("", widen);
}

namespace {

void fill_normal(Tensor& tensor, uint64_t seed, uint64_t number, double deviation) {
  const int64_t count = tensor.num_elements();
  const auto fill = [&]<class T>(T* values, auto convert) {
    thread_pool().run((count + kNormalPiece - 1) / kNormalPiece, [&](int64_t piece, int) {
      Random random(seed, number << 32 | uint64_t(piece));
      const int64_t end = std::min(count, (piece + 1) * kNormalPiece);
      for (int64_t i = piece * kNormalPiece; i < end; ++i)
        values[i] = convert(random.normal() * deviation);
    });
  };
  if (tensor.dtype() == DType::F64)
    fill(tensor.data<double>(), [](double x) { return x; });
  else if (tensor.dtype() == DType::BF16)
    fill(tensor.data<BFloat16>(), [](double x) { return to_bfloat16(float(x)); });
  else
    fill(tensor.data<float>(), [](double x) { return float(x); });
}

struct RandomInit : Visitor {
  DType dtype;
  uint64_t seed, number = 0;
  double deviation;
  Device device;

  void parameter(const std::string& name, Variable& value) override {
    const Device drawn_on = device == Device::CUDA ? Device::CPU : device;
    Tensor tensor = Tensor::empty(value.shape(), dtype, drawn_on, Scope::Weights);
    const uint64_t mine = number++;
    if (device != Device::Meta) {
      if (tensor.rank() == 2)
        fill_normal(tensor, seed, mine, deviation);
      else
        backend_of(tensor).fill(tensor, name.find("norm") != std::string::npos ? 1 : 0);
    }
    value.set_value(tensor.to(device, Scope::Weights));
  }
};

}  // namespace

std::unique_ptr<Decoder> random_model(const ModelConfig& config, DType dtype, uint64_t seed,
                                      double initializer_range, Device device) {
  CHECK(dtype == DType::F32 || dtype == DType::BF16 || dtype == DType::F64, "random_model: dtype ",
        dtype_name(dtype), ", wanted F32 or BF16");
  if (device == Device::CPU)
    check_memory(num_parameters(config) * dtype_size(dtype),
                 concat("random weights in ", dtype_name(dtype)), "take a smaller model");
  auto model = std::make_unique<Decoder>(config, dtype, device);
  RandomInit init;
  init.dtype = dtype;
  init.seed = seed;
  init.deviation = initializer_range;
  init.device = device;
  model->visit("", init);
  return model;
}

void save_weights(Decoder& model, const std::string& directory, DType dtype) {
  struct Collect : Visitor {
    DType dtype;
    std::vector<TensorToMake> tensors;
    void parameter(const std::string& name, Variable& value) override {
      const Tensor tensor = value.value();
      tensors.push_back({name, tensor.shape(), dtype, [tensor] { return tensor; }});
    }
  } collect;
  collect.dtype = dtype;
  model.visit("", collect);
  write_shards(directory, std::move(collect.tensors));
}

void write_shards(const std::string& directory, std::vector<TensorToMake> tensors,
                  int64_t max_shard_bytes) {
  fs::create_directories(directory);
  const auto path_of = [&](const std::string& file) {
    return (fs::path(directory) / file).string();
  };
  std::vector<std::vector<TensorToMake>> shards(1);
  int64_t bytes = 0, total = 0;
  for (TensorToMake& tensor : tensors) {
    const int64_t size = tensor.shape.num_elements() * dtype_size(tensor.dtype);
    if (bytes > 0 && bytes + size > max_shard_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().push_back(std::move(tensor));
    bytes += size;
    total += size;
  }
  if (shards.size() == 1) {
    write_safetensors(path_of("model.safetensors"), std::move(shards[0]));
    return;
  }
  nlohmann::ordered_json index = {{"metadata", {{"total_size", total}}},
                                  {"weight_map", nlohmann::ordered_json::object()}};
  for (size_t i = 0; i < shards.size(); ++i) {
    char file[64];
    std::snprintf(file, sizeof file, "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
    for (const TensorToMake& tensor : shards[i]) index["weight_map"][tensor.name] = file;
    write_safetensors(path_of(file), std::move(shards[i]));
  }
  write_file_atomically(path_of("model.safetensors.index.json"), index.dump(2) + "\n");
  fs::remove(path_of("model.safetensors"));  // an older single file would be read first
}

}  // namespace graft
