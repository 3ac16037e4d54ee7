#include "models/model_files.h"

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "tensor/check.h"
#include "tensor/safetensors.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFiles[] = {
    "generation_config.json",  "tokenizer.json",      "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json",          "merges.txt",
    "added_tokens.json",       "chat_template.jinja", "tokenizer.model"};

}  // namespace

void copy_model_files(const std::string& model_dir, const std::string& folder, DType dtype,
                      bool tied) {
  const std::string path = model_dir + "/config.json";
  std::ifstream file(path, std::ios::binary);
  auto config = nlohmann::ordered_json::parse(file, nullptr, /*allow_exceptions=*/false);
  CHECK(config.is_object(), path, ": is not a JSON object");
  const std::string name = dtype == DType::BF16  ? "bfloat16"
                           : dtype == DType::F16 ? "float16"
                                                 : "float32";
  config[config.contains("dtype") ? "dtype" : "torch_dtype"] = name;
  if (config.value("tie_word_embeddings", false) != tied) config["tie_word_embeddings"] = tied;
  config.erase("quantization_config");
  write_file_atomically(folder + "/config.json", config.dump(2) + "\n");
  for (const char* one : kFiles) {
    const std::string from = model_dir + "/" + one, to = folder + "/" + one;
    if (!fs::exists(from)) continue;
    fs::copy_file(from, to, fs::copy_options::overwrite_existing);
    // A model may be read-only; its copy belongs to whoever made it.
    fs::permissions(to, fs::perms::owner_write, fs::perm_options::add);
  }
}

std::string first_missing(const std::string& path) {
  fs::path missing;
  for (fs::path at = fs::absolute(path).lexically_normal(); !fs::exists(at); at = at.parent_path())
    if (at.has_filename()) missing = at;
  return missing;
}

DirectoryAside::DirectoryAside(const std::string& path) : path_(path) {
  while (path_.size() > 1 && path_.ends_with('/')) path_.pop_back();
  was_there_ = fs::exists(path_);
  CHECK(!was_there_ || (fs::is_directory(path_) && fs::is_empty(path_)), path_,
        ": is there already; choose another output directory");
  aside_ = path_ + (was_there_ ? "/.unfinished" : ".unfinished");
  made_ = first_missing(fs::absolute(path_).lexically_normal().parent_path());
  std::error_code error;
  fs::remove_all(aside_, error);
  fs::create_directories(aside_, error);
  CHECK(!error, path_, ": cannot be created: ", error.message());
}

DirectoryAside::~DirectoryAside() {
  std::error_code error;
  if (!finished_) fs::remove_all(made_.empty() ? aside_ : made_, error);
}

void DirectoryAside::finish() {
  std::error_code error;
  if (was_there_) {
    const std::vector<fs::path> files{fs::directory_iterator(aside_), fs::directory_iterator()};
    for (const fs::path& file : files) {
      fs::rename(file, fs::path(path_) / file.filename(), error);
      CHECK(!error, path_, ": cannot be written: ", error.message());
    }
    fs::remove(aside_, error);
  } else {
    fs::rename(aside_, path_, error);
    CHECK(!error, path_, ": cannot be created: ", error.message());
  }
  finished_ = true;
}

}  // namespace graft
