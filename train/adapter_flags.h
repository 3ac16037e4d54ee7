// Flags that several commands take: --adapter, which they take again (--adapter a --adapter b:0.5),
// and in what the base is loaded.
#pragma once

#include <cxxopts.hpp>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "models/adapter_stack.h"
#include "models/nf4_weights.h"

namespace graft {

// A command line that cxxopts can take: dashes in the names of flags, and every --adapter apart.
// (cxxopts would cut a path with a comma in it.)
struct AdapterCommandLine {
  std::vector<std::string> words;  // the command's name first
  std::vector<AdapterChoice> adapters;
};

// switches: the flags without a value ("--ids"); what stands behind any other is never read as a
// flag. Throws UsageError for an --adapter without one.
AdapterCommandLine read_adapter_flags(int argc, char** argv, const std::set<std::string>& switches);

// Adds --adapter, --allow-other-base and --allow-empty to the help. `what`: "to put on the model".
void describe_adapter_flags(cxxopts::Options& options, const std::string& what);
const std::set<std::string>& adapter_switches();
AdapterChecks adapter_checks(const cxxopts::ParseResult& args);  // an empty one is refused

// resolve_model, with an error that tells where a name comes from that nobody typed.
std::string find_base(const std::string& name, bool named_by_adapter);

// Adds --load-in-4bit, which is a switch, and --bnb-4bit-use-double-quant to the help.
constexpr const char* kLoadIn4bit = "--load-in-4bit";
void describe_quantisation_flags(cxxopts::Options& options);
Quantisation quantisation_flags(const std::string& command, const cxxopts::ParseResult& args);

// Parses and runs; what cxxopts does not like becomes a UsageError that begins with the command's
// name and, for an unknown flag, names the nearest.
int run_command(const std::string& command, cxxopts::Options& options,
                const std::vector<std::string>& words,
                const std::function<int(const cxxopts::ParseResult&)>& run);

// The whole text of a flag as a number in [least, most]; else a UsageError.
double number_flag(const std::string& command, const std::string& flag, const std::string& text,
                   double least, double most);
int64_t whole_flag(const std::string& command, const std::string& flag, const std::string& text,
                   int64_t least, int64_t most);

}  // namespace graft
