// Optimizer steps as CUDA graphs. A step whose signature (step_inputs.h) was met before is
// captured, and from then on started by one call, with new inputs. What a graph points to stays in
// its place: the inputs in a copy of their own for each graph, everything that lives within the
// step in one pool of blocks that all graphs share (tensor/allocator.h).
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <set>

#include "tensor/backend.h"
#include "train/step_inputs.h"

namespace graft {

class StepGraphs {
 public:
  struct Work {
    // From zeroing the gradients to AdamW: it reads the inputs given, leaves no tensor behind, and
    // asks for no memory once a value has changed, so that it can begin anew where there is none.
    std::function<void(const StepInputs&)> step;
    std::function<void()> publish;  // what follows from the new values; twice is as good as once
  };

  StepGraphs();
  ~StepGraphs();
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  // Does `work` with the inputs (on the CPU) copied to the GPU. adamw: the numbers that change from
  // step to step; work must use the same, and dropout's step must be adamw.step. The first time of
  // a signature is not captured: most signatures of ragged rows come once, and what a library does
  // at its first call it must not do in a capture.
  void run(const StepInputs& inputs, const AdamWStep& adamw, const Work& work);
  // Does work that no graph has, such as an evaluation, in the blocks of the steps; it leaves no
  // tensor behind either, and is done again where it found no memory but what graphs kept.
  void run_beside(const std::function<void()>& work);

  struct Counts {
    int64_t plain = 0, captured = 0, replayed = 0;  // steps; the captured ones were not replays
  };
  const Counts& counts() const { return counts_; }

 private:
  struct Graph {
    std::vector<int32_t> signature;
    StepInputs inputs;  // on the GPU; the graph reads them there
    std::unique_ptr<CapturedStep> step;
  };
  void run_now(const StepInputs& inputs, const AdamWStep& adamw, const Work& work, bool& moved);
  void run_plainly(const StepInputs& inputs, const Work& work, bool& moved);
  void capture(const StepInputs& inputs, std::vector<int32_t> signature, const Work& work);
  void forget();

  std::list<Graph> graphs_;  // the last used first
  std::set<std::vector<int32_t>> seen_;
  Counts counts_;
};

}  // namespace graft
