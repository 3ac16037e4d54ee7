// Loading: every dtype and spelling of a checkpoint gives the model, and a checkpoint that does not
// fit is refused in one line. The models are those of tests/golden, rewritten here in other ways.
#include "models/weights.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "tensor/safetensors.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

class Weights : public testing::Test {
 protected:
  Weights()
      : directory_(fs::temp_directory_path() / ("graft_weights_" + std::to_string(getpid()))) {
    fs::remove_all(directory_);
    fs::create_directories(directory_);
  }
  ~Weights() override { fs::remove_all(directory_); }

  static std::string golden(const std::string& name) { return "tests/golden/models/" + name; }
  // The config of a golden model, changed, and its tensors by name.
  std::map<std::string, Tensor> start_from(const std::string& name,
                                           const Json& changes = Json::object()) {
    Json config = Json::parse(std::ifstream(golden(name) + "/config.json"));
    config.update(changes);
    std::ofstream(directory_ / "config.json") << config.dump();
    const SafetensorsFile file(golden(name) + "/model.safetensors");
    std::map<std::string, Tensor> tensors;
    for (const auto& entry : file.entries()) tensors[entry.name] = file.tensor(entry.name);
    return tensors;
  }
  void write(const std::map<std::string, Tensor>& tensors,
             const std::string& file = "model.safetensors",
             const std::map<std::string, std::string>& metadata = {{"format", "pt"}}) {
    std::vector<NamedTensor> list;
    for (const auto& [name, tensor] : tensors) list.push_back({name, tensor});
    write_safetensors(path(file), list, {}, metadata);
  }
  std::string path(const std::string& file) const { return (directory_ / file).string(); }
  std::unique_ptr<Decoder> load(std::optional<DType> dtype = {}) const {
    return load_model(directory_.string(), dtype);
  }
  void expect_refused(const std::string& part) const {
    try {
      load();
    } catch (const Error& error) {
      const std::string what = error.what();
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      EXPECT_EQ(what.rfind(directory_.string(), 0), 0u) << what;
      EXPECT_NE(what.find(part), std::string::npos) << "got: " << what << "\nwanted: " << part;
      return;
    }
    ADD_FAILURE() << "accepted; wanted: " << part;
  }
  static std::vector<double> logits(Decoder& model) {
    NoRecord off;
    return model.logits(model.forward(pack({{5, 17, 80, 3}}), {}).value()).to_doubles();
  }

  fs::path directory_;
};

TEST_F(Weights, UsesTheFileInPlace) {
  const MemoryStats before = allocator_of(Device::CPU).stats();
  const auto model = load_model(golden("llama_gqa"));
  EXPECT_TRUE(model->embed_tokens.weight.value().storage()->is_borrowed());
  EXPECT_TRUE(model->layers[1].mlp.down_proj.weight.value().storage()->is_borrowed());
  EXPECT_EQ(allocator_of(Device::CPU).stats().live[int(Scope::Weights)],
            before.live[int(Scope::Weights)]);
}

TEST_F(Weights, TakeTheDtypeOfTheFileAndComputeF16InF32) {
  const auto bf16 = load_model(golden("llama_mqa"));
  EXPECT_EQ(bf16->compute_dtype(), DType::BF16);
  EXPECT_TRUE(bf16->norm.weight.value().storage()->is_borrowed());
  const auto f16 = load_model(golden("llama_head_dim"));
  EXPECT_EQ(f16->compute_dtype(), DType::F32);
  EXPECT_EQ(f16->norm.weight.value().dtype(), DType::F16);
  EXPECT_TRUE(f16->norm.weight.value().storage()->is_borrowed());
}

TEST_F(Weights, AreRoundedToNearestEvenWhenBF16IsAskedFor) {
  for (const char* name : {"llama_gqa", "llama_head_dim"}) {
    const auto model = load_model(golden(name), DType::BF16);
    const SafetensorsFile file(golden(name) + "/model.safetensors");
    const std::string tensor = "model.layers.0.self_attn.q_proj.weight";
    EXPECT_EQ(model->layers[0].self_attn.q_proj.weight.value().dtype(), DType::BF16);
    EXPECT_EQ(model->layers[0].self_attn.q_proj.weight.value().to_doubles(),
              file.tensor(tensor).to(DType::F32).to(DType::BF16).to_doubles());
  }
}

TEST_F(Weights, OfABF16FileComputeInF32WithTheirExactValues) {
  const auto model = load_model(golden("llama_mqa"), DType::F32);
  EXPECT_EQ(model->compute_dtype(), DType::F32);
  const SafetensorsFile file(golden("llama_mqa") + "/model.safetensors");
  EXPECT_EQ(model->norm.weight.value().to_doubles(), file.tensor("model.norm.weight").to_doubles());
}

TEST_F(Weights, AreWidenedForFullTraining) {
  const auto model = load_model(golden("llama_head_dim"));
  const std::vector<double> before = model->norm.weight.value().to_doubles();
  widen_weights(*model);
  EXPECT_EQ(model->norm.weight.value().dtype(), DType::F32);
  EXPECT_EQ(model->norm.weight.value().to_doubles(), before);
}

// A file of 8.8 TB, all hole: its weights would have to be copied to be rounded.
TEST_F(Weights, AreRefusedWhereTheirCopyDoesNotFitIntoMemory) {
  start_from("llama_tied", {{"vocab_size", 2147483647}, {"hidden_size", 1024}, {"head_dim", 8}});
  const ModelConfig config = ModelConfig::load(directory_.string());
  struct Header : Visitor {
    Json json = Json::object();
    int64_t at = 0;
    void parameter(const std::string& name, Variable& value) override {
      Json shape = Json::array();
      for (int i = 0; i < value.shape().rank(); ++i) shape.push_back(value.shape()[i]);
      const int64_t end = at + 4 * value.shape().num_elements();
      json[name] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {at, end}}};
      at = end;
    }
  } header;
  Decoder(config, DType::F32, Device::Meta).visit("", header);
  const std::string text = header.json.dump();
  std::ofstream file(path("model.safetensors"), std::ios::binary);
  const uint64_t length = text.size();
  file.write(reinterpret_cast<const char*>(&length), 8) << text;
  file.close();
  std::error_code error;
  fs::resize_file(path("model.safetensors"), 8 + length + uint64_t(header.at), error);
  if (error) GTEST_SKIP() << "no sparse file of that size here: " << error.message();
  try {
    load(DType::BF16);
    ADD_FAILURE() << "accepted";
  } catch (const Error& refusal) {
    EXPECT_NE(std::string(refusal.what()).find("not enough memory"), std::string::npos)
        << refusal.what();
  }
}

TEST_F(Weights, AreTiedUnderEitherNameOrBoth) {
  auto tensors = start_from("llama_tied");
  write(tensors);
  const auto model = load();
  EXPECT_EQ(model->lm_head.weight.state(), model->embed_tokens.weight.state());
  const std::vector<double> wanted = logits(*model);

  auto both = tensors;
  both["lm_head.weight"] = both["model.embed_tokens.weight"];
  write(both);
  EXPECT_EQ(logits(*load()), wanted);

  auto head_only = both;
  head_only.erase("model.embed_tokens.weight");
  write(head_only);
  EXPECT_EQ(logits(*load()), wanted);
}

// transformers does not tie what the file has with two values.
TEST_F(Weights, AreNotTiedWhereTheFileHasTwoMatrices) {
  auto tensors = start_from("llama_gqa", {{"tie_word_embeddings", true}});
  write(tensors);
  const auto model = load();
  EXPECT_NE(model->lm_head.weight.state(), model->embed_tokens.weight.state());
  EXPECT_EQ(logits(*model), logits(*load_model(golden("llama_gqa"))));
}

TEST_F(Weights, FollowAnAliasInTheMetadata) {
  auto tensors = start_from("llama_gqa");
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"];
  write(tensors);
  const std::vector<double> wanted = logits(*load());
  tensors.erase("model.embed_tokens.weight");
  write(tensors, "model.safetensors", {{"model.embed_tokens.weight", "lm_head.weight"}});
  EXPECT_EQ(logits(*load()), wanted);
}

TEST_F(Weights, MayLackTheModelPrefix) {
  const auto tensors = start_from("llama_gqa");
  std::map<std::string, Tensor> renamed;
  for (const auto& [name, tensor] : tensors)
    renamed[name.rfind("model.", 0) == 0 ? name.substr(6) : name] = tensor;
  write(renamed);
  EXPECT_EQ(logits(*load()), logits(*load_model(golden("llama_gqa"))));
}

TEST_F(Weights, IgnoreSavedRotaryTables) {
  auto tensors = start_from("llama_gqa");
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = Tensor::zeros({4}, DType::F32);
  write(tensors);
  EXPECT_NO_THROW(load());
}

TEST_F(Weights, RefuseMissingLeftOverAndMisshapenTensors) {
  const auto tensors = start_from("llama_gqa");
  auto missing = tensors;
  missing.erase("model.layers.1.mlp.up_proj.weight");
  write(missing);
  expect_refused("tensor 'model.layers.1.mlp.up_proj.weight' is missing");

  auto untied = tensors;
  untied.erase("lm_head.weight");
  write(untied);
  expect_refused("tensor 'lm_head.weight' is missing");

  auto extra = tensors;
  extra["model.layers.0.self_attn.q_proj.bias"] = Tensor::zeros({32}, DType::F32);
  write(extra);
  expect_refused("'model.layers.0.self_attn.q_proj.bias' has no place");

  auto misshapen = tensors;
  misshapen["model.norm.weight"] = Tensor::zeros({31}, DType::F32);
  write(misshapen);
  expect_refused("tensor 'model.norm.weight' is (31), config.json implies (32)");
}

TEST_F(Weights, RefuseDtypesThatAreNotComputedIn) {
  auto tensors = start_from("llama_gqa");
  tensors["model.norm.weight"] = Tensor::from_ints({32}, std::vector<int32_t>(32, 1));
  write(tensors);
  expect_refused("'model.norm.weight' has the dtype I32");
}

TEST_F(Weights, RefuseNaNAndInfinityInEveryDtype) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  for (const DType dtype : {DType::F32, DType::BF16, DType::F16})
    for (const double bad : {nan, infinity, -infinity}) {
      auto tensors = start_from("llama_gqa");
      std::vector<double> values(32, 1.0);
      values[31] = bad;
      tensors["model.norm.weight"] = Tensor::from_floats({32}, values, dtype);
      write(tensors);
      expect_refused("'model.norm.weight' holds NaN or infinity");
    }
}

TEST_F(Weights, RefuseADirectoryWithoutWeights) {
  start_from("llama_gqa");
  expect_refused("neither model.safetensors nor model.safetensors.index.json");
  std::ofstream(path("pytorch_model.bin")) << "x";
  expect_refused("pytorch_model.bin is not supported");
  std::ofstream(path("model.safetensors")) << "not a safetensors file";
  expect_refused("model.safetensors: the header should have");
  EXPECT_THROW(load_model(path("config.json")), Error);
  EXPECT_THROW(load_model(path("nowhere")), Error);
}

class Shards : public Weights {
 protected:
  // Two shards, and the index that names them.
  Json split() {
    const auto tensors = start_from("llama_gqa");
    std::map<std::string, Tensor> parts[2];
    Json index = {{"weight_map", Json::object()}};
    for (const auto& [name, tensor] : tensors) {
      const int part = name.find("mlp") != std::string::npos;
      parts[part][name] = tensor;
      index["weight_map"][name] = part ? "b.safetensors" : "a.safetensors";
    }
    write(parts[0], "a.safetensors");
    write(parts[1], "b.safetensors");
    write_index(index);
    return index;
  }
  void write_index(const Json& index) {
    std::ofstream(path("model.safetensors.index.json")) << index.dump();
  }
};

TEST_F(Shards, GiveTheModelOfTheSingleFile) {
  split();
  EXPECT_EQ(logits(*load()), logits(*load_model(golden("llama_gqa"))));
}

TEST_F(Shards, AreRefusedWhereOneIsMissingOrTheIndexIsWrong) {
  Json index = split();
  fs::remove(path("b.safetensors"));
  expect_refused("b.safetensors: this shard is missing");

  index = split();
  index["weight_map"]["model.norm.weight"] = "b.safetensors";
  write_index(index);
  expect_refused("tensor 'model.norm.weight' is missing");

  index = split();
  index["weight_map"].erase("model.norm.weight");
  write_index(index);
  expect_refused("tensor 'model.norm.weight' is missing from the weights");

  index["weight_map"]["model.norm.weight"] = "../a.safetensors";
  write_index(index);
  expect_refused("wanted a name in the same directory");
  write_index({{"weight_map", 3}});
  expect_refused("weight_map is missing or empty");
  write_index(Json::array());
  expect_refused("not a JSON object");
}

TEST_F(Weights, AreSavedAndLoadedBack) {
  const auto model = load_model(golden("qwen2_tied"));
  fs::copy_file(golden("qwen2_tied") + "/config.json", path("config.json"));
  save_weights(*model, directory_.string(), DType::F32);
  EXPECT_EQ(logits(*load()), logits(*model));
  const SafetensorsFile file(path("model.safetensors"));
  EXPECT_EQ(file.find("lm_head.weight"), nullptr);  // tied weights are stored once
  EXPECT_EQ(file.metadata().at("format"), "pt");
}

TEST_F(Weights, AreDrawnAsTransformersDraws) {
  ModelConfig config = ModelConfig::load(golden("qwen2_tied"));
  config.vocab_size = 4000;
  const auto model = random_model(config, DType::F32, 7, 0.02);
  const std::vector<double> values = model->embed_tokens.weight.value().to_doubles();
  double sum = 0, squares = 0;
  for (const double x : values) {
    sum += x;
    squares += x * x;
  }
  const double n = double(values.size());  // 128,000: a mean is off by 0.02 / 358 at one sigma
  EXPECT_NEAR(sum / n, 0, 0.02 / std::sqrt(n) * 5);
  EXPECT_NEAR(std::sqrt(squares / n), 0.02, 0.02 / std::sqrt(2 * n) * 5);
  for (const double x : model->norm.weight.value().to_doubles()) EXPECT_EQ(x, 1);
  for (const double x : model->layers[0].self_attn.q_proj.bias.value().to_doubles())
    EXPECT_EQ(x, 0);
  EXPECT_EQ(random_model(config, DType::F32, 7)->embed_tokens.weight.value().to_doubles(), values);
  EXPECT_NE(random_model(config, DType::F32, 8)->embed_tokens.weight.value().to_doubles(), values);
}

class Hub : public Weights {
 protected:
  Hub() {
    keep("HF_HUB_CACHE");
    keep("HF_HOME");
    keep("HOME");
    keep("XDG_CACHE_HOME");
  }
  ~Hub() override {
    for (const auto& [name, value] : kept_)
      value ? setenv(name.c_str(), value->c_str(), 1) : unsetenv(name.c_str());
  }
  void keep(const std::string& name) {
    const char* value = std::getenv(name.c_str());
    kept_[name] = value ? std::optional<std::string>(value) : std::nullopt;
    unsetenv(name.c_str());
  }
  // A cache in `hub` that holds owner/tiny at revision abc.
  fs::path put_model(const fs::path& hub) {
    const fs::path model = hub / "models--owner--tiny";
    fs::create_directories(model / "refs");
    std::ofstream(model / "refs" / "main") << "abc";
    fs::create_directories(model / "snapshots" / "abc");
    return model / "snapshots" / "abc";
  }
  std::map<std::string, std::optional<std::string>> kept_;
};

TEST_F(Hub, FindsASnapshotWhereTheEnvironmentSays) {
  const fs::path snapshot = put_model(directory_ / "hub");
  setenv("HF_HUB_CACHE", path("hub").c_str(), 1);
  EXPECT_EQ(resolve_model("owner/tiny"), snapshot.string());
  unsetenv("HF_HUB_CACHE");
  setenv("HF_HOME", directory_.c_str(), 1);
  EXPECT_EQ(resolve_model("owner/tiny"), snapshot.string());
  unsetenv("HF_HOME");
  setenv("HOME", directory_.c_str(), 1);
  const fs::path at_home = put_model(directory_ / ".cache" / "huggingface" / "hub");
  EXPECT_EQ(resolve_model("owner/tiny"), at_home.string());
}

TEST_F(Hub, PrefersADirectory) {
  setenv("HF_HUB_CACHE", path("hub").c_str(), 1);
  EXPECT_EQ(resolve_model(directory_.string()), directory_.string());
}

TEST_F(Hub, SaysInOneLineWhatIsNotThere) {
  setenv("HF_HUB_CACHE", path("hub").c_str(), 1);
  put_model(directory_ / "hub");
  fs::create_directories(directory_ / "hub" / "models--owner--torn");
  std::ofstream(path("file")) << "x";
  for (const auto& [model, part] :
       std::map<std::string, std::string>{{"owner/none", "not in the Hugging Face cache"},
                                          {"owner/torn", "no snapshot"},
                                          {"a/b/c", "no such directory"},
                                          {"../etc", "no such directory"},
                                          {"/nowhere", "no such directory"},
                                          {path("file"), "not a directory"},
                                          {"", "empty"}}) {
    try {
      resolve_model(model);
      ADD_FAILURE() << model << " was found";
    } catch (const Error& error) {
      const std::string what = error.what();
      EXPECT_NE(what.find(part), std::string::npos) << what;
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
    }
  }
}

}  // namespace
}  // namespace graft
