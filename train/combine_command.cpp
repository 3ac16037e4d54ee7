// graft combine: one adapter out of several, exactly or at a chosen rank.
#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "models/combine.h"
#include "models/model_files.h"
#include "models/weights.h"
#include "train/adapter_flags.h"
#include "train/adapter_tables.h"
#include "train/commands.h"
#include "train/options.h"

namespace graft {
namespace {

cxxopts::Options describe() {
  using cxxopts::value;
  cxxopts::Options options(
      "graft combine",
      "Writes the weighted sum of adapters as one LoRA adapter. cat puts their factors side by "
      "side "
      "and is exact; svd keeps the best of a chosen rank and says what that loses.");
  describe_adapter_flags(options, "to combine");
  options.add_options()("o,output-dir", "where the adapter goes", value<std::string>(), "DIR");
  options.add_options()("method", "cat (default) or svd", value<std::string>(), "METHOD");
  options.add_options()("rank", "svd: of the result; default: the largest of the adapters'",
                        value<std::string>(), "N");
  options.add_options()(
      "model", "the base, which the adapters are checked against; default: the first adapter's",
      value<std::string>(), "DIR");
  options.add_options()("h,help", "print this");
  return options;
}

int run(const cxxopts::ParseResult& args, const std::vector<AdapterChoice>& choices) {
  if (!args.unmatched().empty())
    throw UsageError("combine: unexpected argument '" + args.unmatched()[0] + "'");
  if (choices.empty()) throw UsageError("combine: --adapter DIR[:WEIGHT] is missing");
  if (!args.count("output-dir")) throw UsageError("combine: --output-dir DIR is missing");
  const std::string method = args.count("method") ? args["method"].as<std::string>() : "cat";
  if (method != "cat" && method != "svd")
    throw UsageError("combine: --method is '" + method + "', expected cat or svd");
  if (method == "cat" && args.count("rank"))
    throw UsageError("combine: --rank is given with method cat, whose rank is the sum of all");
  const std::string output = args["output-dir"].as<std::string>();
  if (output.empty()) throw UsageError("combine: --output-dir is empty");
  check_adapter_output("combine", output);

  const AdapterChecks checks = adapter_checks(args);
  std::vector<WeightedAdapter> adapters;
  int64_t rank = 1;
  for (const AdapterChoice& choice : choices) {
    adapters.push_back({read_adapter(choice.directory), choice.weight});
    const AdapterFile& file = adapters.back().file;
    if (!checks.allow_empty) check_not_empty(file);
    if (!checks.allow_other_base) check_same_base(file.base, adapters[0].file.base, file.directory);
    for (const AdapterModule& module : file.modules) rank = std::max(rank, module.a.size(0));
  }
  if (args.count("rank"))
    rank = whole_flag("combine", "rank", args["rank"].as<std::string>(), 1, INT32_MAX);

  const BaseOfAdapters base(args.count("model") ? args["model"].as<std::string>() : "", adapters,
                            checks);
  const Combined combined =
      method == "cat" ? combine_cat(adapters) : combine_svd(adapters, rank, base.weights());
  DirectoryAside folder(output);
  write_adapter(combined.file, folder.aside());
  folder.finish();
  if (method == "svd") print_losses(combined.modules);
  const auto [least, most] =
      std::minmax_element(combined.file.modules.begin(), combined.file.modules.end(),
                          [](const auto& a, const auto& b) { return a.a.size(0) < b.a.size(0); });
  const int64_t low = least->a.size(0), high = most->a.size(0);
  const std::string ranks = low == high ? concat(high) : concat(low, " to ", high);
  std::printf("saved %s: %zu modules, r %s%s\n", output.c_str(), combined.modules.size(),
              ranks.c_str(), method == "cat" ? ", exact" : "");
  base.say_if_unchecked();
  return 0;
}

}  // namespace

int combine_command(int argc, char** argv) {
  const AdapterCommandLine line = read_adapter_flags(argc, argv, adapter_switches());
  cxxopts::Options options = describe();
  return run_command("combine", options, line.words,
                     [&](const cxxopts::ParseResult& args) { return run(args, line.adapters); });
}

}  // namespace graft
