#include "cuda/gemm_plan_file.h"

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tensor/check.h"
#include "tensor/safetensors.h"

namespace graft {
namespace {
constexpr int kMaxCandidate = 1000;
}

GemmPlanFile::GemmPlanFile(std::string path, std::string device, uint64_t version,
                           const std::function<void(const std::string&)>& say)
    : path_(std::move(path)), device_(std::move(device)), version_(version) {
  if (!std::filesystem::exists(path_)) return;
  if (const std::string reason = read(); !reason.empty()) {
    choices_.clear();
    say(concat("tune: ", path_, " ", reason, "; it is left out"));
  }
}

std::string GemmPlanFile::read() {
  if (!std::filesystem::is_regular_file(path_)) return "is not a file";
  std::ifstream file(path_, std::ios::binary);
  const auto json = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  const std::string torn = "is not a whole plan of products";
  if (!json.is_object() || !json.contains("device") || !json["device"].is_string() ||
      !json.contains("cublaslt") || !json["cublaslt"].is_number_unsigned() ||
      !json.contains("products") || !json["products"].is_object())
    return torn;
  if (json["device"] != device_)
    return concat("was made for ", json["device"].dump(-1, ' ', /*ensure_ascii=*/true),
                  ", this is ", device_);
  if (json["cublaslt"] != version_)
    return concat("was made for cublasLt ", json["cublaslt"].get<uint64_t>(), ", this is ",
                  version_);
  for (const auto& [product, value] : json["products"].items()) {
    if (!value.is_object() || !value.contains("candidate") ||
        !value["candidate"].is_number_integer() || value["candidate"] < 0 ||
        value["candidate"] > kMaxCandidate || !value.contains("us") || !value["us"].is_number())
      return torn;
    choices_[product] = {value["candidate"].get<int>(), value["us"].get<double>()};
  }
  return "";
}

std::optional<int> GemmPlanFile::find(const std::string& product) const {
  const auto found = choices_.find(product);
  if (found == choices_.end()) return std::nullopt;
  return found->second.candidate;
}

void GemmPlanFile::add(const std::string& product, const Choice& choice) {
  choices_[product] = choice;
  nlohmann::ordered_json json = {{"device", device_}, {"cublaslt", version_}};
  json["products"] = nlohmann::ordered_json::object();
  for (const auto& [name, made] : choices_)
    json["products"][name] = {{"candidate", made.candidate}, {"us", made.microseconds}};
  write_file_atomically(path_, json.dump(1) + "\n");
}

}  // namespace graft
