#include "models/combine.h"

#include <algorithm>
#include <map>

#include "models/adapter_delta.h"
#include "models/low_rank.h"
#include "tensor/backend.h"
#include "tensor/finite.h"

namespace graft {
namespace {

// A module of the sum, with what each adapter adds to it.
struct Parts {
  std::string name;
  std::vector<std::pair<const AdapterModule*, double>> parts;  // and its adapter's weight
  bool dora = false;
};

std::vector<Parts> parts_of(const std::vector<WeightedAdapter>& adapters) {
  for (const WeightedAdapter& adapter : adapters) check_pairs_alone(adapter.file, "a sum of pairs");
  CHECK(!adapters.empty(), "combine: no adapter is given");
  std::vector<Parts> all;
  std::map<std::string, size_t> where;
  for (const WeightedAdapter& adapter : adapters)
    for (const AdapterModule& module : adapter.file.modules) {
      const auto [at, is_new] = where.try_emplace(module.name, all.size());
      if (is_new) all.push_back({module.name, {}, false});
      Parts& parts = all[at->second];
      const AdapterModule* first = parts.parts.empty() ? &module : parts.parts[0].first;
      CHECK(first->a.size(1) == module.a.size(1) && first->b.size(0) == module.b.size(0),
            "combine: ", module.name, " is (", module.b.size(0), ", ", module.a.size(1), ") in ",
            adapter.file.directory, " but (", first->b.size(0), ", ", first->a.size(1), ") in ",
            adapters[0].file.directory, "; adapters of one base can be combined");
      parts.parts.emplace_back(&module, adapter.weight);
      parts.dora = parts.dora || module.magnitude.defined();
    }
  return all;
}

std::vector<LowRankTerm> terms_of(const Parts& parts) {
  std::vector<LowRankTerm> terms;
  for (const auto& [module, weight] : parts.parts)
    terms.push_back({module->a, module->b, weight * module->scaling});
  return terms;
}

bool same_targets(const LoraConfig& a, const LoraConfig& b) {
  const auto sorted = [](std::vector<std::string> names) {
    std::sort(names.begin(), names.end());  // PEFT writes them as a set
    return names;
  };
  return sorted(a.target_modules) == sorted(b.target_modules) &&
         a.target_is_regex == b.target_is_regex &&
         sorted(a.exclude_modules) == sorted(b.exclude_modules) &&
         a.exclude_is_regex == b.exclude_is_regex && a.layers_to_transform == b.layers_to_transform;
}

// Everything of the result but its modules.
Combined begin_combined(const std::vector<WeightedAdapter>& adapters) {
  Combined result;
  const AdapterFile& first = adapters[0].file;
  result.file.config = first.config;
  result.file.config.use_dora = false;
  for (const WeightedAdapter& adapter : adapters) {
    const AdapterFile& file = adapter.file;
    CHECK(file.embeddings.empty(), file.directory, ": '",
          file.embeddings.empty() ? "" : file.embeddings[0].first,
          "' is a whole embedding, which cannot be combined");
    CHECK(!file.replaced.empty() || file.config.modules_to_save.empty(), file.directory,
          ": modules_to_save of adapter_config.json names '",
          file.config.modules_to_save.empty() ? "" : file.config.modules_to_save[0],
          "', whose tensor is missing; do the two files belong together?");
    CHECK(file.replaced.empty(), "combine: ", file.directory, " has its own '",
          file.replaced.empty() ? "" : file.replaced[0].first,
          "' in the place of the base's, which is no sum of matrices; take it on by itself");
    if (result.file.base.weights.empty()) result.file.base.weights = file.base.weights;
    if (result.file.base.tokenizer.empty()) result.file.base.tokenizer = file.base.tokenizer;
  }
  return result;
}

void end_combined(Combined& result, const std::vector<WeightedAdapter>& adapters) {
  for (const AdapterModule& module : result.file.modules)
    CHECK(all_finite(module.a) && all_finite(module.b), "combine: '", module.name,
          "' is beyond what F32 can hold; take smaller weights");
  bool same = true;
  for (const WeightedAdapter& adapter : adapters)
    same = same && same_targets(adapter.file.config, adapters[0].file.config);
  result.file.config.lora_dropout = 0;
  result.file.config.init_lora_weights = LoraConfig::Init::KaimingUniform;
  describe_modules(result.file, same);
}

// The value that most of the modules have; of equally many, the largest.
template <class T>
T most_common(const std::vector<T>& values) {
  std::map<T, size_t> counts;
  for (const T& value : values) ++counts[value];
  return std::max_element(counts.begin(), counts.end(),
                          [](auto& a, auto& b) {
                            return a.second < b.second ||
                                   (a.second == b.second && a.first < b.first);
                          })
      ->first;
}

}  // namespace

bool has_dora(const AdapterFile& file) {
  return std::any_of(file.modules.begin(), file.modules.end(),
                     [](const AdapterModule& module) { return module.magnitude.defined(); });
}

void describe_modules(AdapterFile& file, bool keep_targets) {
  std::vector<int64_t> ranks;
  std::vector<double> alphas;
  for (const AdapterModule& module : file.modules) {
    ranks.push_back(module.a.size(0));
    alphas.push_back(module.scaling * double(module.a.size(0)));
  }
  LoraConfig& config = file.config;
  config.use_rslora = false;
  config.r = most_common(ranks);
  config.lora_alpha = most_common(alphas);
  config.rank_pattern.clear();
  config.alpha_pattern.clear();
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] != config.r) config.rank_pattern.emplace_back(file.modules[i].name, ranks[i]);
    if (alphas[i] != *config.lora_alpha)
      config.alpha_pattern.emplace_back(file.modules[i].name, alphas[i]);
  }
  if (keep_targets) return;
  config.target_modules.clear();
  for (const AdapterModule& module : file.modules) config.target_modules.push_back(module.name);
  config.target_is_regex = config.exclude_is_regex = false;
  config.exclude_modules.clear();
  config.layers_to_transform.clear();
}

Combined combine_cat(const std::vector<WeightedAdapter>& adapters) {
  for (const WeightedAdapter& adapter : adapters)
    CHECK(!has_dora(adapter.file), "combine: ", adapter.file.directory,
          " is a DoRA adapter, whose delta has full rank; --method cat is exact and cannot hold "
          "it, take --method svd");
  const std::vector<Parts> all = parts_of(adapters);
  Combined result = begin_combined(adapters);
  for (const Parts& parts : all) {
    const LowRankTerm sum = concatenate(terms_of(parts));
    const int64_t rank = sum.a.size(0);
    result.file.modules.push_back({parts.name, sum.a, sum.b, {}, 1});
    result.modules.push_back({parts.name, rank, rank, 1, 0});
  }
  end_combined(result, adapters);
  return result;
}

Combined combine_svd(const std::vector<WeightedAdapter>& adapters, int64_t rank,
                     const BaseWeight& base) {
  const std::vector<Parts> all = parts_of(adapters);
  Combined result = begin_combined(adapters);
  for (const Parts& parts : all) {
    const AdapterModule& first = *parts.parts[0].first;
    const int64_t out = first.b.size(0), in = first.a.size(1);
    CombinedModule told{parts.name, std::min(out, in)};
    Truncated cut;
    if (parts.dora) {
      CHECK(base, "combine: ", parts.name,
            " has a DoRA delta, which is made from the base's "
            "weight; give the base with --model");
      Tensor delta = Tensor::zeros({out, in}, DType::F32, Device::CPU, Scope::Scratch);
      const Tensor weight = base(parts.name);
      for (const auto& [module, factor] : parts.parts) add_delta(delta, weight, *module, factor);
      cut = truncate_dense(delta, rank);
    } else {
      int64_t sum = 0;
      for (const auto& [module, factor] : parts.parts) sum += module->a.size(0);
      told.full_rank = std::min(told.full_rank, sum);
      cut = truncate(terms_of(parts), rank);
    }
    told.rank = cut.factors.a.size(0);
    told.energy = cut.energy;
    told.error = cut.error;
    result.file.modules.push_back({parts.name, cut.factors.a, cut.factors.b, {}, 1});
    result.modules.push_back(told);
  }
  end_combined(result, adapters);
  return result;
}

}  // namespace graft
