// graft info: what a model is, what an adapter on it would train, and the memory that this takes.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>

#include "models/weights.h"
#include "tensor/backend.h"
#include "tensor/cpu/cpu_info.h"
#include "tensor/thread_pool.h"
#include "train/commands.h"
#include "train/memory_plan.h"
#include "train/options.h"

namespace graft {
namespace {

void print_cpu() {
  const CpuChoice& choice = cpu_choice();
  std::printf("cpu      %s\n", choice.cpu.c_str());
  std::printf("kernels  %s\n", std::string(cpu_path_name(choice.path)).c_str());
  std::printf("reason   %s\n", choice.reason.c_str());
  std::printf("threads  %d\n", thread_pool().num_threads());
}

void print_model(const ModelConfig& config) {
  std::printf(
      "%s: %lld layers, hidden %lld, intermediate %lld, %lld heads (%lld key/value) of %lld, "
      "vocabulary %lld, %s "
      "embeddings, %s\n",
      config.architecture.c_str(), (long long)config.num_hidden_layers,
      (long long)config.hidden_size, (long long)config.intermediate_size,
      (long long)config.num_attention_heads, (long long)config.num_key_value_heads,
      (long long)config.head_dim, (long long)config.vocab_size,
      config.tie_word_embeddings ? "tied" : "untied",
      std::string(dtype_name(config.dtype)).c_str());
}

// One line per kind of module: layers of one name, rank and size are one row.
void print_modules(const MemoryPlan& plan) {
  struct Row {
    std::string name;
    int64_t layers = 0, r = 0, parameters = 0;
    double scaling = 0;
  };
  std::vector<Row> rows;
  for (size_t i = 0; i < plan.targets.size(); ++i) {
    const LoraTarget& target = plan.targets[i];
    const std::string name = target.name.substr(target.name.rfind('.') + 1);
    auto row = std::find_if(rows.begin(), rows.end(), [&](const Row& r) {
      return r.name == name && r.r == target.r && r.scaling == target.scaling;
    });
    if (row == rows.end()) row = rows.insert(rows.end(), {name, 0, target.r, 0, target.scaling});
    ++row->layers;
    row->parameters += plan.module_parameters[i].second;
  }
  std::map<std::string, Row> whole;  // biases, and modules that are trained whole
  int width = 12;
  for (const auto& [name, parameters] : plan.replaced) {
    const size_t end = name.rfind('.'), begin = name.rfind('.', end - 1) + 1;
    Row& row = whole[name.ends_with(".bias") ? "biases" : name.substr(begin, end - begin)];
    ++row.layers;
    row.parameters += parameters;
  }
  for (const auto& [name, row] : whole) width = std::max(width, int(name.size()));
  std::printf("\n%-*s %7s %6s %9s %14s\n", width, "module", "layers", "r", "scaling", "parameters");
  for (const Row& row : rows)
    std::printf("%-*s %7lld %6lld %9.4g %14lld\n", width, row.name.c_str(), (long long)row.layers,
                (long long)row.r, row.scaling, (long long)row.parameters);
  for (const auto& [name, row] : whole)
    std::printf("%-*s %7lld %6s %9s %14lld\n", width, name.c_str(), (long long)row.layers, "-", "-",
                (long long)row.parameters);
}

void print_memory(const MemoryPlan& plan, const TrainOptions& options, const ModelConfig& config) {
  const auto row = [](const char* name, int64_t bytes, const char* note) {
    if (bytes) std::printf("  %-16s %10.1f MiB  %s\n", name, double(bytes) / (1 << 20), note);
  };
  std::printf("\nmemory of a step of %lld x %lld tokens%s\n",
              (long long)options.per_device_train_batch_size, (long long)options.max_seq_length,
              options.gradient_checkpointing ? ", gradient checkpointing" : "");
  row("weights, mapped", plan.mapped_weights,
      "in place in the file: page cache, shared between runs");
  const bool nf4 = is_quantised(options.method) || config.nf4;
  row("weights", plan.weights,
      nf4                               ? "linear layers in NF4"
      : has_residual_base(options.lora) ? "residuals of the adapted layers"
                                        : "");
  row(options.method == TrainOptions::Method::Full ? "master copy" : "adapters", plan.adapters,
      "F32");
  row("optimizer", plan.optimizer, "gradient, m, v");
  row("activations", plan.activations, "at the peak");
  row("scratch", plan.scratch, "");
  row("process", plan.process, "program, libraries, tokenizer");
  row("anonymous memory", plan.anonymous,
      "all but the mapped weights; blocks are cached between steps");
}

// Ranks as guides to LoRA give them, by the size of the model; the border between two classes lies
// halfway between the sizes that they name.
std::pair<int64_t, int64_t> guide_ranks(int64_t parameters) {
  if (parameters <= int64_t(5'500'000'000)) return {16, 32};
  if (parameters <= int64_t(11'000'000'000)) return {32, 64};
  return {64, 128};
}

void print_guide(const MemoryPlan& plan, const TrainOptions& options, const ModelConfig& config) {
  const int64_t base = num_parameters(config);
  const auto [least, most] = guide_ranks(base);
  std::printf(
      "\nguides give r %lld to %lld for %.1f B parameters (16-32 up to 4 B, 32-64 for 7-8 B, "
      "64-128 "
      "above 14 B)\n%6s %16s %9s %18s\n",
      (long long)least, (long long)most, double(base) * 1e-9, "r", "trainable", "of all",
      "anonymous memory");
  for (const int64_t r : {least, most}) {
    TrainOptions at = options;
    at.lora.r = r;
    const MemoryPlan planned = r == options.lora.r ? plan : plan_memory(config, at, config.dtype);
    std::printf("%6lld %16lld %8.4f%% %14.1f MiB\n", (long long)r,
                (long long)planned.trainable_parameters,
                100 * double(planned.trainable_parameters) / double(planned.all_parameters),
                double(planned.anonymous) / (1 << 20));
  }
}

}  // namespace

int info_command(int argc, char** argv) {
  std::vector<std::string> args(argv + 1, argv + argc);
  if (std::erase(args, "--cpu")) {
    if (!args.empty()) throw UsageError("graft info --cpu takes nothing else");
    print_cpu();
    return 0;
  }
  CommandLine rest;
  TrainOptions options = read_train_options(args, rest, /*config_flag=*/true);
  if (rest.help) {
    std::printf(
        "usage: graft info DIR|config.json [--config train.yaml] [--r N ...]\n"
        "       graft info --cpu\n\n"
        "Prints what an adapter on the model would train, and the memory of a training step. Takes "
        "the flags of\n"
        "graft train (--max-seq-length, --per-device-train-batch-size, --gradient-checkpointing, "
        "--dtype, ...).\n");
    return 0;
  }
  if (rest.positional.size() > 1)
    throw UsageError("info: got " + std::to_string(rest.positional.size()) +
                     " models, expected one");
  const std::string model = rest.positional.empty() ? options.model : rest.positional[0];
  if (model.empty())
    throw UsageError("info: expected a model directory or a config.json; see graft info --help");
  namespace fs = std::filesystem;
  const bool is_file = fs::is_regular_file(model);
  const std::string path = is_file ? model : resolve_model(model);
  ModelConfig config = ModelConfig::load(path);
  // The weights' own dtype counts, as in training; a config alone has none but what it says.
  if (!is_file && (fs::exists(path + "/model.safetensors") ||
                   fs::exists(path + "/model.safetensors.index.json")))
    config.dtype = dtype_of_files(path);
  const MemoryPlan plan = plan_memory(config, options, config.dtype);
  print_model(config);
  std::printf("%s\n",
              trainable_parameters_line(plan.trainable_parameters, plan.all_parameters).c_str());
  if (!plan.targets.empty()) print_modules(plan);
  print_memory(plan, options, config);
  if (!plan.targets.empty()) print_guide(plan, options, config);
  return 0;
}

}  // namespace graft
