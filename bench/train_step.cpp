// One LoRA training step at a given shape, as bench_peers.sh compares it with PEFT's: loads a model
// directory, takes random tokens, trains, and prints one line of JSON.
//   train_step --make CONFIG.json DIR DTYPE     writes a model with random weights
//   train_step DIR --dtype bfloat16 --seq 512 --batch 1 --rank 16 --steps 4 --threads 2
//   [--checkpoint]
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "autograd/tape.h"
#include "models/weights.h"
#include "nn/lora.h"
#include "nn/parameter_buffer.h"
#include "tensor/random.h"
#include "tensor/thread_pool.h"

using namespace graft;

namespace {

// Seconds since the kernel started this process: the field and the clock that peft_step.py reads
// too.
double since_process_start() {
  std::ifstream stat("/proc/self/stat"), uptime("/proc/uptime");
  std::string text((std::istreambuf_iterator<char>(stat)), {});
  std::istringstream fields(text.substr(text.rfind(')') + 1));
  std::string field;
  for (int i = 0; i < 20; ++i) fields >> field;
  double up = 0;
  uptime >> up;
  return up - std::stod(field) / double(sysconf(_SC_CLK_TCK));
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// "RssAnon:", "VmHWM:" of /proc/self/status, in GiB.
double status_gib(const char* key) {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line))
    if (line.starts_with(key)) return std::stod(line.substr(std::strlen(key))) / (1 << 20);
  return 0;
}

DType dtype_of(const std::string& name) {
  CHECK(name == "float32" || name == "bfloat16", "dtype: got ", name,
        ", expected float32 or bfloat16");
  return name == "float32" ? DType::F32 : DType::BF16;
}

struct Arguments {
  std::string model, dtype = "bfloat16";
  int64_t seq = 512, batch = 1, rank = 16, steps = 4, threads = 0;
  bool checkpoint = false;
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  arguments.model = argv[1];
  for (int i = 2; i < argc; ++i) {
    const std::string key = argv[i];
    if (key == "--checkpoint") {
      arguments.checkpoint = true;
      continue;
    }
    CHECK(i + 1 < argc, key, ": expected a value");
    const std::string value = argv[++i];
    if (key == "--dtype")
      arguments.dtype = value;
    else if (key == "--seq")
      arguments.seq = std::stoll(value);
    else if (key == "--batch")
      arguments.batch = std::stoll(value);
    else if (key == "--rank")
      arguments.rank = std::stoll(value);
    else if (key == "--steps")
      arguments.steps = std::stoll(value);
    else if (key == "--threads")
      arguments.threads = std::stoll(value);
    else
      fail(key, ": unknown");
  }
  return arguments;
}

void make_model(const std::string& config_path, const std::string& directory,
                const std::string& dtype) {
  std::filesystem::create_directories(directory);
  const ModelConfig config = ModelConfig::load(config_path);
  save_weights(*random_model(config, dtype_of(dtype), 0), directory, dtype_of(dtype));
  std::filesystem::copy_file(config_path, directory + "/config.json",
                             std::filesystem::copy_options::overwrite_existing);
}

void run(const Arguments& arguments) {
  if (arguments.threads) set_num_threads(int(arguments.threads));
  auto model = load_model(arguments.model, dtype_of(arguments.dtype));
  LoraConfig lora;
  lora.r = arguments.rank;
  lora.lora_dropout = 0;
  attach_lora(*model, lora, 0);
  std::vector<std::pair<std::string, Variable>> leaves;
  for (const auto& [name, linear] : linear_layers(*model)) {
    if (!linear->lora) continue;
    leaves.emplace_back(name + ".lora_A", linear->lora->a);
    leaves.emplace_back(name + ".lora_B", linear->lora->b);
  }
  ParameterBuffer parameters(leaves, Device::CPU, Scope::Adapters);

  Random random(1);
  std::vector<std::vector<int32_t>> rows(size_t(arguments.batch));
  for (auto& row : rows)
    for (int64_t t = 0; t < arguments.seq; ++t)
      row.push_back(int32_t(random.below(uint64_t(model->config().vocab_size))));
  const PackedBatch batch = pack(rows, rows);
  const double labels = double(arguments.batch * (arguments.seq - 1));

  std::vector<double> times;
  double first = 0, loss = 0, activations_anon = 0;
  for (int64_t step = 1; step <= arguments.steps + 1; ++step) {
    const double start = now();
    parameters.zero_grad();
    ForwardContext context;
    context.training = true;
    context.dropout.step = uint32_t(step);
    const Variable value = model->loss(batch, context, 1.0 / labels, arguments.checkpoint);
    backward(value);
    parameters.step({1e-4, 0.9, 0.999, 1e-8, 0.01, step}, parameters.grad_norm(), 1.0);
    loss = value.value().item();
    times.push_back(now() - start);
    if (step == 1) first = since_process_start();
  }
  activations_anon = status_gib("RssAnon:");
  const double first_step = times[0];
  std::sort(times.begin() + 1, times.end());
  const double median = times[1 + (times.size() - 2) / 2];
  std::printf(
      "{\"who\": \"graft\", \"dtype\": \"%s\", \"seq\": %lld, \"batch\": %lld, \"threads\": %d, "
      "\"loss\": %.4f, \"step_s\": "
      "%.3f, \"tok_s\": %.1f, \"first_step_s\": %.3f, \"start_to_first_step_s\": %.2f, "
      "\"peak_rss_gib\": %.2f, "
      "\"anonymous_gib\": %.3f, \"checkpoint\": %s}\n",
      arguments.dtype.c_str(), (long long)arguments.seq, (long long)arguments.batch,
      thread_pool().num_threads(), loss, median, double(arguments.seq * arguments.batch) / median,
      first_step, first, status_gib("VmHWM:"), activations_anon,
      arguments.checkpoint ? "true" : "false");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 5 && !std::strcmp(argv[1], "--make"))
      make_model(argv[2], argv[3], argv[4]);
    else if (argc >= 2)
      run(parse(argc, argv));
    else
      fail("usage: train_step --make CONFIG.json DIR DTYPE | train_step DIR [--dtype ...]");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_step: %s\n", error.what());
    return 1;
  }
}
