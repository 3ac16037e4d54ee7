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

// The base of some adapters, if any of them needs it (DoRA); mapped, in the file's dtype.
class BaseOfAdapters {
 public:
  // model: "" for the first adapter's base_model_name_or_path
  BaseOfAdapters(const std::string& model, const std::vector<WeightedAdapter>& adapters,
                 const AdapterChecks& checks);
  BaseWeight weights() const;  // empty where nobody needs it; valid while this lives

 private:
  std::shared_ptr<Decoder> model_;
};

// A line per module, and one for all: rank, energy kept, error.
void print_losses(const std::vector<CombinedModule>& modules);

}  // namespace graft
