#include "train/report.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tensor/check.h"
#include "tensor/safetensors.h"

namespace graft {
namespace {

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char text[256];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

std::string bytes_text(int64_t bytes) {
  return bytes < 1000000000 ? format("%.0f MB", double(bytes) / 1e6)
                            : format("%.2f GB", double(bytes) / 1e9);
}

}  // namespace

std::string metrics_line(const StepMetrics& m) {
  const nlohmann::ordered_json object = {{"step", m.step},
                                         {"epoch", m.epoch},
                                         {"loss", m.loss},
                                         {"learning_rate", m.learning_rate},
                                         {"grad_norm", m.grad_norm},
                                         {"num_tokens", m.num_tokens},
                                         {"num_label_tokens", m.num_label_tokens},
                                         {"tokens_per_second", m.tokens_per_second},
                                         {"peak_memory_bytes", m.peak_memory_bytes}};
  return object.dump();
}

std::string metrics_line(int64_t step, double epoch, double eval_loss) {
  const nlohmann::ordered_json object = {
      {"step", step}, {"epoch", epoch}, {"eval_loss", eval_loss}};
  return object.dump();
}

std::string console_line(const StepMetrics& m) {
  return format(
      "step %lld/%lld | loss %.4f | lr %.2e | grad norm %.3f | %.0f tok/s | ETA %s | "
      "peak %s",
      (long long)m.step, (long long)m.total_steps, m.loss, m.learning_rate, m.grad_norm,
      m.tokens_per_second, duration(m.seconds_left).c_str(),
      bytes_text(m.peak_memory_bytes).c_str());
}

std::string duration(double seconds) {
  const long long s = std::llround(std::max(0.0, seconds));
  if (s < 3600) return format("%lld:%02lld", s / 60, s % 60);
  return format("%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
}

int64_t peak_memory_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM:", 0) == 0) return std::stoll(line.substr(6)) * 1024;
  return 0;
}

Report::Report(std::FILE* console, const std::string& metrics_path)
    : console_(console), metrics_path_(metrics_path) {
  terminal_ = console && isatty(fileno(console));
  if (metrics_path.empty()) return;
  metrics_ = std::fopen(metrics_path.c_str(), "a");
  CHECK(metrics_, metrics_path, ": cannot be written: ", std::strerror(errno));
}

Report::~Report() {
  if (metrics_) std::fclose(metrics_);
  if (line_open_) std::fputc('\n', console_);
}

void Report::append(const std::string& line) {
  if (!metrics_) return;
  const bool written = std::fputs((line + "\n").c_str(), metrics_) >= 0;
  CHECK(std::fflush(metrics_) == 0 && written, metrics_path_,
        ": cannot be written: ", std::strerror(errno),
        "; free some space and go on with resume: true");
}

void Report::step(const StepMetrics& metrics) {
  append(metrics_line(metrics));
  if (!console_) return;
  const std::string text = console_line(metrics);
  if (terminal_) {
    // Back to the left, and clear what is left over. A line that wraps could not be overwritten.
    winsize window{};
    const bool known = ioctl(fileno(console_), TIOCGWINSZ, &window) == 0 && window.ws_col > 1;
    std::fprintf(console_, "\r%.*s\x1b[K", known ? window.ws_col - 1 : 1000, text.c_str());
    line_open_ = true;
  } else {
    std::fprintf(console_, "%s\n", text.c_str());
  }
  std::fflush(console_);
}

void Report::eval(int64_t step, double epoch, double eval_loss) {
  append(metrics_line(step, epoch, eval_loss));
  line(format("step %lld | eval loss %.4f", (long long)step, eval_loss));
}

void Report::line(const std::string& text) {
  if (!console_) return;
  if (line_open_) std::fputc('\n', console_);
  line_open_ = false;
  std::fprintf(console_, "%s\n", text.c_str());
  std::fflush(console_);
}

void truncate_metrics(const std::string& metrics_path, int64_t step) {
  if (!std::filesystem::exists(metrics_path)) return;
  std::ifstream file(metrics_path, std::ios::binary);
  std::string kept;
  for (std::string line; std::getline(file, line);) {
    const auto object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object() || !object.contains("step") || object["step"] > step) break;
    kept += line + "\n";
  }
  write_file_atomically(metrics_path, kept);
}

}  // namespace graft
