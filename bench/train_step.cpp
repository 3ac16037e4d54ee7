// One training step of LoRA, QLoRA, DoRA or of all weights at a given shape, on the CPU or a GPU,
// as bench_peers.sh and gpu.sh compare it with PEFT's: takes random tokens, trains, and prints one
// line of JSON.
//   train_step --make CONFIG.json DIR DTYPE     writes a model with random weights
//   train_step MODEL [--device cpu|cuda] [--dtype bfloat16] [--seq 512] [--batch 1] [--rank 16]
//              [--steps 4] [--threads 2] [--checkpoint] [--matmul-size 8192]
//              [--method lora|qlora|dora|full] [--optim adamw_torch|adamw_8bit]
// MODEL is a directory, or a config.json: then weights are random, made on the device.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "autograd/tape.h"
#include "bench/gpu_model.h"
#include "bench/matmul_rate.h"
#include "bench/step_flops.h"
#include "models/weights.h"
#include "nn/lora.h"
#include "nn/parameter_buffer.h"
#include "tensor/random.h"
#include "tensor/thread_pool.h"
#include "train/run_setup.h"

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
  std::string model, dtype = "bfloat16", device = "cpu", method = "lora", optim = "adamw_torch";
  int64_t seq = 512, batch = 1, rank = 16, steps = 4, threads = 0, matmul_size = 8192;
  bool checkpoint = false;
  bool on_gpu() const { return device == "cuda"; }
  bool quantised() const { return method == "qlora"; }
  bool full() const { return method == "full"; }
  bool random_weights() const { return model.ends_with(".json"); }
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
    else if (key == "--device")
      arguments.device = value;
    else if (key == "--method")
      arguments.method = value;
    else if (key == "--optim")
      arguments.optim = value;
    else if (key == "--matmul-size")
      arguments.matmul_size = std::stoll(value);
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
  CHECK(arguments.device == "cpu" || arguments.on_gpu(), "--device: got ", arguments.device,
        ", expected cpu or cuda");
  CHECK(arguments.method == "lora" || arguments.method == "dora" || arguments.quantised() ||
            arguments.full(),
        "--method: got ", arguments.method, ", expected lora, qlora, dora or full");
  CHECK(arguments.optim == "adamw_torch" || arguments.optim == "adamw_8bit", "--optim: got ",
        arguments.optim, ", expected adamw_torch or adamw_8bit");
  CHECK(arguments.steps > 0, "--steps: got ", arguments.steps, ", wanted 1 or more");
  return arguments;
}

void write_model(const std::string& config_path, const std::string& directory,
                 const std::string& dtype) {
  std::filesystem::create_directories(directory);
  const ModelConfig config = ModelConfig::load(config_path);
  save_weights(*random_model(config, dtype_of(dtype), 0), directory, dtype_of(dtype));
  std::filesystem::copy_file(config_path, directory + "/config.json",
                             std::filesystem::copy_options::overwrite_existing);
}

std::unique_ptr<Decoder> make_model(const Arguments& arguments) {
  const DType dtype = dtype_of(arguments.dtype);
  if (!arguments.random_weights())
    return load_model(arguments.model, dtype, arguments.on_gpu() ? Device::CUDA : Device::CPU,
                      {.load_in_4bit = arguments.quantised(), .double_quant = true});
  const ModelConfig config = ModelConfig::load(arguments.model);
  auto model =
      arguments.on_gpu() ? random_gpu_model(config, dtype, 0) : random_model(config, dtype, 0);
  if (!arguments.quantised()) return model;
  quantise_model(*model, true);
  if (arguments.on_gpu()) {  // or its peaks would be those of the dense model
    allocator_of(Device::CUDA).release_cached();
    allocator_of(Device::CUDA).reset_peak();
  }
  return model;
}

PackedBatch random_batch(const Arguments& arguments, int64_t vocabulary) {
  Random random(1);
  std::vector<std::vector<int32_t>> rows(size_t(arguments.batch));
  for (auto& row : rows)
    for (int64_t t = 0; t < arguments.seq; ++t)
      row.push_back(int32_t(random.below(uint64_t(vocabulary))));
  return pack(rows, rows);
}

struct Measured {
  std::vector<double> times;  // of each step; the first is not part of the median
  double loss = 0, start_to_first_step = 0;
  double median() const {
    std::vector<double> sorted(times.begin() + 1, times.end());
    std::sort(sorted.begin(), sorted.end());
    return sorted[(sorted.size() - 1) / 2];
  }
};

// One step and `steps` more.
Measured train(Decoder& model, const Arguments& arguments) {
  const bool dora = arguments.method == "dora";
  if (arguments.full()) {
    widen_weights(model);
  } else {
    LoraConfig lora;
    lora.r = arguments.rank;
    lora.lora_dropout = 0;
    lora.use_dora = dora;
    attach_lora(model, lora, 0);
  }
  ParameterBuffer parameters(trained_leaves(model, arguments.full() ? TrainOptions::Method::Full
                                                                    : TrainOptions::Method::Lora),
                             arguments.on_gpu() ? Device::CUDA : Device::CPU,
                             arguments.full() ? Scope::Weights : Scope::Adapters,
                             arguments.optim == "adamw_8bit" ? ParameterBuffer::Moments::Bits8
                                                             : ParameterBuffer::Moments::F32);
  if (dora) parameters.on_publish([&] { model.refresh_adapters(); });
  const PackedBatch batch = random_batch(arguments, model.config().vocab_size);
  const double labels = double(arguments.batch * (arguments.seq - 1));

  Measured measured;
  for (int64_t step = 1; step <= arguments.steps + 1; ++step) {
    const double start = now();
    parameters.begin_step();
    ForwardContext context;
    context.training = true;
    context.dropout.step = uint32_t(step);
    const Variable value = model.loss(batch, context, 1.0 / labels, arguments.checkpoint);
    backward(value);
    parameters.add_loss(value.value());
    parameters.step({1e-4, 0.9, 0.999, 1e-8, 0.01, step}, 1.0);
    measured.loss = parameters.outcome().loss;  // waits for the whole step on a GPU
    measured.times.push_back(now() - start);
    if (step == 1) measured.start_to_first_step = since_process_start();
  }
  return measured;
}

double rounded(double value, int decimals) {
  const double scale = std::pow(10.0, decimals);
  return std::round(value * scale) / scale;
}

// What the GPU's allocator saw: the most of each scope, of all at once, and what it holds.
nlohmann::ordered_json gpu_memory() {
  const MemoryStats stats = allocator_of(Device::CUDA).stats();
  const auto gib = [](int64_t bytes) { return rounded(double(bytes) / (1 << 30), 3); };
  nlohmann::ordered_json json;
  for (int i = 0; i < kNumScopes; ++i)
    json[std::string(scope_name(Scope(i)))] = gib(stats.peak[size_t(i)]);
  json["at_once"] = gib(stats.peak_total);
  json["reserved"] = gib(stats.reserved_peak);
  return json;
}

nlohmann::ordered_json description(const Arguments& arguments) {
  return {{"who", "graft"},
          {"model", std::filesystem::path(arguments.model).stem().string()},
          {"method", arguments.method},
          {"optim", arguments.optim},
          {"device", arguments.device},
          {"dtype", arguments.dtype},
          {"seq", arguments.seq},
          {"batch", arguments.batch},
          {"checkpoint", arguments.checkpoint}};
}

// The ceiling is measured right after the steps, on the chip as warm as they left it.
nlohmann::ordered_json run(const Arguments& arguments) {
  if (arguments.threads) set_num_threads(int(arguments.threads));
  auto json = description(arguments);
  auto model = make_model(arguments);
  const Measured measured = train(*model, arguments);
  const double step = measured.median();
  const double tokens = double(arguments.seq * arguments.batch);
  json["threads"] = thread_pool().num_threads();
  json["loss"] = rounded(measured.loss, 4);
  json["step_s"] = rounded(step, 5);
  json["tok_s"] = rounded(tokens / step, 1);
  json["first_step_s"] = rounded(measured.times[0], 3);
  json["start_to_first_step_s"] = rounded(measured.start_to_first_step, 2);
  json["peak_rss_gib"] = rounded(status_gib("VmHWM:"), 2);
  json["anonymous_gib"] = rounded(status_gib("RssAnon:"), 3);
  if (!arguments.on_gpu()) return json;

  json["peak_gpu_gib"] = gpu_memory();
  const double labelled = double(arguments.seq - 1) / double(arguments.seq);
  const double flops =
      step_flops_per_token(model->config(), double(arguments.seq), double(arguments.rank), labelled)
          .total();
  model.reset();  // the ceiling wants 400 MB
  const double rate = gpu_matmul_rate(arguments.matmul_size);
  json["gflop_per_token"] = rounded(flops / 1e9, 3);
  json["matmul_tflops"] = rounded(rate / 1e12, 1);
  json["utilisation"] = rounded(flops * tokens / step / rate, 4);
  return json;
}

// A case that fails (most often for memory) is a line too, with the first line of the error.
int report(const Arguments& arguments) {
  auto json = description(arguments);
  try {
    json = run(arguments);
  } catch (const Error& error) {
    const std::string text = error.what();
    json["error"] = text.substr(0, text.find('\n'));
  }
  std::printf("%s\n", json.dump().c_str());
  return json.contains("error");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 5 && !std::strcmp(argv[1], "--make"))
      write_model(argv[2], argv[3], argv[4]);
    else if (argc >= 2)
      return report(parse(argc, argv));
    else
      fail("usage: train_step --make CONFIG.json DIR DTYPE | train_step MODEL [--device ...]");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_step: %s\n", error.what());
    return 1;
  }
}
