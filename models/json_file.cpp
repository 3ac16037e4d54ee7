#include "models/json_file.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include "tensor/check.h"

namespace graft {

using Json = nlohmann::json;

Json read_json_object(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  CHECK(in, path, ": cannot be read: ", std::strerror(errno));
  text << in.rdbuf();  // fails, too, when there is nothing to copy
  CHECK(text, path, ": is empty or cannot be read; expected a JSON object");
  Json json;
  try {
    json = Json::parse(text.str());
  } catch (const Json::parse_error& error) {
    fail(path, ": not JSON: syntax error at byte ", error.byte);
  }
  CHECK(json.is_object(), path, ": not a JSON object");
  return json;
}

bool JsonReader::has(const std::string& key) const {
  return object_.contains(key) && !object_[key].is_null();
}

void JsonReader::wrong(const std::string& key, const std::string& wanted) const {
  std::string got = object_[key].dump(-1, ' ', false, Json::error_handler_t::replace);
  if (got.size() > 60) got = got.substr(0, 60) + "...";
  fail(path_, ": ", key, " is ", got, ", wanted ", wanted);
}

int64_t JsonReader::size(const std::string& key) const {
  CHECK(has(key), path_, ": ", key, " is missing");
  const Json& value = object_[key];
  const bool whole = value.is_number_integer();
  if (!whole || value.get<double>() < 1 || value.get<double>() >= 2147483648.0)
    wrong(key, "a whole number from 1 to 2147483647");
  return value.get<int64_t>();
}

int64_t JsonReader::size(const std::string& key, int64_t fallback) const {
  return has(key) ? size(key) : fallback;
}

double JsonReader::number(const std::string& key, double fallback) const {
  if (!has(key)) return fallback;
  if (!object_[key].is_number() || !std::isfinite(object_[key].get<double>()))
    wrong(key, "a number");
  return object_[key].get<double>();
}

bool JsonReader::boolean(const std::string& key, bool fallback) const {
  if (!has(key)) return fallback;
  if (!object_[key].is_boolean()) wrong(key, "true or false");
  return object_[key].get<bool>();
}

std::string JsonReader::text(const std::string& key, const std::string& fallback) const {
  if (!has(key)) return fallback;
  if (!object_[key].is_string()) wrong(key, "a string");
  return object_[key].get<std::string>();
}

}  // namespace graft
