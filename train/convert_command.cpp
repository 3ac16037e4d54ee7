// graft convert: an adapter in another format, of lower rank, or DoRA as LoRA.
#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "models/gguf_adapter.h"
#include "models/mlx_adapter.h"
#include "models/model_files.h"
#include "models/weights.h"
#include "train/adapter_flags.h"
#include "train/adapter_tables.h"
#include "train/commands.h"
#include "train/options.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

cxxopts::Options describe() {
  using cxxopts::value;
  cxxopts::Options options("graft convert",
                           "Writes an adapter anew. It may be PEFT's, or mlx-lm's (told by its "
                           "adapters.safetensors).");
  describe_adapter_flags(options, "to convert");
  options.add_options()("o,output", "a directory; with --to gguf a file", value<std::string>(),
                        "PATH");
  options.add_options()(
      "to", "peft (default), lora (PEFT's; DoRA becomes LoRA by SVD), mlx or gguf (llama.cpp)",
      value<std::string>(), "FORMAT");
  options.add_options()("rank", "reduce to this rank by SVD; DoRA to LoRA: default the adapter's r",
                        value<std::string>(), "N");
  options.add_options()("model", "the base; default: what the adapter names", value<std::string>(),
                        "DIR");
  options.add_options()("h,help", "print this");
  return options;
}

std::string base_name(const cxxopts::ParseResult& args, const AdapterFile& file) {
  return args.count("model") ? args["model"].as<std::string>()
                             : file.config.base_model_name_or_path;
}

// Its config, with an error that says what the model is wanted for.
ModelConfig base_config(const cxxopts::ParseResult& args, const AdapterFile& file,
                        const char* why) {
  const std::string name = base_name(args, file);
  if (name.empty()) throw UsageError(concat("convert: ", why, "; give the base with --model DIR"));
  try {
    return ModelConfig::load(resolve_model(name));
  } catch (const Error& error) {
    fail(error.what(), " (", why, "; say where the base is with --model)");
  }
}

// The adapter cut to a rank, or made LoRA, where that is asked for.
AdapterFile reduced(const std::vector<WeightedAdapter>& one, const BaseOfAdapters& base,
                    const cxxopts::ParseResult& args, bool to_lora) {
  const AdapterFile& file = one[0].file;
  const bool flatten = to_lora && has_dora(file);
  if (!args.count("rank") && !flatten) return file;
  int64_t rank = file.config.r;
  if (args.count("rank"))
    rank = whole_flag("convert", "rank", args["rank"].as<std::string>(), 1, INT32_MAX);
  CHECK(flatten || !has_dora(file), "convert: ", file.directory,
        " is a DoRA adapter, whose rank is reduced as LoRA alone; take --to lora");
  Combined combined = combine_svd(one, rank, base.weights());
  print_losses(combined.modules);
  return std::move(combined.file);
}

int run(const cxxopts::ParseResult& args, const std::vector<AdapterChoice>& choices) {
  if (!args.unmatched().empty())
    throw UsageError("convert: unexpected argument '" + args.unmatched()[0] + "'");
  if (choices.size() != 1) throw UsageError("convert: expected one --adapter DIR");
  if (choices[0].weight != 1)
    throw UsageError("convert: the adapter has a weight; graft combine takes weights");
  if (!args.count("output")) throw UsageError("convert: --output PATH is missing");
  const std::string to = args.count("to") ? args["to"].as<std::string>() : "peft";
  if (to != "peft" && to != "lora" && to != "mlx" && to != "gguf")
    throw UsageError("convert: --to is '" + to + "', expected peft, lora, mlx or gguf");
  const std::string output = args["output"].as<std::string>(), &from = choices[0].directory;
  if (output.empty()) throw UsageError("convert: --output is empty");
  if (to == "gguf")
    CHECK(!fs::exists(output), "convert: ", output, " is there already; choose another file");
  else
    check_adapter_output("convert", output);

  AdapterFile file = is_mlx_adapter(from) ? read_mlx_adapter(from) : read_adapter(from);
  CHECK(file.embeddings.empty(), from, ": holds whole embeddings, which cannot be converted");
  CHECK(file.replaced.empty() || (to == "peft" && !args.count("rank")), "convert: ", from,
        " has its own '", file.replaced.empty() ? "" : file.replaced[0].first,
        "' in the place of the base's; such an adapter can be written with --to peft alone, at the "
        "rank it has");
  if (!adapter_checks(args).allow_empty) check_not_empty(file);
  if (args.count("model") && is_mlx_adapter(from))
    file.config.base_model_name_or_path = args["model"].as<std::string>();
  const std::vector<WeightedAdapter> one = {{std::move(file), 1}};
  const BaseOfAdapters base(args.count("model") ? args["model"].as<std::string>() : "", one,
                            adapter_checks(args));
  file = reduced(one, base, args, to == "lora");
  if (to == "gguf") {
    write_gguf_adapter(file, base_config(args, file, "GGUF names the architecture and its heads"),
                       output);
  } else {
    DirectoryAside folder(output);
    if (to == "mlx")
      write_mlx_adapter(
          file, base_config(args, file, "mlx-lm counts layers from the last").num_hidden_layers,
          folder.aside());
    else
      write_adapter(file, folder.aside());
    folder.finish();
  }
  std::printf("saved %s: %zu modules\n", output.c_str(), file.modules.size());
  base.say_if_unchecked();
  return 0;
}

}  // namespace

int convert_command(int argc, char** argv) {
  const AdapterCommandLine line = read_adapter_flags(argc, argv, adapter_switches());
  cxxopts::Options options = describe();
  return run_command("convert", options, line.words,
                     [&](const cxxopts::ParseResult& args) { return run(args, line.adapters); });
}

}  // namespace graft
