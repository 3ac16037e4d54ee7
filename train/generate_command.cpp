// graft generate: continues a prompt with a model, with or without an adapter, and prints the
// tokens as they come.
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cxxopts.hpp>
#include <iostream>
#include <iterator>
#include <limits>

#include "models/generate.h"
#include "models/tokenizer.h"
#include "models/weights.h"
#include "tensor/thread_pool.h"
#include "train/adapter_flags.h"
#include "train/commands.h"
#include "train/device_choice.h"
#include "train/options.h"

namespace graft {
namespace {

cxxopts::Options describe() {
  using cxxopts::value;
  cxxopts::Options options(
      "graft generate",
      "Continues the prompt; prints the continuation alone. What is not given comes from the "
      "model's "
      "generation_config.json; where that does not ask for sampling, the best token is taken.");
  options.add_options()("model",
                        "directory, or hub id in the local cache; default: the first adapter's",
                        value<std::string>(), "DIR");
  describe_adapter_flags(options, "to put on the model");
  options.add_options()("prompt", "text, or - for standard input as it is", value<std::string>(),
                        "TEXT|-");
  options.add_options()("temperature", "0: always the best token", value<std::string>(), "X");
  options.add_options()("top-k", "keep the k best; 0: all", value<std::string>(), "K");
  options.add_options()("top-p", "keep the best that sum to p", value<std::string>(), "P");
  options.add_options()("min-p", "keep those at least p times as probable as the best",
                        value<std::string>(), "P");
  options.add_options()("repetition-penalty", "above 1: fewer repetitions", value<std::string>(),
                        "X");
  options.add_options()("seed", "same seed, same text (default 0)", value<std::string>(), "N");
  options.add_options()("max-new-tokens", "stop after so many", value<std::string>(), "N");
  options.add_options()("dtype", "float32 or bfloat16; default: the file's", value<std::string>(),
                        "TYPE");
  describe_quantisation_flags(options);
  options.add_options()("threads", "default: all that the machine gives", value<std::string>(),
                        "N");
  options.add_options()("device", "auto, cpu or cuda; auto (default): a GPU that can be used",
                        value<std::string>(), "DEVICE");
  options.add_options()("ignore-eos", "go on behind the end-of-text tokens");
  options.add_options()("ids", "print the new token ids instead of text");
  options.add_options()("h,help", "print this");
  return options;
}

double number(const std::string& flag, const std::string& text, double least, double most) {
  return number_flag("generate", flag, text, least, most);
}

uint64_t whole(const std::string& flag, const std::string& text, uint64_t least, uint64_t most) {
  char* end = nullptr;
  errno = 0;
  const uint64_t value = std::strtoull(text.c_str(), &end, 10);
  if (text.empty() || !std::isdigit(uint8_t(text[0])) || *end != '\0' || errno == ERANGE ||
      value < least || value > most)
    throw UsageError(concat("generate: --", flag, " is '", text, "', expected a whole number from ",
                            least, " to ", most));
  return value;
}

void apply_flags(const cxxopts::ParseResult& args, GenerationConfig& config) {
  constexpr double kMost = std::numeric_limits<double>::max();
  const auto given = [&](const char* flag) { return args.count(flag) > 0; };
  const auto text = [&](const char* flag) { return args[flag].as<std::string>(); };
  if (given("temperature"))
    config.temperature = number("temperature", text("temperature"), 0, kMost);
  if (given("top-k")) config.top_k = int64_t(whole("top-k", text("top-k"), 0, INT32_MAX));
  if (given("top-p")) config.top_p = number("top-p", text("top-p"), 0, 1);
  if (given("min-p")) config.min_p = number("min-p", text("min-p"), 0, 1);
  if (given("repetition-penalty")) {
    config.repetition_penalty = number("repetition-penalty", text("repetition-penalty"), 0, kMost);
    if (config.repetition_penalty == 0)
      throw UsageError("generate: --repetition-penalty is 0, expected more than 0 (1: none)");
  }
  if (given("seed")) config.seed = whole("seed", text("seed"), 0, UINT64_MAX);
  if (given("max-new-tokens"))
    config.max_new_tokens = int64_t(whole("max-new-tokens", text("max-new-tokens"), 1, INT32_MAX));
  // Whoever names how to sample wants sampling.
  if (given("temperature") || given("top-k") || given("top-p") || given("min-p"))
    config.do_sample = config.temperature > 0;
  if (given("ignore-eos")) config.eos_token_ids.clear();
}

std::optional<DType> read_dtype(const std::string& name) {
  if (name == "float32") return DType::F32;
  if (name == "bfloat16") return DType::BF16;
  throw UsageError(concat("generate: --dtype is '", name, "', expected float32 or bfloat16"));
}

void put(const std::string& text) {
  const size_t written = std::fwrite(text.data(), 1, text.size(), stdout);
  CHECK(written == text.size() && std::fflush(stdout) == 0, "generate: cannot write the output");
}

void stream(Decoder& model, const Tokenizer& tokenizer, const std::vector<int32_t>& prompt,
            const GenerationConfig& config, bool as_ids) {
  StreamingDecoder decoder(tokenizer);
  // A text's first space may be special to the decoder: it has to see the prompt before the rest.
  for (const int32_t id : prompt) decoder.push(id);
  bool first = true;
  generate(model, prompt, config, [&](int32_t id) {
    if (as_ids)
      put((first ? "" : " ") + std::to_string(id));
    else
      put(decoder.push(id));
    first = false;
    return true;
  });
  put(as_ids ? "\n" : decoder.finish() + "\n");
}

int run(const cxxopts::ParseResult& args, const std::vector<AdapterChoice>& adapters) {
  if (!args.unmatched().empty())
    throw UsageError("generate: unexpected argument '" + args.unmatched()[0] +
                     "'; quote a prompt with spaces");
  if (!args.count("prompt")) throw UsageError("generate: --prompt TEXT|- is missing");
  std::string name = args.count("model") ? args["model"].as<std::string>() : "";
  if (name.empty() && !adapters.empty())
    name = load_adapter_config(adapters[0].directory).base_model_name_or_path;
  if (name.empty()) throw UsageError("generate: --model DIR is missing");
  if (args.count("threads"))
    set_num_threads(int(whole("threads", args["threads"].as<std::string>(), 1, 4096)));
  std::optional<DType> dtype;
  if (args.count("dtype")) dtype = read_dtype(args["dtype"].as<std::string>());
  const Quantisation quantisation = quantisation_flags("generate", args);

  std::string about_device;  // said after the text, so that an error is one line
  const Device device = choose_device(
      read_device_choice("generate",
                         args.count("device") ? args["device"].as<std::string>() : "auto"),
      [&](const std::string& text) { about_device = "graft: " + text + "\n"; });

  const std::string directory = find_base(name, /*named_by_adapter=*/!args.count("model"));
  const Tokenizer tokenizer = Tokenizer::load(directory);
  GenerationConfig config = GenerationConfig::load(directory);
  if (config.eos_token_ids.empty() && tokenizer.eos_id())
    config.eos_token_ids.push_back(*tokenizer.eos_id());
  apply_flags(args, config);

  std::string prompt = args["prompt"].as<std::string>();
  if (prompt == "-")
    prompt.assign(std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>());
  CHECK(!std::ferror(stdin), "generate: standard input cannot be read");
  const std::vector<int32_t> ids = tokenizer.encode(prompt).ids;
  CHECK(!ids.empty(), "generate: the prompt has no tokens; expected text in --prompt");

  const auto model = load_model(directory, dtype, device, quantisation);
  AdapterStack stack(*model);
  for (const AdapterChoice& adapter : adapters)
    stack.attach(adapter.directory, adapter.weight, adapter_checks(args));
  const int64_t most = model->config().max_position_embeddings;
  if (int64_t(ids.size()) >= most)
    std::fprintf(stderr,
                 "graft: warning: the prompt has %zu tokens and the model was made for %lld "
                 "(max_position_embeddings); what follows may be poor\n",
                 ids.size(), static_cast<long long>(most));
  stream(*model, tokenizer, ids, config, args.count("ids") > 0);
  std::fputs(about_device.c_str(), stderr);
  return 0;
}

}  // namespace

int generate_command(int argc, char** argv) {
  std::set<std::string> switches = adapter_switches();
  switches.insert({"--ids", "--ignore-eos", kLoadIn4bit});
  const AdapterCommandLine line = read_adapter_flags(argc, argv, switches);
  cxxopts::Options options = describe();
  return run_command("generate", options, line.words,
                     [&](const cxxopts::ParseResult& args) { return run(args, line.adapters); });
}

}  // namespace graft
