#include "train/adapter_flags.h"

#include <cmath>
#include <cstdlib>

#include "models/weights.h"
#include "train/options.h"

namespace graft {

AdapterCommandLine read_adapter_flags(int argc, char** argv,
                                      const std::set<std::string>& switches) {
  AdapterCommandLine line;
  line.words.push_back(argv[0]);
  const std::string command = line.words[0].substr(line.words[0].rfind(' ') + 1);
  for (int i = 1; i < argc; ++i) {
    std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      line.words.push_back(word);
      continue;
    }
    const size_t equals = word.find('=');
    for (size_t c = 2; c < std::min(equals, word.size()); ++c)  // --top_k is --top-k
      if (word[c] == '_') word[c] = '-';
    const std::string flag = word.substr(0, equals);
    const bool takes_next =
        equals == std::string::npos && !switches.contains(flag) && flag != "--help" && i + 1 < argc;
    if (flag != "--adapter") {
      line.words.push_back(word);
      if (takes_next) line.words.push_back(argv[++i]);
      continue;
    }
    const std::string value = takes_next                    ? argv[++i]
                              : equals == std::string::npos ? ""
                                                            : word.substr(equals + 1);
    if (value.empty()) throw UsageError(command + ": --adapter needs a directory, or DIR:WEIGHT");
    line.adapters.push_back(parse_adapter_choice(value));
  }
  return line;
}

void describe_adapter_flags(cxxopts::Options& options, const std::string& what) {
  options.add_options()("adapter",
                        "PEFT adapter " + what + "; again for more, each weighted by :WEIGHT",
                        cxxopts::value<std::string>(), "DIR[:WEIGHT]");
  options.add_options()("allow-other-base", "take adapters that were trained on another base");
  options.add_options()("allow-empty", "take adapters whose B are all zero");
}

const std::set<std::string>& adapter_switches() {
  static const std::set<std::string> switches = {"--allow-other-base", "--allow-empty"};
  return switches;
}

AdapterChecks adapter_checks(const cxxopts::ParseResult& args) {
  AdapterChecks checks;
  checks.allow_other_base = args.count("allow-other-base") > 0;
  checks.allow_empty = args.count("allow-empty") > 0;
  return checks;
}

std::string find_base(const std::string& name, bool named_by_adapter) {
  try {
    return resolve_model(name);
  } catch (const Error& error) {
    if (!named_by_adapter) throw;
    fail(error.what(), " (the adapter's base_model_name_or_path; say where it is with --model)");
  }
}

void describe_quantisation_flags(cxxopts::Options& options) {
  options.add_options()("load-in-4bit",
                        "quantise the model's linear layers to NF4, as method qlora trains on");
  options.add_options()("bnb-4bit-use-double-quant",
                        "with load-in-4bit: quantise the scales too; true (default) or false",
                        cxxopts::value<std::string>(), "BOOL");
}

Quantisation quantisation_flags(const std::string& command, const cxxopts::ParseResult& args) {
  Quantisation quantisation;
  quantisation.load_in_4bit = args.count("load-in-4bit") > 0;
  if (!args.count("bnb-4bit-use-double-quant")) return quantisation;
  const std::string text = args["bnb-4bit-use-double-quant"].as<std::string>();
  if (text != "true" && text != "false")
    throw UsageError(
        concat(command, ": --bnb-4bit-use-double-quant is '", text, "', expected true or false"));
  if (!quantisation.load_in_4bit)
    throw UsageError(
        concat(command, ": --bnb-4bit-use-double-quant is given without ", kLoadIn4bit));
  quantisation.double_quant = text == "true";
  return quantisation;
}

int run_command(const std::string& command, cxxopts::Options& options,
                const std::vector<std::string>& words,
                const std::function<int(const cxxopts::ParseResult&)>& run) {
  std::vector<const char*> pointers;
  for (const std::string& word : words) pointers.push_back(word.c_str());
  try {
    const cxxopts::ParseResult args = options.parse(int(pointers.size()), pointers.data());
    if (!args.count("help")) return run(args);
    std::printf("%s\n", options.help().c_str());
    return 0;
  } catch (const cxxopts::exceptions::exception& error) {
    const std::string hint = unknown_flag_hint(options.help(), {words.begin() + 1, words.end()});
    throw UsageError(concat(command, ": ", hint.empty() ? error.what() : hint, "; see graft ",
                            command, " --help"));
  }
}

double number_flag(const std::string& command, const std::string& flag, const std::string& text,
                   double least, double most) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= least && value <= most))
    throw UsageError(concat(command, ": --", flag, " is '", text, "', expected a number from ",
                            least, std::isinf(most) ? "" : concat(" to ", most)));
  return value;
}

int64_t whole_flag(const std::string& command, const std::string& flag, const std::string& text,
                   int64_t least, int64_t most) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= double(least) && value <= double(most)) ||
      value != std::floor(value))
    throw UsageError(concat(command, ": --", flag, " is '", text,
                            "', expected a whole number from ", least, " to ", most));
  return int64_t(value);
}

}  // namespace graft
