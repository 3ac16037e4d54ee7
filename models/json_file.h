// JSON files of a model directory (config.json, generation_config.json, the index of shards), with
// errors that name the file and the key.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace graft {

// The file's JSON object. Throws Error, one line with the path, when it cannot be read, is not JSON
// or not an object.
nlohmann::json read_json_object(const std::string& path);

// Reads keys of one object; an absent key and null are the same. Every error names file and key.
class JsonReader {
 public:
  JsonReader(std::string path, const nlohmann::json& object)
      : path_(std::move(path)), object_(object) {}

  const std::string& path() const { return path_; }
  const nlohmann::json& object() const { return object_; }
  bool has(const std::string& key) const;
  // A whole number in [1, 2^31).
  int64_t size(const std::string& key) const;
  int64_t size(const std::string& key, int64_t fallback) const;
  double number(const std::string& key, double fallback) const;  // finite
  bool boolean(const std::string& key, bool fallback) const;
  std::string text(const std::string& key, const std::string& fallback) const;

 private:
  [[noreturn]] void wrong(const std::string& key, const std::string& wanted) const;
  std::string path_;
  const nlohmann::json& object_;
};

}  // namespace graft
