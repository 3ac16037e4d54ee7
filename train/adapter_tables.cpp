#include "train/adapter_tables.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "models/fingerprint.h"
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
                               const AdapterChecks& checks)
    : adapters_(adapters) {
  const AdapterFile& first = adapters.at(0).file;
  const std::string& named = first.config.base_model_name_or_path;
  std::string directory;
  ModelConfig config;
  try {
    CHECK(!model.empty() || !named.empty(), first.directory, " names none");
    directory = resolve_model(model.empty() ? named : model);
    config = ModelConfig::load(directory);
  } catch (const Error& error) {
    if (!model.empty()) throw;
    unchecked_ = concat("names, shapes and fingerprint were not checked against the base (",
                        error.what(), "); give it with --model");
    return;
  }
  directory_ = directory;
  BaseFingerprint fingerprint;
  if (!checks.allow_other_base) {
    try {
      fingerprint = fingerprint_of(directory);
    } catch (const Error& error) {  // a config alone, as a cache may have it
      unchecked_ = concat("the fingerprint was not checked against the base (", error.what(), ")");
    }
  }
  for (const WeightedAdapter& adapter : adapters) {
    const auto shapes = random_model(config, DType::F32, 0, 0.02, Device::Meta);
    shapes->fingerprint = fingerprint;
    attach_adapter(*shapes, adapter.file, checks);
  }
}

void BaseOfAdapters::say_if_unchecked() const {
  if (!unchecked_.empty()) std::fprintf(stderr, "graft: %s\n", unchecked_.c_str());
}

BaseWeight BaseOfAdapters::weights() const {
  const auto dora = std::find_if(adapters_.begin(), adapters_.end(),
                                 [](const auto& adapter) { return has_dora(adapter.file); });
  if (dora == adapters_.end()) return {};
  CHECK(!directory_.empty(), dora->file.directory,
        ": is a DoRA adapter, which needs its base: ", unchecked_);
  return [model = std::shared_ptr<Decoder>(load_model(directory_))](const std::string& name) {
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
