// Work on streams, as the runtime's and cuBLAS's files hand it in. streams.cpp, graphs.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/emulator/runtime_api.h"

namespace emu {

// One kernel, product, copy or fill.
struct Work {
  enum Kind { kKernel, kHostToDevice, kDeviceToHost, kDeviceToDevice, kHostToHost, kFill };
  Kind kind;
  const void* kernel;  // for messages; null but for kernels
  std::function<cudaError_t()> run;
  // Its parameters. Words that point into a device allocation tie a captured graph to that memory.
  std::vector<uintptr_t> words;
};

// Does the work, or keeps it if the stream is being captured, or if it may wait (lazy()).
// Errors are also the last error.
cudaError_t submit(cudaStream_t stream, Work work);
// Does what waits on the stream, and what that waits for; the first error.
cudaError_t finish(cudaStream_t stream);
// The same for what the legacy stream waits for, and for everything.
cudaError_t finish_blocking_streams();
cudaError_t finish_all_streams();
// For calls that CUDA forbids while a capture is going on (cudaMalloc, cudaMemcpy, ...): spoils the
// capture and gives its error.
cudaError_t forbid_during_capture();
// Whether an async copy with pageable memory may be made on this stream; if not, as above.
cudaError_t forbid_if_capturing(cudaStream_t stream);

// A captured piece of work and the memory that it holds pointers to.
struct Node {
  Work work;
  struct Use {
    uintptr_t address;
    uint64_t serial;  // of the allocation
  };
  std::vector<Use> uses;
};

// A capture in progress; shared by all the streams that have joined it.
struct Capture {
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool valid = true;
  std::vector<Node> nodes;
};
Node make_node(Work work);

}  // namespace emu

// How far each stream of a capture had come when this stream or event last heard of it.
using CaptureProgress = std::map<const CUstream_st*, uint64_t>;

struct CUstream_st {
  unsigned flags = 0;
  std::shared_ptr<emu::Capture> capture;
  CaptureProgress progress;
  // Lazily: what is still to be done, and how much has been submitted and done of it.
  std::deque<std::function<cudaError_t()>> waiting;
  uint64_t submitted = 0, done = 0;
};
struct CUevent_st {
  unsigned flags = 0;
  bool recorded = false;
  double seconds = 0;
  std::shared_ptr<emu::Capture> capture;  // it was recorded in
  CaptureProgress progress;
  CUstream_st* stream = nullptr;  // that it was recorded on, after so much work; null: none waits
  uint64_t after = 0;
};
