// Pinned host memory through which small copies go, so that the host waits neither for the stream
// nor for the driver: bytes are copied into a ring, and the stream takes them from there when it
// gets to it. A piece of the ring is used again once an event says that the stream has passed it.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>

namespace graft {

class Staging {
 public:
  static constexpr size_t kSegmentBytes = size_t(1) << 20;
  static constexpr int kSegments = 4;
  static constexpr size_t kLargest = kSegmentBytes * kSegments;  // more is not staged
  static constexpr size_t kLargestDownload = 4096;

  explicit Staging(cudaStream_t stream) : stream_(stream) {}
  // `from` may be changed as soon as this returns.
  void upload(void* device, const void* from, size_t bytes);
  // Waits for the stream: `to` has the bytes when this returns.
  void download(void* to, const void* device, size_t bytes);

 private:
  struct Segment {
    char* data = nullptr;
    cudaEvent_t passed = nullptr;  // recorded when the ring went on to the next segment
    bool recorded = false;
  };
  void allocate();
  char* reserve(size_t bytes);

  cudaStream_t stream_;
  std::array<Segment, kSegments> segments_;
  char* downloads_ = nullptr;
  size_t current_ = 0, used_ = 0;  // segment, and bytes of it handed out
};

}  // namespace graft
