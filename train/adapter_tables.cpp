#include "train/adapter_tables.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "models/weights.h"

namespace graft {

void check_adapter_output(const std::string& command, const std::string& directory) {
  namespace fs = std::filesystem;
  CHECK(!fs::exists(directory) || fs::is_directory(directory), command, ": ", directory,
        " is not a directory");
  CHECK(!fs::exists(directory) || fs::is_empty(directory), command, ": ", directory,
        " holds files already; choose another output directory");
}

BaseOfAdapters::BaseOfAdapters(const std::string& model,
                               const std::vector<WeightedAdapter>& adapters,
                               const AdapterChecks& checks) {
  const bool needed = std::any_of(adapters.begin(), adapters.end(),
                                  [](const auto& adapter) { return has_dora(adapter.file); });
  if (!needed) return;
  std::string name = model;
  if (name.empty()) name = adapters.at(0).file.config.base_model_name_or_path;
  CHECK(!name.empty(), adapters.at(0).file.directory,
        ": is a DoRA adapter, which needs its base; give it with --model");
  model_ = load_model(resolve_model(name));
  for (const WeightedAdapter& adapter : adapters)
    if (!checks.allow_other_base)
      check_same_base(adapter.file.base, model_->fingerprint, adapter.file.directory);
}

BaseWeight BaseOfAdapters::weights() const {
  if (!model_) return {};
  return [model = model_](const std::string& name) {
    for (const NamedLinear& layer : adaptable_layers(*model))
      if (layer.name == name) return layer.linear->weight.value();
    fail("'", name, "' has no place in the base; is it the base of the adapter?");
  };
}

void print_losses(const std::vector<CombinedModule>& modules) {
  std::printf("%-44s %5s %5s %10s %10s\n", "module", "of", "rank", "energy", "error");
  double worst = 0, energy = 1;
  for (const CombinedModule& one : modules) {
    std::printf("%-44s %5lld %5lld %8.3f %% %10.3g\n", one.name.c_str(), (long long)one.full_rank,
                (long long)one.rank, 100 * one.energy, one.error);
    worst = std::max(worst, one.error);
    energy = std::min(energy, one.energy);
  }
  std::printf("%-44s %5s %5s %8.3f %% %10.3g\n", "least energy, largest error", "", "",
              100 * energy, worst);
}

}  // namespace graft
