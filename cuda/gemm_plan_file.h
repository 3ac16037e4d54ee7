// The algorithms that timing has chosen for products (cuda/gemm_plan.h), kept beside a run so that
// it can be repeated and resumed with the same bytes.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>

namespace graft {

// A JSON object: the device, the version of cublasLt, and for each product the place of the choice
// in the list that this cublasLt gives for it on this device.
class GemmPlanFile {
 public:
  struct Choice {
    int candidate = 0;
    double microseconds = 0;  // what it took when it was chosen; for readers
  };

  // Reads `path` if it is there. A plan of another device or version, or one that is not whole, is
  // left out with one line to `say`, and overwritten by the next add().
  GemmPlanFile(std::string path, std::string device, uint64_t version,
               const std::function<void(const std::string&)>& say);

  std::optional<int> find(const std::string& product) const;
  void add(const std::string& product, const Choice& choice);  // and writes the file
  int64_t size() const { return int64_t(choices_.size()); }

 private:
  std::string read();  // empty, or why the file was left out
  std::string path_, device_;
  uint64_t version_;
  std::map<std::string, Choice> choices_;
};

}  // namespace graft
