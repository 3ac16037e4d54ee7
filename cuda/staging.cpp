#include "cuda/staging.h"

#include <algorithm>
#include <cstring>

#include "cuda/gpu.cuh"

namespace graft {

void Staging::allocate() {
  char* pinned = nullptr;
  CUDA_CHECK(cudaMallocHost(reinterpret_cast<void**>(&pinned), kLargest + kLargestDownload));
  for (Segment& segment : segments_) {
    segment.data = pinned;
    pinned += kSegmentBytes;
    CUDA_CHECK(cudaEventCreateWithFlags(&segment.passed, cudaEventDisableTiming));
  }
  downloads_ = pinned;
}

char* Staging::reserve(size_t bytes) {
  if (!downloads_) allocate();
  if (used_ + bytes > kSegmentBytes) {
    CUDA_CHECK(cudaEventRecord(segments_[current_].passed, stream_));
    segments_[current_].recorded = true;
    current_ = (current_ + 1) % kSegments;
    used_ = 0;
    Segment& next = segments_[current_];
    if (next.recorded && cudaEventQuery(next.passed) != cudaSuccess)
      CUDA_CHECK(cudaEventSynchronize(next.passed));
  }
  char* place = segments_[current_].data + used_;
  used_ += (bytes + 63) / 64 * 64;
  return place;
}

void Staging::upload(void* device, const void* from, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const size_t piece = std::min(bytes - done, kSegmentBytes);
    char* place = reserve(piece);
    std::memcpy(place, static_cast<const char*>(from) + done, piece);
    CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(device) + done, place, piece,
                               cudaMemcpyHostToDevice, stream_));
    done += piece;
  }
}

void Staging::download(void* to, const void* device, size_t bytes) {
  CHECK(bytes <= kLargestDownload, "staging: ", bytes, " bytes, at most ", kLargestDownload);
  if (!downloads_) allocate();
  CUDA_CHECK(cudaMemcpyAsync(downloads_, device, bytes, cudaMemcpyDeviceToHost, stream_));
  CUDA_CHECK(cudaStreamSynchronize(stream_));
  std::memcpy(to, downloads_, bytes);
}

}  // namespace graft
