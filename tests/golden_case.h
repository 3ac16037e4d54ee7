// Golden files as tests read them: JSON, logits, a scratch folder.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "autograd/tape.h"
#include "models/decoder.h"

namespace graft {

inline nlohmann::json golden_json(const std::string& path) {
  std::ifstream in(path);
  CHECK(in, path, ": can't be opened; tests run from the top of the repository");
  return nlohmann::json::parse(in);
}

inline std::string golden_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  CHECK(in, path, ": can't be opened");
  return {std::istreambuf_iterator<char>(in), {}};
}

class ScratchFolder {
 public:
  ScratchFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "graft-test-XXXXXX").string();
    CHECK(mkdtemp(name.data()), "mkdtemp failed");
    path_ = name;
  }
  ~ScratchFolder() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline std::vector<double> golden_numbers(const nlohmann::json& json) {
  if (json.is_number()) return {json.get<double>()};
  std::vector<double> all;
  for (const auto& part : json)
    for (const double x : golden_numbers(part)) all.push_back(x);
  return all;
}

inline std::vector<double> logits_of(Decoder& model, const nlohmann::json& rows) {
  const NoRecord off;
  std::vector<double> all;
  for (const auto& row : rows) {
    const PackedBatch batch = pack({row.get<std::vector<int32_t>>()});
    for (const double x :
         model.logits(model.forward(batch, {}).value()).to(Device::CPU).to_doubles())
      all.push_back(x);
  }
  return all;
}

// The largest difference as a share of the largest wanted; infinite for other sizes or NaN.
inline double worst_share(const std::vector<double>& got, const std::vector<double>& wanted) {
  if (got.size() != wanted.size() || got.empty()) return INFINITY;
  double worst = 0, largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::abs(got[i] - wanted[i]) <= worst)) worst = std::abs(got[i] - wanted[i]);
    largest = std::max(largest, std::abs(wanted[i]));
  }
  return std::isfinite(worst) ? worst / largest : INFINITY;
}

// What `call` throws; "" where it throws nothing. Always one line.
template <class Call>
std::string error_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    return text;
  }
  return "";
}

}  // namespace graft
