#include "train/step_graphs.h"

#include <algorithm>

namespace graft {
namespace {

constexpr size_t kMostGraphs = 8;   // a graph of a step is thousands of nodes: some MB
constexpr size_t kMostSeen = 4096;  // signatures remembered

Allocator& gpu_memory() { return allocator_of(Device::CUDA); }

}  // namespace

StepGraphs::StepGraphs() { gpu_memory().release_cached(); }

StepGraphs::~StepGraphs() { forget(); }

void StepGraphs::forget() {
  graphs_.clear();
  gpu_memory().release_pool();
}

void StepGraphs::run(const StepInputs& inputs, const AdamWStep& adamw, const Work& work) {
  bool moved = false;  // the values, by AdamW; not where it was captured only
  try {
    return run_now(inputs, adamw, work, moved);
  } catch (const OutOfMemory&) {
    // Blocks of other sizes lie in the pool, which graphs keep from being given back.
    forget();
  }
  if (!moved) return run_plainly(inputs, work, moved);
  const SetPooled pooled(gpu_memory(), true);
  work.publish();
  ++counts_.plain;
}

void StepGraphs::run_beside(const std::function<void()>& work) {
  const SetPooled pooled(gpu_memory(), true);
  try {
    return work();
  } catch (const OutOfMemory&) {
    forget();
  }
  work();
}

void StepGraphs::run_now(const StepInputs& inputs, const AdamWStep& adamw, const Work& work,
                         bool& moved) {
  std::vector<int32_t> key = signature(inputs);
  auto known = std::find_if(graphs_.begin(), graphs_.end(),
                            [&](const Graph& graph) { return graph.signature == key; });
  if (known == graphs_.end()) {
    if (seen_.size() >= kMostSeen) seen_.clear();
    if (seen_.insert(key).second) return run_plainly(inputs, work, moved);
    capture(inputs, std::move(key), work);
    ++counts_.captured;
  } else {
    backend_of(Device::CUDA).copy(known->inputs.memory, inputs.memory);
    graphs_.splice(graphs_.begin(), graphs_, known);
    ++counts_.replayed;
  }
  graphs_.front().step->launch(adamw);
}

void StepGraphs::run_plainly(const StepInputs& inputs, const Work& work, bool& moved) {
  const StepInputs here = to_device(inputs, Device::CUDA);
  const SetPooled pooled(gpu_memory(), true);
  work.step(here);
  moved = true;
  work.publish();
  ++counts_.plain;
}

void StepGraphs::capture(const StepInputs& inputs, std::vector<int32_t> signature,
                         const Work& work) {
  if (graphs_.size() == kMostGraphs) graphs_.pop_back();
  Graph graph{std::move(signature), to_device(inputs, Device::CUDA), nullptr};
  const SetPooled pooled(gpu_memory(), true);
  graph.step = backend_of(Device::CUDA).capture([&] {
    work.step(graph.inputs);
    work.publish();
  });
  const int64_t left = gpu_memory().pooled_live();
  CHECK(left == 0, "cuda_graph: ", left, " bytes that were made in a step outlive it");
  graphs_.push_front(std::move(graph));
}

}  // namespace graft
