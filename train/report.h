// What a run tells while it goes: lines on the console, and metrics.jsonl in the output directory.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

namespace graft {

// What one logged step has to say. Losses are means over labelled tokens.
struct StepMetrics {
  int64_t step = 0, total_steps = 0;
  double epoch = 0;  // epochs done, with a fraction
  double loss = 0;   // over the tokens since the last logged step
  double learning_rate = 0;
  double grad_norm = 0;           // of this step, before clipping
  int64_t num_tokens = 0;         // so far
  int64_t num_label_tokens = 0;   // so far
  double tokens_per_second = 0;   // since the last logged step
  int64_t peak_memory_bytes = 0;  // of the process (VmHWM), or held on the GPU
  double seconds_left = 0;        // console only
};

std::string metrics_line(const StepMetrics& metrics);  // one JSON object, no newline
std::string metrics_line(int64_t step, double epoch, double eval_loss);
std::string console_line(const StepMetrics& metrics);

std::string duration(double seconds);  // "0:07", "12:34", "3:04:05"
int64_t peak_memory_bytes();           // of this process so far: VmHWM

class Report {
 public:
  // console: null for silence. metrics_path: opened to append; empty for none.
  Report(std::FILE* console, const std::string& metrics_path);
  ~Report();
  Report(const Report&) = delete;
  Report& operator=(const Report&) = delete;

  void step(const StepMetrics& metrics);  // in place on a terminal, a line of its own in a pipe
  void eval(int64_t step, double epoch, double eval_loss);
  void line(const std::string& text);  // on the console alone

 private:
  void append(const std::string& line);
  std::FILE* console_;
  std::FILE* metrics_ = nullptr;
  std::string metrics_path_;
  bool terminal_ = false;
  bool line_open_ = false;  // the cursor stands behind a step's line
};

// Drops what was logged after `step`, and a torn last line: the run goes on from there.
void truncate_metrics(const std::string& metrics_path, int64_t step);

}  // namespace graft
