// graft merge: base and adapters as one model, and the proof that it says what they said.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>

#include "models/merge.h"
#include "models/model_files.h"
#include "models/tokenizer.h"
#include "models/weights.h"
#include "train/adapter_flags.h"
#include "train/commands.h"
#include "train/options.h"

namespace graft {
namespace {

// No model was trained on it, and it has prose, names, numbers, code and another language.
constexpr const char* kHeldOutText =
    "The ferry to Kallavesi leaves at 6:45 from the northern pier, and on Thursdays at 7:10. Marit "
    "had packed two loaves, a jar of lingonberries and the letter that nobody had asked for. \"If "
    "it "
    "rains,\" said her uncle, \"we turn back at the lighthouse; if it doesn't, we go as far as the "
    "oil lasts.\" Between 1908 and 1934 the island lost 412 of its 530 people.\n\n"
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values) if values else None\n\n"
    "Question: which of the three numbers 17, 21 and 35 is prime? Answer: 17, because 21 = 3 * 7 "
    "and 35 = 5 * 7.\n"
    "Am Abend lag der Hafen still; nur eine Laterne brannte noch vor dem alten Zollhaus.\n"
    "{\"name\": \"Ines\", \"age\": 34, \"tags\": [\"sailor\", \"night shift\"], \"active\": true}\n"
    "Dear Mr Okafor, thank you for your order no. 20-7718. Two of the five lamps are out of stock; "
    "we will send them by the end of next week, free of charge.\n";

cxxopts::Options describe() {
  using cxxopts::value;
  cxxopts::Options options("graft merge",
                           "Writes the model that base and adapters are together, reads it back, "
                           "and compares the two on "
                           "text: beyond a limit nothing is kept and the status is 1.");
  options.add_options()("model", "base: directory, or hub id in the local cache",
                        value<std::string>(), "DIR");
  describe_adapter_flags(options, "to merge");
  options.add_options()("o,output-dir", "where the model goes", value<std::string>(), "DIR");
  options.add_options()("dtype", "float32, bfloat16 or float16; default: the base's",
                        value<std::string>(), "TYPE");
  describe_quantisation_flags(options);
  options.add_options()("text", "file to compare on; default: a page that is built in",
                        value<std::string>(), "FILE");
  options.add_options()("max-tokens", "of the text (default 1024)", value<std::string>(), "N");
  options.add_options()("max-difference", "limit of a logit, as a share of the largest",
                        value<std::string>(), "X");
  options.add_options()("max-kl", "limit of the mean KL in nats", value<std::string>(), "X");
  options.add_options()("min-agreement", "limit of the share of equal best tokens",
                        value<std::string>(), "X");
  options.add_options()("h,help", "print this");
  return options;
}

DType output_dtype(const cxxopts::ParseResult& args, const Decoder& base) {
  if (!args.count("dtype")) return base.embed_tokens.weight.value().dtype();
  const std::string name = args["dtype"].as<std::string>();
  if (name == "float32") return DType::F32;
  if (name == "bfloat16") return DType::BF16;
  if (name == "float16") return DType::F16;
  throw UsageError("merge: --dtype is '" + name + "', expected float32, bfloat16 or float16");
}

// Rows of up to 256 tokens.
std::vector<std::vector<int32_t>> rows_of_text(const cxxopts::ParseResult& args,
                                               const std::string& model_dir) {
  std::string text = kHeldOutText;
  if (args.count("text")) {
    const std::string path = args["text"].as<std::string>();
    std::ifstream file(path, std::ios::binary);
    CHECK(file && !std::filesystem::is_directory(path), "merge: ", path,
          ": cannot be read; --text names a file");
    text.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    // A tokenizer that puts a token in front would find one to compare on.
    CHECK(!text.empty(), "merge: ", path, ": is empty; --text wants text to compare on");
  }
  const int64_t most =
      args.count("max-tokens")
          ? whole_flag("merge", "max-tokens", args["max-tokens"].as<std::string>(), 1, INT32_MAX)
          : 1024;
  const std::vector<int32_t> ids = Tokenizer::load(model_dir).encode(text).ids;
  CHECK(!ids.empty(), "merge: the text to compare on has no tokens");
  const size_t count = std::min(ids.size(), size_t(most));
  std::vector<std::vector<int32_t>> rows;
  for (size_t begin = 0; begin < count; begin += 256)
    rows.emplace_back(ids.begin() + std::ptrdiff_t(begin),
                      ids.begin() + std::ptrdiff_t(std::min(count, begin + 256)));
  return rows;
}

CertificateLimits limits_of(const cxxopts::ParseResult& args, DType dtype) {
  constexpr double kMost = std::numeric_limits<double>::infinity();
  CertificateLimits limits = CertificateLimits::of(dtype);
  const auto read = [&](const char* flag, double& limit, double most) {
    if (args.count(flag)) limit = number_flag("merge", flag, args[flag].as<std::string>(), 0, most);
  };
  read("max-difference", limits.difference, kMost);
  read("max-kl", limits.mean_kl, kMost);
  read("min-agreement", limits.agreement, 1);
  return limits;
}

void print_certificate(const Certificate& c) {
  std::printf(
      "certificate over %lld tokens, base and adapters against the files read back:\n"
      "  largest difference of a logit  %.3g (the largest logit is %.4g)\n"
      "  KL                             mean %.3g, largest %.3g nats\n"
      "  most probable token            the same in %.2f %%\n",
      (long long)c.tokens, c.largest_difference, c.largest_logit, c.mean_kl, c.largest_kl,
      100 * c.agreement);
}

void print_loss(const Nf4Loss& loss, DType dtype) {
  const auto mib = [](int64_t bytes) { return double(bytes) / (1 << 20); };
  const std::string name(dtype_name(dtype));
  std::printf(
      "%lld weights of the base are NF4; the files have them in %s, %.4g MiB instead of %.4g:\n"
      "  from base and adapters         they differ by up to %.3g, all by %.3g %% of their norm\n"
      "  quantised to NF4 again         they would by up to %.3g, all by %.3g %% of their norm\n",
      (long long)loss.weights, name.c_str(), mib(loss.bytes_after), mib(loss.bytes_before),
      loss.rounded.largest, 100 * loss.rounded.share(), loss.quantised.largest,
      100 * loss.quantised.share());
}

int run(const cxxopts::ParseResult& args, const std::vector<AdapterChoice>& choices) {
  if (!args.unmatched().empty())
    throw UsageError("merge: unexpected argument '" + args.unmatched()[0] + "'");
  if (choices.empty()) throw UsageError("merge: --adapter DIR[:WEIGHT] is missing");
  if (!args.count("output-dir")) throw UsageError("merge: --output-dir DIR is missing");
  std::string name = args.count("model") ? args["model"].as<std::string>() : "";
  if (name.empty()) name = load_adapter_config(choices[0].directory).base_model_name_or_path;
  if (name.empty()) throw UsageError("merge: --model DIR is missing");
  const std::string model_dir = find_base(name, /*named_by_adapter=*/!args.count("model"));
  const std::string output = args["output-dir"].as<std::string>();
  if (output.empty()) throw UsageError("merge: --output-dir is empty");
  // What the file has, or NF4 makes of it, computed in F32.
  const auto base =
      load_model(model_dir, DType::F32, Device::CPU, quantisation_flags("merge", args));
  const DType dtype = output_dtype(args, *base);
  const CertificateLimits limits = limits_of(args, dtype);
  const auto rows = rows_of_text(args, model_dir);

  // Attached first: what does not fit is refused before anything is written.
  AdapterStack stack(*base);
  std::vector<WeightedAdapter> adapters;
  for (const AdapterChoice& choice : choices) {
    adapters.push_back({read_adapter(choice.directory), choice.weight});
    stack.put_on(adapters.back().file, choice.weight, adapter_checks(args));
  }
  DirectoryAside folder(output);
  const Nf4Loss loss = write_merged(*base, model_dir, adapters, dtype, folder.aside());
  const auto merged = load_model(folder.aside(), DType::F32);
  const Certificate certificate = compare_models(*base, *merged, rows);
  print_certificate(certificate);
  if (loss.weights > 0) print_loss(loss, dtype);
  const std::string wrong = violations(certificate, limits);
  CHECK(wrong.empty(), "merge: ", output,
        " is not kept, for it is not what base and adapters are: ", wrong);
  folder.finish();
  std::printf("saved %s in %s\n", output.c_str(), std::string(dtype_name(dtype)).c_str());
  return 0;
}

}  // namespace

int merge_command(int argc, char** argv) {
  std::set<std::string> switches = adapter_switches();
  switches.insert(kLoadIn4bit);
  const AdapterCommandLine line = read_adapter_flags(argc, argv, switches);
  cxxopts::Options options = describe();
  return run_command("merge", options, line.words,
                     [&](const cxxopts::ParseResult& args) { return run(args, line.adapters); });
}

}  // namespace graft
