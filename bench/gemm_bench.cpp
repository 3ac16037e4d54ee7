// How fast is the matrix product, against the FMA peak of this CPU and against OpenBLAS, all
// measured in turns in one run? Prints medians. OpenBLAS runs in a child process, because the
// variable that picks its kernels (OPENBLAS_CORETYPE) counts only before the library is loaded;
// every core type is tried once and the fastest takes part.
//   gemm_bench [--threads N] [--repeats N] [--cpu-time] [--rows M] [--filter TEXT]
// --cpu-time measures the processor time of the process, for a machine that others use meanwhile.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tensor/cpu/cpu_info.h"
#include "tensor/cpu/gemm.h"
#include "tensor/tensor.h"
#include "tensor/thread_pool.h"

namespace graft {
namespace {

struct Options {
  int threads = 0;
  int repeats = 15;
  bool cpu_time = false;
  int64_t rows = 512;
  std::string filter;
};

double seconds(const Options& options) {
  timespec t;
  clock_gettime(options.cpu_time ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// With --cpu-time, the seconds that the work would take on that many undisturbed cores.
double time_of(const Options& options, const std::function<void()>& work) {
  const double start = seconds(options);
  work();
  return (seconds(options) - start) / (options.cpu_time ? options.threads : 1);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? NAN : values[values.size() / 2];
}

// --- the peaks: independent multiply-adds on registers, nothing else ---

// Zeros: what a product left there may be subnormal, which is slow.
void clear_zmm() {
  __asm__ volatile(
      ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,"
      "31\nvpxord %%zmm\\r, %%zmm\\r, %%zmm\\r\n.endr\n" ::
          : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
            "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

double fma_flops(CpuPath path, int64_t rounds) {
  int64_t n = rounds;
  if (path >= CpuPath::Avx512) {
    clear_zmm();
    __asm__ volatile(
        "1:\n.irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n"
        "vfmadd231ps %%zmm31, %%zmm30, %%zmm\\r\n.endr\ndec %0\njnz 1b\nvzeroupper\n"
        : "+r"(n)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc");
    return double(rounds) * 24 * 16 * 2;
  }
  if (path == CpuPath::Avx2) {
    __asm__ volatile(
        "1:\n.irp r,0,1,2,3,4,5,6,7,8,9,10,11\n"
        "vfmadd231ps %%ymm15, %%ymm14, %%ymm\\r\n.endr\ndec %0\njnz 1b\nvzeroupper\n"
        : "+r"(n)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc");
    return double(rounds) * 12 * 8 * 2;
  }
  __asm__ volatile(
      "1:\n.irp r,0,1,2,3,4,5\nmulps %%xmm15, %%xmm\\r\n.endr\n"
      ".irp r,6,7,8,9,10,11\naddps %%xmm15, %%xmm\\r\n.endr\ndec %0\njnz 1b\n"
      : "+r"(n)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11", "xmm15", "cc");
  return double(rounds) * 12 * 4;
}

// vdpbf16ps, whatever path was chosen; only where last_cpu_path has it.
double bf16_flops(CpuPath, int64_t rounds) {
  int64_t n = rounds;
  clear_zmm();
  __asm__ volatile(
      "1:\n.irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n"
      "vdpbf16ps %%zmm31, %%zmm30, %%zmm\\r\n.endr\ndec %0\njnz 1b\nvzeroupper\n"
      : "+r"(n)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc");
  return double(rounds) * 24 * 32 * 2;
}

double peak_rate(const Options& options, ThreadPool& pool,
                 double (*flops_of)(CpuPath, int64_t) = fma_flops) {
  const int64_t rounds = 400000;
  double flops = 0;
  const double time = time_of(options, [&] {
    pool.run(pool.num_threads(), [&](int64_t piece, int) {
      const double done = flops_of(cpu_choice().path, rounds);
      if (piece == 0) flops = done * pool.num_threads();
    });
  });
  return flops / time;
}

// --- OpenBLAS in a child: one line asks (M N K dX), one line answers (seconds) ---

using Sgemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int,
                       float, float*, int);

int serve_openblas(const Options& options) {
  void* library = dlopen("libopenblas.so.0", RTLD_NOW);
  if (!library) return 1;
  const auto sgemm = reinterpret_cast<Sgemm>(dlsym(library, "cblas_sgemm"));
  long M, N, K, dx;
  std::vector<float> a, b, c;
  while (std::scanf("%ld %ld %ld %ld", &M, &N, &K, &dx) == 4) {
    a.assign(size_t(M * std::max(N, K)), 0.5f);
    b.assign(size_t(N * K), 0.25f);
    c.assign(size_t(M * std::max(N, K)), 0.0f);
    constexpr int kRowMajor = 101, kAsItIs = 111, kTransposed = 112;
    const double time = time_of(options, [&] {
      if (dx)  // (M, N) x (N, K)
        sgemm(kRowMajor, kAsItIs, kAsItIs, int(M), int(K), int(N), 1, a.data(), int(N), b.data(),
              int(K), 0, c.data(), int(K));
      else  // (M, K) x (N, K)^T
        sgemm(kRowMajor, kAsItIs, kTransposed, int(M), int(N), int(K), 1, a.data(), int(K),
              b.data(), int(K), 0, c.data(), int(N));
    });
    std::printf("%.9f\n", time);
    std::fflush(stdout);
  }
  return 0;
}

class OpenBlas {
 public:
  OpenBlas(const Options& options, const std::string& core) : core_(core) {
    int ask[2], answer[2];
    if (pipe2(ask, O_CLOEXEC) != 0 || pipe2(answer, O_CLOEXEC) != 0) return;
    child_ = fork();
    if (child_ == 0) {
      dup2(ask[0], 0);
      dup2(answer[1], 1);
      if (freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
      if (!core.empty()) setenv("OPENBLAS_CORETYPE", core.c_str(), 1);
      const std::string threads = std::to_string(options.threads);
      setenv("OPENBLAS_NUM_THREADS", threads.c_str(), 1);
      setenv("OPENBLAS_THREAD_TIMEOUT", "18", 1);  // or its idle threads spin into our turn
      execl("/proc/self/exe", "gemm_bench", "--serve-openblas", "--threads", threads.c_str(),
            options.cpu_time ? "--cpu-time" : nullptr, nullptr);
      _exit(1);
    }
    close(ask[0]);
    close(answer[1]);
    ask_ = fdopen(ask[1], "w");
    answer_ = fdopen(answer[0], "r");
  }
  ~OpenBlas() {
    if (ask_) std::fclose(ask_);
    if (answer_) std::fclose(answer_);
    if (child_ > 0) waitpid(child_, nullptr, 0);
  }
  OpenBlas(const OpenBlas&) = delete;
  OpenBlas& operator=(const OpenBlas&) = delete;

  // NaN where the library is missing or the core type can't run here.
  double time(int64_t M, int64_t N, int64_t K, bool dx) {
    double time = NAN;
    std::fprintf(ask_, "%ld %ld %ld %d\n", long(M), long(N), long(K), int(dx));
    std::fflush(ask_);
    if (std::fscanf(answer_, "%lf", &time) != 1) return NAN;
    return time;
  }
  const std::string& core() const { return core_; }

 private:
  std::string core_;
  pid_t child_ = -1;
  FILE* ask_ = nullptr;
  FILE* answer_ = nullptr;
};

std::unique_ptr<OpenBlas> fastest_openblas(const Options& options) {
  std::unique_ptr<OpenBlas> best;
  double best_time = INFINITY;
  for (const char* core :
       {"", "Haswell", "Zen", "SkylakeX", "Cooperlake", "SapphireRapids", "Sandybridge"}) {
    auto candidate = std::make_unique<OpenBlas>(options, core);
    std::vector<double> times;
    for (int i = 0; i < 4; ++i) times.push_back(candidate->time(512, 896, 896, false));
    const double time = *std::min_element(times.begin() + 1, times.end());
    if (std::isnan(time)) continue;
    std::printf("# OPENBLAS_CORETYPE=%-14s %6.1f GFLOP/s\n", core, 2e-9 * 512 * 896 * 896 / time);
    if (time < best_time) best_time = time, best = std::move(candidate);
  }
  return best;
}

// --- the products of a step ---

struct Case {
  std::string name;
  double flops,
      bytes;  // bytes: of the operand that must come from memory, 0 where that is no limit
  std::function<void()> run;
  std::function<double()> peer;  // seconds of OpenBLAS for the same, or empty
};

Tensor filled(int64_t rows, int64_t cols, DType dtype) {
  const Tensor t = Tensor::empty({rows, cols}, dtype);
  for (int64_t i = 0; i < rows * cols; ++i) {
    const float value = float(i % 61 - 30) / 32;
    if (dtype == DType::F32)
      t.data<float>()[i] = value;
    else
      t.data<BFloat16>()[i] = to_bfloat16(value);
  }
  return t;
}

Case make_case(const std::string& name, std::vector<GemmTerm> terms, DType dtype,
               bool memory_bound = false) {
  const GemmTerm& t = terms[0];
  const int64_t M = t.transpose_a ? t.a.cols() : t.a.num_rows();
  const int64_t N = t.transpose_b ? t.b.num_rows() : t.b.cols();
  double flops = 0;
  for (const GemmTerm& term : terms)
    flops +=
        2.0 * double(M) * double(N) * double(term.transpose_a ? term.a.num_rows() : term.a.cols());
  const Tensor c = Tensor::empty({M, N}, dtype);
  const double bytes = memory_bound ? double(t.b.num_bytes()) : 0;
  return {name + (dtype_size(t.a.dtype()) == 4 ? " F32" : " BF16"),
          flops,
          bytes,
          [=, out = c]() mutable { cpu_gemm(out, terms, {}, {}); },
          {}};
}

// A linear layer (N, K) over M tokens with LoRA of rank 16: what a training step asks for.
void add_layer(std::vector<Case>& cases, int64_t M, int64_t N, int64_t K, DType dtype,
               OpenBlas* peer) {
  const int64_t r = 16;
  const Tensor x = filled(M, K, dtype), w = filled(N, K, dtype), dy = filled(M, N, dtype);
  const Tensor a = filled(r, K, DType::F32), b = filled(N, r, DType::F32), u = filled(M, r, dtype);
  const std::string shape = concat(" M=", M, " N=", N, " K=", K);
  const auto add = [&](const std::string& name, std::vector<GemmTerm> terms, DType out, int dx) {
    cases.push_back(make_case(name + shape, std::move(terms), out));
    if (peer && dx >= 0) cases.back().peer = [=] { return peer->time(M, N, K, dx == 1); };
  };
  add("forward", {{x, w, false, true, 1}}, dtype, 0);
  add("dX", {{dy, w, false, false, 1}}, dtype, 1);
  if (N == K) return;
  add("forward + uB^T", {{x, w, false, true, 1}, {u, b, false, true, 2}}, dtype, -1);
  add("u = xA^T", {{x, a, false, true, 1}}, dtype, -1);
  add("du = dyB", {{dy, b, false, false, 1}}, dtype, -1);
  add("dA = du^Tx", {{u, x, true, false, 1}}, DType::F32, -1);
  add("dB = dy^Tu", {{dy, u, true, false, 1}}, DType::F32, -1);
  add("dW = dy^Tx", {{dy, x, true, false, 1}}, DType::F32, -1);
}

// One token: weights are read once, too many of them for the caches.
void add_decoding(std::vector<Case>& cases, int64_t M, DType dtype) {
  const int64_t K = 1024, N = 65536;
  const Tensor x = filled(M, K, dtype), w = filled(N, K, dtype);
  cases.push_back(
      make_case(concat("decode M=", M, " N=", N, " K=", K), {{x, w, false, true, 1}}, dtype, true));
}

void report(const Options& options, std::vector<Case>& cases) {
  ThreadPool& pool = thread_pool();
  std::printf("%-48s %9s %7s %7s %9s %7s\n", "product", "GFLOP/s", "of peak", "GB/s", "OpenBLAS",
              "ratio");
  for (Case& c : cases) {
    if (c.name.find(options.filter) == std::string::npos) continue;
    std::vector<double> ours, peer, peaks;
    c.run();
    for (int i = 0; i < options.repeats; ++i) {
      peaks.push_back(peak_rate(options, pool));
      ours.push_back(time_of(options, c.run));
      if (c.peer) peer.push_back(c.peer());
    }
    const double time = median(ours), rate = c.flops / time;
    std::printf("%-48s %9.1f %6.1f%%", c.name.c_str(), 1e-9 * rate, 100 * rate / median(peaks));
    if (c.bytes > 0)
      std::printf(" %7.1f", 1e-9 * c.bytes / time);
    else
      std::printf(" %7s", "");
    if (c.peer)
      std::printf(" %9.1f %7.2f\n", 1e-9 * c.flops / median(peer), median(peer) / time);
    else
      std::printf("\n");
    std::fflush(stdout);
  }
}

int bench(const Options& options) {
  std::printf("# %s: %s, %s\n", cpu_choice().cpu.c_str(),
              std::string(cpu_path_name(cpu_choice().path)).c_str(), cpu_choice().reason.c_str());
  const std::unique_ptr<OpenBlas> openblas = fastest_openblas(options);
  std::vector<double> peaks;
  for (int i = 0; i < 9; ++i) peaks.push_back(peak_rate(options, thread_pool()));
  std::printf("# %d threads, FMA peak %.1f GFLOP/s, OpenBLAS core type %s, medians of %d%s\n",
              options.threads, 1e-9 * median(peaks),
              !openblas                  ? "none"
              : openblas->core().empty() ? "default"
                                         : openblas->core().c_str(),
              options.repeats, options.cpu_time ? ", processor time" : "");
  if (last_cpu_path(cpu_features()) >= CpuPath::Avx512Bf16) {
    peaks.clear();
    for (int i = 0; i < 9; ++i) peaks.push_back(peak_rate(options, thread_pool(), bf16_flops));
    std::printf("# vdpbf16ps peak %.1f GFLOP/s, %s; \"of peak\" is of the FMA peak\n",
                1e-9 * median(peaks),
                cpu_choice().path == CpuPath::Avx512Bf16 ? "used where both operands are BF16"
                                                         : "not used");
  }
  std::vector<Case> cases;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    for (const auto& [N, K] : {std::pair{4864, 896}, {896, 4864}, {896, 896}})
      add_layer(cases, options.rows, N, K, dtype, openblas.get());
    add_decoding(cases, 1, dtype);
    add_decoding(cases, 4, dtype);
  }
  report(options, cases);
  return 0;
}

int run(int argc, char** argv) {
  Options options;
  bool serve = false;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const auto value = [&] {
      CHECK(i + 1 < argc, "gemm_bench: ", arg, " wants a value");
      return argv[++i];
    };
    if (arg == "--threads")
      options.threads = std::atoi(value());
    else if (arg == "--repeats")
      options.repeats = std::atoi(value());
    else if (arg == "--rows")
      options.rows = std::atoi(value());
    else if (arg == "--filter")
      options.filter = value();
    else if (arg == "--cpu-time")
      options.cpu_time = true;
    else if (arg == "--serve-openblas")
      serve = true;
    else
      fail("gemm_bench: got ", arg,
           ", wanted --threads N, --repeats N, --rows M, --filter TEXT or --cpu-time");
  }
  set_num_threads(options.threads);
  options.threads = thread_pool().num_threads();
  return serve ? serve_openblas(options) : bench(options);
}

}  // namespace
}  // namespace graft

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  try {
    return graft::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
