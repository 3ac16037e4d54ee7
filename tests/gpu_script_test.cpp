// bench/gpu.sh, the driver of make gpu, with stand-ins for the programs that it runs: what it does
// on a machine without a GPU, when memory runs out, and when something fails.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace {

namespace fs = std::filesystem;

std::string read(const fs::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

class GpuScript : public testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(folder_);
    program("bench/cuda_kernels",
            "[ \"$1\" = --device-info ] && echo '{\"gpu\": \"Fake GPU\", \"driver\": \"1.2\"}' && "
            "exit\n"
            "echo '{\"roofline\": \"copy\", \"gb_s\": 1.0}'\n");
    program("bench/train_step", "echo \"{\\\"args\\\": \\\"$*\\\"}\"\n");
    program("cuda_tests", "echo '3 passed, 0 failed, 1 skipped'\n");
    // Keeps its arguments and its rows, one file per section.
    program("bench/gpu_results", "{ echo \"$*\"; cat; } >\"$2/$3\"\n");
    fs::create_directories(folder_ / "out");
  }
  void TearDown() override { fs::remove_all(folder_); }

  void program(const std::string& name, const std::string& body) {
    const fs::path path = folder_ / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path) << "#!/bin/sh\n" << body;
    fs::permissions(path, fs::perms::owner_all);
  }
  // The exit status; what it printed is in printed_.
  int run(const std::string& parts, const std::string& tools = "") {
    const std::string at = folder_.string();
    const int status = std::system(
        ("PATH=" + tools + "/usr/bin:/bin PEERS_PYTHON=/bin/false COMMIT=c0ffee BIN=" + at +
         " OUT=" + at + "/out LOG=" + at + "/log bench/gpu.sh " + parts + " >" + at +
         "/printed 2>&1")
            .c_str());
    printed_ = read(folder_ / "printed");
    return WEXITSTATUS(status);
  }
  std::string section(const std::string& name) { return read(folder_ / "out" / name); }

  fs::path folder_ = fs::temp_directory_path() / ("gpu_script_" + std::to_string(getpid()));
  std::string printed_;
};

TEST_F(GpuScript, SaysThatThereIsNoGpuAndEndsWith2) {
  program("bench/cuda_kernels", "echo 'no NVIDIA driver on this machine' >&2; exit 2\n");
  for (const char* parts : {"", "test", "bench", "step", "peers"}) {
    EXPECT_EQ(run(parts), 2) << parts;
    EXPECT_EQ(printed_, "gpu: no NVIDIA driver on this machine; nothing was run\n");
  }
  EXPECT_TRUE(fs::is_empty(folder_ / "out"));
}

// A tool that says that something is not supported may have found something all the same.
TEST_F(GpuScript, WhatTheSanitizerFoundIsNotTakenForAToolThatDoesNotWork) {
  const auto sanitizer = [&](const std::string& body) {
    program("tools/compute-sanitizer", body);
    fs::remove_all(folder_ / "out");
    fs::create_directories(folder_ / "out");
    return run("test", folder_.string() + "/tools:");
  };
  EXPECT_EQ(sanitizer("echo '= Program hit CUDA_ERROR_NOT_SUPPORTED: operation not supported'\n"
                      "echo '= Invalid __global__ write of size 4 bytes'\n"
                      "echo '= ERROR SUMMARY: 7 errors'\nexit 9\n"),
            1);
  EXPECT_NE(printed_.find("found errors: ERROR SUMMARY: 7 errors"), std::string::npos) << printed_;
  EXPECT_EQ(sanitizer("echo '= Internal Sanitizer Error: device not supported'\nexit 3\n"), 0);
  EXPECT_NE(printed_.find("does not work here"), std::string::npos) << printed_;
  EXPECT_EQ(sanitizer("echo '= ERROR SUMMARY: 0 errors'\n"), 0);
}

TEST_F(GpuScript, TestsThatRanNothingAreAFailure) {
  program("cuda_tests", "true\n");
  EXPECT_EQ(run("test"), 1) << printed_;
  program("cuda_tests", "echo '0 passed, 0 failed, 900 skipped'\n");
  EXPECT_EQ(run("test"), 1) << printed_;
}

TEST_F(GpuScript, RefusesAPartThatItDoesNotKnowBeforeItRunsAny) {
  EXPECT_EQ(run("test bogus"), 1);
  EXPECT_NE(printed_.find("unknown part bogus"), std::string::npos) << printed_;
  EXPECT_EQ(printed_.find("== test"), std::string::npos) << printed_;
}

// The kit has what the tests on the device read: the folders that they name.
TEST_F(GpuScript, TheKitHoldsTheDataOfItsTests) {
  for (const char* name : {"graft", "cuda_tests", "bench/train_step", "bench/cuda_kernels",
                           "bench/cuda_ladder", "bench/gpu_results"})
    program(name, "true\n");
  const std::string kit = (folder_ / "kit").string();
  ASSERT_EQ(std::system(
                ("bench/pack.sh kit " + folder_.string() + " " + kit + " >/dev/null 2>&1").c_str()),
            0);
  for (const char* file :
       {"tests/golden/models/qwen3_tied/model.safetensors", "tests/golden/stacks/mixed_ranks.json",
        "tests/golden/adapters/patterns/adapter_model.safetensors",
        "tests/golden/quantised/base/model.safetensors",
        "tests/golden/trajectories/qdora/start/adapter_model.safetensors",
        "tests/golden/trajectories/qlora/golden.json", "bench/models/qwen3-4b.json"})
    EXPECT_TRUE(fs::exists(fs::path(kit) / file)) << file;
}

TEST_F(GpuScript, RecordsEveryPartWithCommitAndDevice) {
  EXPECT_EQ(run(""), 0) << printed_;
  for (const char* name : {"test", "bench", "step"}) {
    const std::string text = section(name);
    EXPECT_NE(text.find(std::string(name) + " c0ffee 2"), std::string::npos) << text;
    EXPECT_NE(text.find("\"gpu\": \"Fake GPU\""), std::string::npos) << text;
  }
  EXPECT_NE(section("test").find("\"what\": \"cuda_tests\", \"outcome\": \"3 passed, 0 failed, 1"),
            std::string::npos);
  EXPECT_NE(section("test").find("compute-sanitizer"), std::string::npos);
  for (const char* method : {"lora", "dora", "qlora"})
    for (const char* batch : {"8", "1"})
      EXPECT_EQ(count(section("step"),
                      std::string("--seq 2048 --batch ") + batch + " --method " + method + " "),
                4u);
  // Python has no torch: no rows, and a line that says so.
  EXPECT_FALSE(fs::exists(folder_ / "out" / "peers"));
  EXPECT_NE(printed_.find("no comparison: /bin/false has no torch"), std::string::npos) << printed_;
}

TEST_F(GpuScript, TakesGradientCheckpointingWhereMemoryDoesNotSuffice) {
  program("bench/train_step",
          "case \"$*\" in\n"
          "  *8b*--batch\\ 8*--checkpoint) echo \"{\\\"args\\\": \\\"$*\\\"}\" ;;\n"
          "  *8b*--batch\\ 8*) echo '{\"error\": \"out of memory: 1 MiB more\"}'; exit 1 ;;\n"
          "  *) echo \"{\\\"args\\\": \\\"$*\\\"}\" ;;\n"
          "esac\n");
  EXPECT_EQ(run("step"), 0) << printed_;
  EXPECT_EQ(count(section("step"), "out of memory"), 3u);  // of each method
  EXPECT_EQ(count(section("step"), "--checkpoint"), 3u);
}

TEST_F(GpuScript, EndsWith1WhereSomethingFailed) {
  program("cuda_tests", "echo 'a.cpp:3: Failure'; echo '2 passed, 1 failed, 0 skipped'; exit 1\n");
  EXPECT_EQ(run("test"), 1);
  EXPECT_NE(printed_.find("a.cpp:3: Failure"), std::string::npos) << printed_;
  EXPECT_NE(section("test").find("2 passed, 1 failed"), std::string::npos);
  program("bench/train_step", "echo '{\"error\": \"cuda: misaligned address\"}'; exit 1\n");
  EXPECT_EQ(run("step"), 1);
  EXPECT_EQ(run("nonsense"), 1);
}

TEST_F(GpuScript, StopsWhatTakesTooLong) {
  program("cuda_tests", "sleep 60\n");
  setenv("LIMIT", "6", 1);
  EXPECT_EQ(run("test"), 1);
  unsetenv("LIMIT");
  EXPECT_NE(section("test").find("not finished in time"), std::string::npos) << printed_;
}

}  // namespace
