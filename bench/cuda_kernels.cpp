// How fast is each kernel of the CUDA backend, at the shapes of four models? One line of JSON per
// kernel: time, bytes/s or FLOP/s, and the share of the roofline, which is the larger of its bytes
// over this GPU's copy rate and its FLOPs over this GPU's matrix-product rate, both measured in
// the same run. Between repeats the L2 cache is filled with something else; times are medians.
//   cuda_kernels [--models qwen2.5-0.5b,...] [--tokens 16384] [--repeats 20] [--filter TEXT]
//                [--matmul-size 8192] [--sustained SECONDS] [--device-info]
// Bytes are those that must be read and written once. Exits with 2 where there is no GPU.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>

#include "bench/matmul_rate.h"
#include "cuda/device_backend.h"
#include "models/config.h"
#include "tensor/blockwise8.h"
#include "tensor/nf4.h"

using namespace graft;
using Json = nlohmann::ordered_json;

namespace {

struct Options {
  std::vector<std::string> models = {"qwen2.5-0.5b", "qwen3-0.6b", "qwen3-4b", "llama-3.1-8b"};
  int64_t tokens = 16384, sequence = 2048, matmul_size = 8192;
  int repeats = 20;
  double sustained = 0;
  std::string filter;
  bool device_info = false;
};

void check(cudaError_t error) { CHECK(error == cudaSuccess, "cuda: ", cudaGetErrorString(error)); }

// Random numbers, for a chip that is limited by its power is faster on zeros.
Tensor on_gpu(Shape shape, DType dtype = DType::BF16) {
  Tensor t = Tensor::empty(shape, dtype, Device::CUDA);
  cuda_fill_normal(t, 3, uint32_t(shape.num_elements()), 1.0);
  return t;
}

double rounded(double value, int decimals) {
  const double scale = std::pow(10.0, decimals);
  return std::round(value * scale) / scale;
}

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options) {
    check(cudaEventCreate(&start_));
    check(cudaEventCreate(&stop_));
    // Larger than any L2.
    flush_ = Tensor::empty({int64_t(options.tokens > 2048 ? 256 : 1) << 18}, DType::F32,
                           Device::CUDA, Scope::Scratch);
  }
  Backend& backend() { return cuda_backend(); }

  // Seconds of `call`, the median over the repeats. The host runs ahead while the cache is filled,
  // so what is timed is the device and not the launching.
  double seconds(const std::function<void()>& call) {
    const cudaStream_t stream = static_cast<CudaBackend&>(cuda_backend()).stream();
    std::vector<float> times;
    for (int i = 0; i < options_.repeats + 2; ++i) {
      backend().fill(flush_, i);
      check(cudaEventRecord(start_, stream));
      call();
      check(cudaEventRecord(stop_, stream));
      check(cudaEventSynchronize(stop_));
      float ms = 0;
      check(cudaEventElapsedTime(&ms, start_, stop_));
      if (i >= 2) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e-3;
  }

  // The two rooflines of this GPU, in bytes/s (read and written) and FLOP/s.
  void measure_rooflines() {
    const int64_t elements = options_.tokens << 14;  // 1 GiB at 16384 tokens
    Tensor from = on_gpu({elements}, DType::F32), to = on_gpu({elements}, DType::F32);
    copy_rate_ = 2.0 * double(from.num_bytes()) / seconds([&] { backend().copy(to, from); });
    matmul_rate_ = gpu_matmul_rate(options_.matmul_size);
    print({{"roofline", "copy"}, {"gb_s", rounded(copy_rate_ / 1e9, 1)}});
    print({{"roofline", "matmul"},
           {"size", options_.matmul_size},
           {"tflop_s", rounded(matmul_rate_ / 1e12, 1)}});
  }

  void model(const std::string& name) { model_ = name; }

  void measure(const std::string& kernel, const std::string& shape, double bytes, double flops,
               const std::function<void()>& call) {
    if (kernel.find(options_.filter) == std::string::npos) return;
    const double time = seconds(call);
    const double roof = std::max(bytes / copy_rate_, flops / matmul_rate_);
    Json json = {{"kernel", kernel}, {"model", model_}, {"shape", shape}};
    json["us"] = rounded(time * 1e6, 2);
    if (bytes > 0) json["gb_s"] = rounded(bytes / time / 1e9, 1);
    if (flops > 0) json["tflop_s"] = rounded(flops / time / 1e12, 2);
    json["roofline_us"] = rounded(roof * 1e6, 2);
    json["share"] = rounded(roof / time, 4);
    print(json);
  }

  void print(const Json& json) {
    std::printf("%s\n", json.dump().c_str());
    std::fflush(stdout);
  }

 private:
  const Options& options_;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  Tensor flush_;
  double copy_rate_ = 0, matmul_rate_ = 0;
  std::string model_;
};

std::string text(const char* pattern, std::initializer_list<int64_t> numbers) {
  std::string result;
  auto number = numbers.begin();
  for (const char* p = pattern; *p; ++p)
    result += *p == '%' ? std::to_string(*number++) : std::string(1, *p);
  return result;
}

struct Sizes {
  int64_t T, H, I, q, k, D, heads, kv_heads, V;
  explicit Sizes(const ModelConfig& config, int64_t tokens)
      : T(tokens),
        H(config.hidden_size),
        I(config.intermediate_size),
        q(config.num_attention_heads * config.head_dim),
        k(config.num_key_value_heads * config.head_dim),
        D(config.head_dim),
        heads(config.num_attention_heads),
        kv_heads(config.num_key_value_heads),
        V(config.vocab_size) {}
};

void bench_rows(Bench& bench, const Sizes& s) {
  Backend& backend = bench.backend();
  const double TH = double(s.T * s.H);
  const std::string shape = text("T %, H %", {s.T, s.H});
  Tensor x = on_gpu({s.T, s.H}), y = on_gpu({s.T, s.H}), dx = on_gpu({s.T, s.H});
  const Tensor weight = on_gpu({s.H});
  Tensor rstd = Tensor::empty({s.T}, DType::F32, Device::CUDA), none;
  bench.measure("add", shape, 6 * TH, 0, [&] { backend.add(y, x, dx); });
  bench.measure("axpy", shape, 6 * TH, 0, [&] { backend.axpy(y, x, 0.5); });
  bench.measure("rms_norm_forward", shape, 4 * TH, 0,
                [&] { backend.rms_norm_forward(y, rstd, x, weight, 1e-6); });
  bench.measure("rms_norm_backward", shape, 6 * TH, 0,
                [&] { backend.rms_norm_backward(dx, none, y, x, weight, rstd); });
  bench.measure("dropout", shape, 4 * TH, 0, [&] {
    backend.dropout(y, x, 0.05, DropoutKey{1, 2, 3, 0}, false);
  });

  const Tensor gate = on_gpu({s.T, s.I}), up = on_gpu({s.T, s.I});
  Tensor h = on_gpu({s.T, s.I});
  const double TI = double(s.T * s.I);
  const std::string inner = text("T %, I %", {s.T, s.I});
  bench.measure("swiglu_forward", inner, 6 * TI, 0, [&] { backend.swiglu_forward(h, gate, up); });
  Tensor dgate = on_gpu({s.T, s.I}), dup = on_gpu({s.T, s.I});
  bench.measure("swiglu_backward", inner, 10 * TI, 0,
                [&] { backend.swiglu_backward(dgate, dup, h, gate, up); });

  // DoRA: beside every projection but gate and up, and in the place of SwiGLU.
  const DoraScale of_x{on_gpu({s.H}, DType::F32), on_gpu({s.H}, DType::F32)};
  const DoraScale of_inner{on_gpu({s.I}, DType::F32), on_gpu({s.I}, DType::F32)};
  Tensor dm = on_gpu({s.H}, DType::F32), dm_gate = on_gpu({s.I}, DType::F32),
         dm_up = on_gpu({s.I}, DType::F32);
  bench.measure("dora_scale", shape, 4 * TH, 0, [&] { backend.dora_scale(y, y, of_x, {}, false); });
  bench.measure("dora_scale_backward", shape, 6 * TH, 0,
                [&] { backend.dora_scale_backward(dx, dm, dx, y, of_x, true); });
  bench.measure("dora_swiglu_forward", inner, 6 * TI, 0,
                [&] { backend.dora_swiglu_forward(h, gate, up, of_inner, of_inner); });
  bench.measure("dora_swiglu_backward", inner, 10 * TI, 0, [&] {
    backend.dora_swiglu_backward(dgate, dup, dm_gate, dm_up, h, gate, up, of_inner, of_inner);
  });
}

// `count` row numbers below `rows`, in any order, some of them twice.
Tensor indices(int64_t count, int64_t rows) {
  Random random(5);
  std::vector<int32_t> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(int32_t(random.below(uint64_t(rows))));
  return Tensor::from_ints({count}, values).to(Device::CUDA);
}

void bench_vocabulary(Bench& bench, const Sizes& s, int64_t chunk) {
  Backend& backend = bench.backend();
  const Tensor ids = indices(s.T, s.V), labels = indices(chunk, s.V);
  const Tensor table = on_gpu({s.V, s.H});
  Tensor x = on_gpu({s.T, s.H}), h = on_gpu({chunk, s.H}), logits = on_gpu({chunk, s.V});
  Tensor losses = Tensor::empty({chunk}, DType::F32, Device::CUDA);
  bench.measure("embedding_forward", text("T %, H %", {s.T, s.H}), 4 * double(s.T * s.H), 0,
                [&] { backend.embedding_forward(x, ids, table); });
  bench.measure("cross_entropy", text("rows %, V %", {chunk, s.V}), 4 * double(chunk * s.V), 0,
                [&] { backend.cross_entropy(losses, logits, labels, 1e-4, true); });
  const Tensor rows = indices(chunk, s.T);
  const std::string shape = text("rows %, H %", {chunk, s.H});
  bench.measure("gather_rows", shape, 4 * double(chunk * s.H), 0,
                [&] { backend.gather_rows(h, x, rows); });
  bench.measure("scatter_add_rows", shape, 6 * double(chunk * s.H), 0,
                [&] { backend.scatter_add_rows(x, h, rows); });
  // The head: logits, and their gradient back to the hidden states.
  const double flops = 2 * double(chunk * s.V) * double(s.H);
  const double bytes = 2 * (double(chunk * s.V) + double(s.V * s.H) + double(chunk * s.H));
  const GemmTerm forward{.a = h, .b = table, .transpose_b = true};
  const GemmTerm backward{.a = logits, .b = table};
  const std::string head = text("% x % x %", {chunk, s.V, s.H});
  bench.measure("gemm head forward", head, bytes, flops, [&] {
    backend.gemm(logits, {&forward, 1});
  });
  bench.measure("gemm head dX", head, bytes, flops, [&] { backend.gemm(h, {&backward, 1}); });
}

// Documents of `sequence` tokens. Forward: 2 products, backward: 5, half of the square each.
void bench_attention(Bench& bench, const Sizes& s, int64_t sequence, bool qk_norm) {
  Backend& backend = bench.backend();
  Tensor q = on_gpu({s.T, s.heads, s.D}), k = on_gpu({s.T, s.kv_heads, s.D});
  Tensor v = on_gpu({s.T, s.kv_heads, s.D}), out = on_gpu({s.T, s.heads, s.D});
  Tensor dq = on_gpu(q.shape()), dk = on_gpu(k.shape()), dv = on_gpu(v.shape());
  const Tensor dout = on_gpu(q.shape());
  Tensor lse = Tensor::empty({s.heads, s.T}, DType::F32, Device::CUDA);
  std::vector<int32_t> ends = {0}, numbers;
  for (int64_t t = 0; t < s.T; ++t) numbers.push_back(int32_t(t % sequence));
  for (int64_t end = sequence; end <= s.T; end += sequence) ends.push_back(int32_t(end));
  const Tensor cu = Tensor::from_ints({int64_t(ends.size())}, ends);
  const Tensor positions = Tensor::from_ints({s.T}, numbers).to(Device::CUDA);
  const Tensor table = on_gpu({sequence, s.D}, DType::F32);
  const double scale = 1 / std::sqrt(double(s.D));
  const double square = double(sequence) * double(s.q) * double(s.T);
  const double qs = double(s.T * s.q), ks = double(s.T * s.k);
  const std::string shape =
      text("T %, S %, heads %/%, D %", {s.T, sequence, s.heads, s.kv_heads, s.D});
  bench.measure("rope q", shape, 4 * qs, 0, [&] { backend.rope(q, q, positions, table, +1); });
  if (qk_norm) {
    Tensor rstd = Tensor::empty({s.T, s.heads}, DType::F32, Device::CUDA), none;
    const Tensor weight = on_gpu({s.D});
    bench.measure("qk_norm_rope_forward q", shape, 4 * qs, 0, [&] {
      backend.qk_norm_rope_forward(out, rstd, q, weight, 1e-6, positions, table);
    });
    bench.measure("qk_norm_rope_backward q", shape, 6 * qs, 0, [&] {
      backend.qk_norm_rope_backward(dq, none, dout, q, weight, rstd, positions, table);
    });
  }
  bench.measure("attention_forward", shape, 2 * (2 * qs + 2 * ks), 2 * square,
                [&] { backend.attention_forward(out, lse, q, k, v, cu, cu, scale); });
  bench.measure("attention_backward", shape, 2 * (4 * qs + 4 * ks), 5 * square, [&] {
    backend.attention_backward(dq, dk, dv, dout, q, k, v, out, lse, cu, scale);
  });
}

// One product of a frozen weight (out, in) with T rows, forward and dX; the same with `border` more
// columns of reduction (LoRA's rank, as if it were part of the weight); and as the engine has it,
// the low-rank product added to the first.
void bench_linear(Bench& bench, const std::string& name, int64_t T, int64_t out, int64_t in,
                  int64_t border) {
  Backend& backend = bench.backend();
  const int64_t stride = (in + border + 63) / 64 * 64;
  const Tensor wide_x = on_gpu({T, stride}), wide_w = on_gpu({out, stride});
  const Tensor x = on_gpu({T, in}), w = on_gpu({out, in});
  const Tensor u = on_gpu({T, border}), b = on_gpu({out, border}, DType::F32);
  Tensor y = on_gpu({T, out}), dx = on_gpu({T, in});
  const double bytes = 2 * (double(T * in) + double(out * in) + double(T * out));
  const double flops = 2 * double(T * in) * double(out);
  const double border_flops = 2 * double(T * border) * double(out);
  const std::string shape = text("% x % x %", {T, out, in});
  const GemmTerm forward{.a = x, .b = w, .transpose_b = true}, backward{.a = y, .b = w};
  const GemmTerm bordered{.a = wide_x.slice_cols(0, in + border),
                          .b = wide_w.slice_cols(0, in + border),
                          .transpose_b = true};
  const GemmTerm with_adapter[] = {forward, {.a = u, .b = b, .transpose_b = true, .alpha = 2}};
  bench.measure("gemm " + name + " forward", shape, bytes, flops, [&] {
    backend.gemm(y, {&forward, 1});
  });
  bench.measure("gemm " + name + " dX", shape, bytes, flops, [&] {
    backend.gemm(dx, {&backward, 1});
  });
  bench.measure("gemm " + name + " bordered", text("% x % x %", {T, out, in + border}), bytes,
                flops + border_flops, [&] {
                  backend.gemm(y, {&bordered, 1});
                });
  bench.measure("gemm " + name + " with adapter", shape, bytes, flops + border_flops,
                [&] { backend.gemm(y, with_adapter); });
}

// The four products of a LoRA pair that read one tall matrix: S = x A^T, dS = dy B, dA = dS^T x,
// dB = dy^T S.
void bench_skinny(Bench& bench, const std::string& name, int64_t T, int64_t out, int64_t in,
                  int64_t rank) {
  Backend& backend = bench.backend();
  const Tensor x = on_gpu({T, in}), dy = on_gpu({T, out});
  const Tensor a = on_gpu({rank, in}, DType::F32), b = on_gpu({out, rank}, DType::F32);
  Tensor s = on_gpu({T, rank}), ds = on_gpu({T, rank});
  Tensor da = on_gpu({rank, in}, DType::F32), db = on_gpu({out, rank}, DType::F32);
  const GemmTerm to_s{.a = x, .b = a, .transpose_b = true}, to_ds{.a = dy, .b = b};
  const GemmTerm to_da{.a = ds, .b = x, .transpose_a = true};
  const GemmTerm to_db{.a = dy, .b = s, .transpose_a = true};
  const auto measure = [&](const char* what, Tensor& c, const GemmTerm& term, int64_t width) {
    const double flops = 2 * double(T * rank) * double(width);
    bench.measure("lora " + name + " " + what, text("T %, r %, width %", {T, rank, width}),
                  2 * double(T * width), flops, [&] {
                    backend.gemm(c, {&term, 1});
                  });
  };
  measure("S", s, to_s, in);
  measure("dS", ds, to_ds, out);
  measure("dA", da, to_da, in);
  measure("dB", db, to_db, out);
}

void bench_adamw(Bench& bench, const ModelConfig& config, const Sizes& s) {
  const int64_t layer = (s.H + s.q) * 2 + 2 * (s.H + s.k) + 3 * (s.H + s.I);
  const int64_t count = 16 * layer * config.num_hidden_layers;
  Tensor w = on_gpu({count}, DType::F32), m = on_gpu({count}, DType::F32);
  Tensor v = Tensor::zeros({count}, DType::F32, Device::CUDA);
  const Tensor g = on_gpu({count}, DType::F32);
  const Tensor factor = Tensor::from_floats({}, {1}, DType::F64).to(Device::CUDA);
  Tensor squares = factor.clone();
  Backend& backend = bench.backend();
  bench.measure("adamw", text("% parameters", {count}), 28 * double(count), 0, [&] {
    backend.adamw(w, m, v, g, factor, {1e-4, 0.9, 0.999, 1e-8, 0.01, 1});
  });
  bench.measure("sum_of_squares", text("% parameters", {count}), 4 * double(count), 0,
                [&] { backend.sum_of_squares(squares, g); });
  const auto state = [&] {
    return State8{Tensor::zeros({count}, DType::U8, Device::CUDA),
                  Tensor::zeros({num_blocks8(count)}, DType::F32, Device::CUDA)};
  };
  State8 m8 = state(), v8 = state();
  // Parameter and two codes read and written, the gradient read; an absmax for 256 of each code.
  bench.measure("adamw_8bit", text("% parameters", {count}), (16 + 16.0 / 256) * double(count), 0,
                [&] {
                  backend.adamw_8bit(w, m8, v8, g, factor, {1e-4, 0.9, 0.999, 1e-8, 0.01, 1});
                });
}

// A weight of the MLP, into the scratch that the product reads.
void bench_nf4(Bench& bench, const Sizes& s) {
  const Tensor weight =
      nf4_quantise(on_gpu({s.I, s.H}).to(Device::CPU), /*double_quant=*/true).to(Device::CUDA);
  Tensor wide = Tensor::empty({s.I, s.H}, DType::BF16, Device::CUDA);
  const double bytes = double(weight.num_bytes()) + double(wide.num_bytes());
  bench.measure("widen_nf4", text("% x %", {s.I, s.H}), bytes, 0,
                [&] { bench.backend().copy(wide, weight); });
}

void bench_model(Bench& bench, const Options& options, const std::string& name) {
  const ModelConfig config = ModelConfig::load("bench/models/" + name + ".json");
  const Sizes s(config, options.tokens);
  bench.model(name);
  bench_rows(bench, s);
  bench_vocabulary(bench, s, std::min<int64_t>(2048, options.tokens));
  bench_attention(bench, s, options.sequence, config.qk_norm);
  bench_adamw(bench, config, s);
  bench_nf4(bench, s);
  // Products of one input, together: what merged weights would multiply. r 16 for each adapter.
  for (int64_t T = std::max<int64_t>(options.tokens / 8, 1); T <= options.tokens; T *= 2) {
    if (T == options.tokens / 4 && T > 2048) continue;  // 2k, 8k, 16k
    bench_linear(bench, "qkv", T, s.q + 2 * s.k, s.H, 48);
    bench_linear(bench, "o", T, s.H, s.q, 16);
    bench_linear(bench, "gate_up", T, 2 * s.I, s.H, 32);
    bench_linear(bench, "down", T, s.H, s.I, 16);
    allocator_of(Device::CUDA).release_cached();
  }
  bench_skinny(bench, "gate", options.tokens, s.I, s.H, 16);
  bench_skinny(bench, "down", options.tokens, s.H, s.I, 16);
  allocator_of(Device::CUDA).release_cached();
}

// What the chip keeps up: the rate of each second under load.
void bench_sustained(Bench& bench, const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<double> rates;
  double seconds = 0;
  while (seconds < options.sustained) {
    rates.push_back(gpu_matmul_rate(options.matmul_size) / 1e12);
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  if (rates.empty()) return;
  bench.print({{"roofline", "matmul after load"},
               {"seconds", rounded(seconds, 1)},
               {"first_tflop_s", rounded(rates.front(), 1)},
               {"tflop_s", rounded(rates.back(), 1)}});
}

// The driver's own version, which the runtime doesn't know: "580.65.06", or nothing.
std::string driver_version() {
  std::ifstream file("/proc/driver/nvidia/version");
  for (std::string word; file >> word;)
    if (word.find('.') != std::string::npos && std::isdigit(word[0])) return word;
  return "";
}

Json device_info() {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0));
  return {{"gpu", device.name},
          {"memory_gib", rounded(double(device.totalGlobalMem) / (1 << 30), 1)},
          {"multiprocessors", device.multiProcessorCount},
          {"compute_capability", std::to_string(device.major) + "." + std::to_string(device.minor)},
          {"driver", driver_version()},
          {"cublas", cuda_has_cublas(nullptr)}};
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string key = argv[i];
    if (key == "--device-info") {
      options.device_info = true;
      continue;
    }
    CHECK(i + 1 < argc, key, ": expected a value");
    const std::string value = argv[++i];
    if (key == "--models") {
      options.models.clear();
      std::istringstream list(value);
      for (std::string name; std::getline(list, name, ',');) options.models.push_back(name);
    } else if (key == "--tokens") {
      options.tokens = std::stoll(value);
      options.sequence = std::min(options.sequence, options.tokens);
    } else if (key == "--repeats") {
      options.repeats = std::stoi(value);
    } else if (key == "--filter") {
      options.filter = value;
    } else if (key == "--matmul-size") {
      options.matmul_size = std::stoll(value);
    } else if (key == "--sustained") {
      options.sustained = std::stod(value);
    } else {
      fail(key, ": unknown");
    }
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    std::string reason;
    if (!cuda_available(&reason)) {
      std::fprintf(stderr, "%s\n", reason.c_str());
      return 2;
    }
    if (options.device_info) {
      std::printf("%s\n", device_info().dump().c_str());
      return 0;
    }
    Bench bench(options);
    bench.measure_rooflines();
    for (const std::string& name : options.models) bench_model(bench, options, name);
    bench_sustained(bench, options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_kernels: %s\n", error.what());
    return 1;
  }
}
