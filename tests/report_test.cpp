// What a run tells: console lines, metrics.jsonl.
#include "train/report.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tensor/check.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

class ReportTest : public testing::Test {
 protected:
  ReportTest() {
    folder_ = fs::temp_directory_path() / ("graft_report_" + std::to_string(getpid()));
    fs::create_directories(folder_);
  }
  ~ReportTest() override { fs::remove_all(folder_); }
  std::string read(const std::string& name) {
    std::ifstream file(folder_ / name);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
  }
  static StepMetrics metrics(int64_t step) {
    StepMetrics m;
    m.step = step;
    m.total_steps = 20;
    m.epoch = 0.5;
    m.loss = 1.25;
    m.learning_rate = 2e-4;
    m.grad_norm = 0.75;
    m.num_tokens = 1000;
    m.num_label_tokens = 900;
    m.tokens_per_second = 123.4;
    m.peak_memory_bytes = 1500000000;
    m.seconds_left = 67;
    return m;
  }
  fs::path folder_;
};

TEST_F(ReportTest, AConsoleLineHasEverythingThatMatters) {
  EXPECT_EQ(console_line(metrics(7)),
            "step 7/20 | loss 1.2500 | lr 2.00e-04 | grad norm 0.750 | 123 tok/s | ETA 1:07 | peak "
            "1.50 GB");
  EXPECT_EQ(duration(59.6), "1:00");
  EXPECT_EQ(duration(3 * 3600 + 4 * 60 + 5), "3:04:05");
}

TEST_F(ReportTest, InAPipeEveryStepIsALineAndMetricsAreObjects) {
  const std::string console = folder_ / "console", path = folder_ / "metrics.jsonl";
  std::FILE* file = std::fopen(console.c_str(), "w");
  {
    Report report(file, path);
    report.eval(0, 0, 3.5);
    report.step(metrics(1));
    report.step(metrics(2));
  }
  std::fclose(file);
  EXPECT_EQ(read("console"), "step 0 | eval loss 3.5000\n" + console_line(metrics(1)) + "\n" +
                                 console_line(metrics(2)) + "\n");
  std::istringstream lines(read("metrics.jsonl"));
  std::string line;
  std::getline(lines, line);
  EXPECT_EQ(nlohmann::json::parse(line),
            nlohmann::json::parse(R"({"step": 0, "epoch": 0.0, "eval_loss": 3.5})"));
  std::getline(lines, line);
  EXPECT_EQ(nlohmann::json::parse(line), nlohmann::json::parse(R"({"step": 1, "epoch": 0.5,
      "loss": 1.25, "learning_rate": 2e-4, "grad_norm": 0.75, "num_tokens": 1000,
      "num_label_tokens": 900, "tokens_per_second": 123.4, "peak_memory_bytes": 1500000000})"));
}

TEST_F(ReportTest, ResumingDropsWhatWasLoggedLaterAndATornLine) {
  const std::string path = folder_ / "metrics.jsonl";
  {
    Report report(nullptr, path);
    for (int step = 1; step <= 3; ++step) report.step(metrics(step));
    report.eval(3, 1, 2.0);
  }
  const std::string before = read("metrics.jsonl");
  std::ofstream(path, std::ios::app) << "{\"step\": 2, \"lo";
  truncate_metrics(path, 3);
  EXPECT_EQ(read("metrics.jsonl"), before);
  truncate_metrics(path, 2);
  EXPECT_EQ(read("metrics.jsonl"),
            metrics_line(metrics(1)) + "\n" + metrics_line(metrics(2)) + "\n");
  truncate_metrics(path, -1);
  EXPECT_EQ(read("metrics.jsonl"), "");
}

TEST_F(ReportTest, AFullDiskIsAnError) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  Report report(nullptr, "/dev/full");
  EXPECT_THROW(report.step(metrics(1)), Error);
}

TEST_F(ReportTest, PeakMemoryIsThatOfTheProcess) {
  const int64_t before = peak_memory_bytes();
  EXPECT_GT(before, 1 << 20);
  std::vector<char> block(size_t(before) + (64 << 20),
                          1);  // more than any earlier test left behind
  EXPECT_GE(peak_memory_bytes(), before + (64 << 20)) << int(block[5]);
}

}  // namespace
}  // namespace graft
