// The table of cuda/README.md: what each rung of each ladder (cuda/variants.h) costs. `make ladder`
// runs it in two builds:
//   on a GPU   cuda_ladder --time DIR [--commit ID] [--repeats N] [--filter TEXT]
//     checks every rung at a small size, times it at the family's size, and writes DIR/<gpu>.json;
//     with a filter it only prints
//   emulated   cuda_ladder --table FILE [--results DIR] [--ptxas DIR]
//     counts bank conflicts, reads times from DIR/*.json and registers from what ptxas -v said,
//     and rewrites FILE between its two markers; what is not known is "-"
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "bench/cuda_ladder_table.h"
#include "bench/gpu_tables.h"
#include "bench/page.h"
#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "cuda/variants.h"
#include "tensor/check.h"

#if defined(CUDA_EMU)
#include "cuda/emulator/emulator.h"
#endif

namespace graft {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::string time_into, table, results, ptxas, commit, filter;
  int repeats = 21;
};

Options parse(int argc, char** argv) {
  Options options;
  const std::map<std::string, std::string*> texts = {
      {"--time", &options.time_into},  {"--table", &options.table},
      {"--results", &options.results}, {"--ptxas", &options.ptxas},
      {"--commit", &options.commit},   {"--filter", &options.filter}};
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    CHECK(i + 1 < argc, "cuda_ladder: ", name, " lacks its value");
    if (name == "--repeats") {
      char* end = nullptr;
      options.repeats = int(std::strtol(argv[i + 1], &end, 10));
      CHECK(end != argv[i + 1] && !*end, "cuda_ladder: --repeats ", argv[i + 1],
            ", wanted a number");
    } else if (const auto text = texts.find(name); text != texts.end())
      *text->second = argv[i + 1];
    else
      fail("cuda_ladder: unknown option ", name);
  }
  CHECK(options.time_into.empty() != options.table.empty(),
        "cuda_ladder: wanted --time or --table");
  CHECK(options.repeats >= 1, "cuda_ladder: --repeats ", options.repeats, ", wanted 1 or more");
  return options;
}

cudaStream_t stream() { return static_cast<CudaBackend&>(cuda_backend()).stream(); }

#if defined(CUDA_EMU)

// --- emulated: bank conflicts, and the table -----------------------------------------------------

// Wavefronts that an 8x8 tile takes on average, by rung; 0 without ldmatrix.
std::map<int, double> bank_waves(const LadderFamily& family) {
  std::map<int, double> waves;
  const LadderProblem problem = family.make(family.small_sizes);
  for (const LadderRung& rung : family.rungs) {
    LadderProblem device = on_device(problem);
    emu::stats() = {};
    family.run(rung.number, device, stream());
    CHECK(cudaStreamSynchronize(stream()) == cudaSuccess, "cuda_ladder: ", family.name, " rung ",
          rung.number, " failed under emulation");
    const auto tiles = double(emu::stats().ldmatrix_tiles);
    waves[rung.number] = tiles == 0 ? 0 : double(emu::stats().ldmatrix_wavefronts) / tiles;
  }
  return waves;
}

void write_table(const Options& options) {
  LadderMeasurements measured;
  for (const LadderFamily& family : ladder_families())
    measured.bank_waves[family.name] = bank_waves(family);
  if (!options.ptxas.empty() && fs::is_directory(options.ptxas))
    for (const auto& entry : fs::directory_iterator(options.ptxas))
      if (entry.path().extension() == ".ptxas") read_ptxas(measured.kernels, entry.path());
  if (!options.results.empty() && fs::is_directory(options.results))
    for (const auto& entry : fs::directory_iterator(options.results))
      if (entry.path().extension() == ".json") read_results(measured.cards, entry.path());
  replace_section(options.table, "ladder", ladder_markdown(measured));
  std::printf("%s: %zu GPUs timed, registers of %zu kernels\n", options.table.c_str(),
              measured.cards.size(), measured.kernels.size());
}

void time_all(const Options&) {
  fail("cuda_ladder: the emulator knows no time; run the GPU build");
}

#else

// --- on a GPU: times -----------------------------------------------------------------------------

void write_table(const Options&) { fail("cuda_ladder: --table is of the emulated build"); }

class Event {
 public:
  Event() { check(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record() { check(cudaEventRecord(event_, stream())); }
  double us_since(const Event& begin) const {
    float ms = 0;
    check(cudaEventSynchronize(event_));
    check(cudaEventElapsedTime(&ms, begin.event_, event_));
    return 1e3 * double(ms);
  }

 private:
  static void check(cudaError_t error) {
    CHECK(error == cudaSuccess, "cuda_ladder: ", cudaGetErrorString(error));
  }
  cudaEvent_t event_ = nullptr;
};

using Call = std::function<void(LadderProblem&)>;

// Throws Error where the call's answer at the family's small size is not the reference's.
void check_answer(const LadderFamily& family, const std::string& what, const Call& call) {
  const LadderProblem problem = family.make(family.small_sizes);
  LadderProblem expected = problem, device = on_device(problem);
  for (Tensor& output : expected.outputs) output = output.clone();
  family.reference(expected);
  call(device);
  for (size_t i = 0; i < expected.outputs.size(); ++i) {
    const std::vector<double> got = device.outputs[i].to(Device::CPU).to_doubles();
    const std::vector<double> want = expected.outputs[i].to_doubles();
    double worst = 0, largest = 0;
    for (size_t j = 0; j < want.size(); ++j) {
      largest = std::max(largest, std::abs(want[j]));
      if (!(std::abs(got[j] - want[j]) <= worst)) worst = std::abs(got[j] - want[j]);
    }
    CHECK(worst <= 2e-2 * largest, "cuda_ladder: ", what, ", output ", i, ": error ", worst,
          " of values up to ", largest);
  }
}

// Median over the repeats; before each the outputs get their first contents again, and the L2 cache
// other data.
double median_us(const LadderProblem& problem, const Call& call, int repeats) {
  const LadderProblem device = on_device(problem);
  LadderProblem work = device;
  for (Tensor& output : work.outputs) output = output.clone();
  const Tensor flush = Tensor::empty({int64_t{256} << 20}, DType::U8, Device::CUDA, Scope::Scratch);
  Event begin, end;
  std::vector<double> times;
  for (int repeat = -2; repeat < repeats; ++repeat) {  // the first two warm up
    for (size_t i = 0; i < work.outputs.size(); ++i)
      cuda_backend().copy(work.outputs[i], device.outputs[i]);
    cudaMemsetAsync(flush.raw(), repeat, size_t(flush.num_bytes()), stream());
    begin.record();
    call(work);
    end.record();
    const double us = end.us_since(begin);
    if (repeat >= 0) times.push_back(us);
    if (us > 3e5 && times.size() >= 3) break;  // the naive ones need no more
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void time_family(Json& results, const LadderFamily& family, const Options& options) {
  const LadderProblem problem = family.make(family.bench_sizes);
  const LadderCosts costs = family.costs(family.bench_sizes);
  Json& entry = results[family.name] = Json::object();
  entry["sizes"] = family.bench_sizes;
  const auto time_call = [&](const std::string& key, const std::string& name, const Call& call) {
    const std::string what = std::string(family.name) + " " + name;
    check_answer(family, what, call);
    const double us = median_us(problem, call, options.repeats);
    entry["us"][key] = us;
    std::printf("%-36s %12.1f us  %8.1f TFLOP/s  %8.1f GB/s\n", what.c_str(), us,
                1e-6 * costs.flop / us, 1e-3 * costs.bytes / us);
  };
  for (const LadderRung& rung : family.rungs)
    time_call(std::to_string(rung.number), rung.name,
              [&](LadderProblem& p) { family.run(rung.number, p, stream()); });
  if (family.library && cuda_has_cublas(nullptr))
    time_call("library", family.library_name, family.library);
}

void time_all(const Options& options) {
  std::string reason;
  CHECK(cuda_available(&reason), "cuda_ladder: no GPU: ", reason);
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0) == cudaSuccess, "cuda_ladder: device 0 is silent");
  const fs::path path = fs::path(options.time_into) / file_name_of(properties.name);
  Json all = Json::object();
  if (std::ifstream in(path); in) all = Json::parse(in);
  if (!all.contains("device")) all["device"]["gpu"] = properties.name;
  Json& ladder = all["ladder"];
  ladder["device"] = properties.name;
  ladder["commit"] = options.commit;
  for (const LadderFamily& family : ladder_families())
    if (std::string(family.name).find(options.filter) != std::string::npos)
      time_family(ladder["families"], family, options);
  if (!options.filter.empty()) return;  // a file holds all families, of one commit
  fs::create_directories(path.parent_path());
  std::ofstream(path) << all.dump(1) << '\n';
  std::printf("written: %s\n", path.c_str());
}

#endif

}  // namespace
}  // namespace graft

int main(int argc, char** argv) {
  try {
    const graft::Options options = graft::parse(argc, argv);
    if (options.table.empty())
      graft::time_all(options);
    else
      graft::write_table(options);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
