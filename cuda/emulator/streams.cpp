// Streams, events and stream capture. Outside of a capture a stream is only a name: work has been
// done when the call returns. Unless lazy(): then each stream keeps its work until the host
// waits for it, or another stream that is waited for does, or memory is freed; the worst that CUDA
// allows for a wait that is missing. The legacy stream never waits. In a capture the rules are
// CUDA's: what would make the host wait, or would make the captured stream wait for work outside,
// spoils the capture.
#include "cuda/emulator/streams.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <set>
#include <utility>

#include "cuda/emulator/internal.h"
#include "cuda/emulator/lazy.h"

namespace emu {
namespace {

std::set<cudaStream_t>& streams() {
  static auto& s = *new std::set<cudaStream_t>;
  return s;
}
std::set<cudaEvent_t>& events() {
  static auto& s = *new std::set<cudaEvent_t>;
  return s;
}
bool known(cudaStream_t s) { return !s || streams().count(s); }
bool known(cudaEvent_t e) { return events().count(e); }

cudaError_t spoil(Capture& capture, cudaError_t e) {
  capture.valid = false;
  return set_last_error(e);
}

// The legacy stream waits for all streams but the non-blocking ones, which a capture cannot be part
// of.
cudaError_t forbid_legacy() {
  for (cudaStream_t s : streams())
    if (s->capture && !(s->flags & cudaStreamNonBlocking))
      return spoil(*s->capture, cudaErrorStreamCaptureImplicit);
  return cudaSuccess;
}

// Everything `from` knows, `to` knows now.
void merge(CaptureProgress& to, const CaptureProgress& from) {
  for (auto [stream, steps] : from) to[stream] = std::max(to[stream], steps);
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Does the stream's work until so much of it is done.
cudaError_t finish(cudaStream_t stream, uint64_t until) {
  cudaError_t first = cudaSuccess;
  while (known(stream) && stream->done < until) {
    const auto run = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    ++stream->done;
    const cudaError_t e = run();
    if (!first) first = e;
  }
  return first;
}

cudaError_t keep(cudaStream_t stream, std::function<cudaError_t()> run) {
  stream->waiting.push_back(std::move(run));
  ++stream->submitted;
  return cudaSuccess;
}

// What was submitted before the event was recorded.
cudaError_t finish(cudaEvent_t event) {
  return event->stream ? finish(event->stream, event->after) : cudaSuccess;
}

cudaError_t wait_on_host(const std::shared_ptr<Capture>& capture) {
  if (capture) return spoil(*capture, cudaErrorStreamCaptureUnsupported);
  ++stats().synchronisations;
  return cudaSuccess;  // a kernel that failed has said so when it was launched
}

}  // namespace

bool& lazy() {
  static bool on = [] {
    const char* wanted = std::getenv("EMU_LAZY");
    return wanted && !std::strcmp(wanted, "1");
  }();
  return on;
}

cudaError_t submit(cudaStream_t stream, Work work) {
  if (!known(stream)) return set_last_error(cudaErrorInvalidResourceHandle);
  if (!stream) {
    if (cudaError_t e = forbid_legacy()) return e;
  } else if (stream->capture) {
    if (!stream->capture->valid) return set_last_error(cudaErrorStreamCaptureInvalidated);
    stream->capture->nodes.push_back(make_node(std::move(work)));
    ++stream->progress[stream];
    return cudaSuccess;
  }
  if (!stream) {
    if (cudaError_t e = finish_blocking_streams()) return e;
  } else if (lazy()) {
    return keep(stream, std::move(work.run));
  } else if (cudaError_t e = finish(stream)) {
    return e;
  }
  return work.run();
}

cudaError_t finish(cudaStream_t stream) {
  return stream ? finish(stream, stream->submitted) : finish_blocking_streams();
}
cudaError_t finish_blocking_streams() {
  cudaError_t first = cudaSuccess;
  for (cudaStream_t s : streams())
    if (!(s->flags & cudaStreamNonBlocking))
      if (const cudaError_t e = finish(s); !first) first = e;
  return first;
}
cudaError_t finish_all_streams() {
  cudaError_t first = cudaSuccess;
  for (cudaStream_t s : streams())
    if (const cudaError_t e = finish(s); !first) first = e;
  return first;
}

cudaError_t forbid_during_capture() {
  for (cudaStream_t s : streams()) {
    if (!s->capture || s->capture->mode == cudaStreamCaptureModeRelaxed) continue;
    if (s->capture->mode == cudaStreamCaptureModeGlobal ||
        s->capture->thread == std::this_thread::get_id())
      return spoil(*s->capture, cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

cudaError_t forbid_if_capturing(cudaStream_t stream) {
  if (stream && known(stream) && stream->capture)
    return spoil(*stream->capture, cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}

}  // namespace emu

using namespace emu;

// ---- Streams

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (!stream || flags > cudaStreamNonBlocking) return set_last_error(cudaErrorInvalidValue);
  *stream = new CUstream_st{flags, nullptr, {}, {}};
  streams().insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (!stream || !known(stream)) return set_last_error(cudaErrorInvalidResourceHandle);
  if (stream->capture) stream->capture->valid = false;
  finish(stream);
  streams().erase(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!known(stream)) return set_last_error(cudaErrorInvalidResourceHandle);
  if (!stream)
    if (cudaError_t e = forbid_legacy()) return e;
  if (cudaError_t e = wait_on_host(stream ? stream->capture : nullptr)) return e;
  return finish(stream);
}

cudaError_t cudaDeviceSynchronize() {
  for (cudaStream_t s : streams())
    if (s->capture) return spoil(*s->capture, cudaErrorStreamCaptureUnsupported);
  wait_on_host(nullptr);
  return finish_all_streams();
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (!known(stream) || !known(event)) return set_last_error(cudaErrorInvalidResourceHandle);
  const auto& capture = event->capture;
  if (!stream) return capture ? spoil(*capture, cudaErrorStreamCaptureImplicit) : forbid_legacy();
  if (stream->capture != capture) {
    if (!capture) return spoil(*stream->capture, cudaErrorStreamCaptureIsolation);
    if (stream->capture) {
      spoil(*capture, cudaErrorStreamCaptureMerge);
      return spoil(*stream->capture, cudaErrorStreamCaptureMerge);
    }
    if (capture->origin && known(capture->origin) && capture->origin->capture == capture) {
      stream->capture = capture;  // joins
      stream->progress = {{stream, 1}};
    } else {
      return set_last_error(cudaErrorCapturedEvent);  // that capture is over
    }
  }
  if (capture) merge(stream->progress, event->progress);
  if (!capture && lazy())
    return keep(stream, [from = event->stream, until = event->after] {
      return from ? finish(from, until) : cudaSuccess;
    });
  return cudaSuccess;
}

// ---- Events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (!event) return set_last_error(cudaErrorInvalidValue);
  *event = new CUevent_st;
  (*event)->flags = flags;
  events().insert(*event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (!known(event)) return set_last_error(cudaErrorInvalidResourceHandle);
  events().erase(event);
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (!known(stream) || !known(event)) return set_last_error(cudaErrorInvalidResourceHandle);
  if (!stream)
    if (cudaError_t e = forbid_legacy()) return e;
  event->recorded = true;
  event->seconds = now();
  event->capture = stream ? stream->capture : nullptr;
  event->stream = event->capture ? nullptr : stream;
  if (event->stream) event->after = stream->submitted;
  if (event->capture) event->progress = stream->progress;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (!known(event)) return set_last_error(cudaErrorInvalidResourceHandle);
  if (event->capture) return spoil(*event->capture, cudaErrorCapturedEvent);
  wait_on_host(nullptr);
  return finish(event);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!known(event)) return set_last_error(cudaErrorInvalidResourceHandle);
  if (event->capture) return spoil(*event->capture, cudaErrorCapturedEvent);
  if (event->stream && known(event->stream) && event->stream->done < event->after) {
    finish(event);  // for whoever asks until it is
    return cudaErrorNotReady;
  }
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  for (cudaEvent_t e : {start, end}) {
    if (!known(e) || !e->recorded || (e->flags & cudaEventDisableTiming))
      return set_last_error(cudaErrorInvalidResourceHandle);
    if (e->capture) return set_last_error(cudaErrorCapturedEvent);
  }
  *milliseconds = static_cast<float>((end->seconds - start->seconds) * 1e3);
  return cudaSuccess;
}

// ---- Capture

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (!known(stream)) return set_last_error(cudaErrorInvalidResourceHandle);
  if (!stream) return set_last_error(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return set_last_error(cudaErrorIllegalState);
  stream->capture =
      std::make_shared<Capture>(Capture{stream, mode, std::this_thread::get_id(), true, {}});
  stream->progress = {{stream, 1}};
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (!known(stream)) return set_last_error(cudaErrorInvalidResourceHandle);
  if (!stream)
    if (cudaError_t e = forbid_legacy()) return e;
  *status = !stream || !stream->capture ? cudaStreamCaptureStatusNone
            : stream->capture->valid    ? cudaStreamCaptureStatusActive
                                        : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

// Takes every stream out of the capture; says whether all of them had come back to the origin.
static bool leave_capture(const std::shared_ptr<Capture>& capture) {
  bool joined = true;
  for (cudaStream_t s : streams()) {
    if (s->capture != capture) continue;
    joined &= capture->origin->progress[s] >= s->progress[s];
    s->capture = nullptr;
  }
  return joined;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (!graph) return set_last_error(cudaErrorInvalidValue);
  *graph = nullptr;
  if (!stream || !known(stream)) return set_last_error(cudaErrorInvalidResourceHandle);
  const std::shared_ptr<Capture> capture = stream->capture;
  if (!capture) return set_last_error(cudaErrorIllegalState);
  if (capture->origin != stream) return spoil(*capture, cudaErrorStreamCaptureUnmatched);
  const bool joined = leave_capture(capture);
  if (!capture->valid) return set_last_error(cudaErrorStreamCaptureInvalidated);
  if (!joined) return set_last_error(cudaErrorStreamCaptureUnjoined);
  *graph = make_graph(std::move(capture->nodes));
  return cudaSuccess;
}
