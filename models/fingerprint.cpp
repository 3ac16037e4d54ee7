#include "models/fingerprint.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>

#include "models/json_file.h"
#include "tensor/check.h"
#include "tensor/mapped_file.h"
#include "tensor/safetensors.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kWholeBytes = 1 << 16, kPieces = 16, kPieceBytes = 4096;

// 64 bits over words: multiply and fold. It tells files apart that nobody made to be mistaken.
class Hash {
 public:
  void add(const void* data, int64_t bytes) {
    const char* at = static_cast<const char*>(data);
    for (; bytes >= 8; at += 8, bytes -= 8) add_word(at, 8);
    if (bytes > 0) add_word(at, size_t(bytes));
  }
  void add(const std::string& text) {
    add_number(int64_t(text.size()));
    add(text.data(), int64_t(text.size()));
  }
  void add_number(int64_t value) { add_word(&value, 8); }
  // The scheme's number first: another scheme is not compared with this one.
  std::string text() const {
    char digits[32];
    std::snprintf(digits, sizeof digits, "1-%016llx", static_cast<unsigned long long>(state_));
    return digits;
  }

 private:
  void add_word(const void* data, size_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, data, bytes);
    const auto product = static_cast<unsigned __int128>(state_ ^ word) * 0x9e3779b97f4a7c15u;
    state_ = uint64_t(product) ^ uint64_t(product >> 64) ^ 0x2545f4914f6cdd1du;
  }
  uint64_t state_ = 0x6a09e667f3bcc908u;
};

struct Place {
  std::shared_ptr<const SafetensorsFile> file;
  const SafetensorsEntry* entry;
};

// The files that load_model would read; it is load_model that says what is wrong with them.
std::map<std::string, Place> places(const std::string& model_dir) {
  std::map<std::string, Place> result;
  const auto add = [&](const std::string& name, std::shared_ptr<const SafetensorsFile> file) {
    const SafetensorsEntry* entry = file->find(name);
    if (entry) result[name] = {std::move(file), entry};
  };
  const fs::path single = fs::path(model_dir) / "model.safetensors";
  if (fs::exists(single)) {
    const auto file = std::make_shared<SafetensorsFile>(single.string());
    for (const SafetensorsEntry& entry : file->entries()) add(entry.name, file);
    return result;
  }
  const auto json = read_json_object((single.string() + ".index.json"));
  std::map<std::string, std::shared_ptr<const SafetensorsFile>> opened;
  for (const auto& [name, shard] : json.at("weight_map").items()) {
    auto& file = opened[shard.get<std::string>()];
    if (!file)
      file = std::make_shared<SafetensorsFile>(
          (fs::path(model_dir) / shard.get<std::string>()).string());
    add(name, file);
  }
  return result;
}

std::string of_weights(const std::string& model_dir) {
  Hash hash;
  for (const auto& [name, place] : places(model_dir)) {
    hash.add(name);
    hash.add(place.entry->dtype);
    for (const int64_t size : place.entry->shape) hash.add_number(size);
    const char* bytes = place.file->bytes(*place.entry);
    const int64_t count = place.entry->end - place.entry->begin;
    if (count <= kWholeBytes) {
      hash.add(bytes, count);
      continue;
    }
    for (int64_t i = 0; i < kPieces; ++i)
      hash.add(bytes + (count - kPieceBytes) * i / (kPieces - 1), kPieceBytes);
  }
  return hash.text();
}

std::string of_tokenizer(const std::string& path) {
  const MappedFile file(path);
  std::string dense;
  bool quoted = false;
  for (int64_t i = 0; i < file.size(); ++i) {
    const char c = file.data()[i];
    if (c == '"') quoted = !quoted;
    if (!quoted && (c == ' ' || c == '\n' || c == '\r' || c == '\t')) continue;
    dense += c;
    if (quoted && c == '\\' && i + 1 < file.size()) dense += file.data()[++i];
  }
  Hash hash;
  hash.add(dense);
  return hash.text();
}

}  // namespace

BaseFingerprint fingerprint_of(const std::string& model_dir) {
  BaseFingerprint result;
  result.weights = of_weights(model_dir);
  const std::string tokenizer = (fs::path(model_dir) / "tokenizer.json").string();
  if (fs::exists(tokenizer)) result.tokenizer = of_tokenizer(tokenizer);
  return result;
}

}  // namespace graft
