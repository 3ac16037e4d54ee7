// What combine, convert and merge share: where their output may go, the base's weights, and the
// table of what was lost.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/adapter.h"
#include "models/combine.h"
#include "models/decoder.h"

namespace graft {

// Throws Error where `directory` holds files already.
void check_adapter_output(const std::string& command, const std::string& directory);

// The base of adapters that are only rewritten. Every adapter is checked against it as load_adapter
// does, by its config and fingerprint: no weight is loaded for that.
class BaseOfAdapters {
 public:
  // model: "" for the first adapter's base_model_name_or_path, which need not be on this machine,
  // or be more than a config.
  BaseOfAdapters(const std::string& model, const std::vector<WeightedAdapter>& adapters,
                 const AdapterChecks& checks);
  // One line on standard error where not everything could be checked; for the end of a command.
  void say_if_unchecked() const;
  // What DoRA needs: mapped, in the file's dtype. Empty where no adapter is DoRA; valid while the
  // adapters live.
  BaseWeight weights() const;

 private:
  const std::vector<WeightedAdapter>& adapters_;
  std::string directory_;  // empty where it is not there
  std::string unchecked_;
};

// A line per module, and one for all: rank, energy kept, error.
void print_losses(const std::vector<CombinedModule>& modules);

}  // namespace graft
