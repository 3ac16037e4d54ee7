// A model directory small enough to train in a moment, complete with a tokenizer, and the graft
// binary run on it.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

namespace graft {

// A folder of its own for each test, gone afterwards. model() is tests/golden/models/qwen3_tied
// with a byte-level tokenizer of the 95 printable characters and <eos>: its 96 ids.
class TinyRun : public testing::Test {
 protected:
  TinyRun() {
    folder_ = std::filesystem::temp_directory_path() /
              ("graft_tiny_" + std::to_string(getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(folder_ / "model");
    for (const auto& entry : std::filesystem::directory_iterator("tests/golden/models/qwen3_tied"))
      std::filesystem::copy(entry.path(), folder_ / "model" / entry.path().filename());
    write("model/tokenizer.json", tokenizer().dump());
    write("model/tokenizer_config.json", R"({"eos_token": "<eos>"})");
  }
  ~TinyRun() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ / name; }
  std::string model() const { return path("model"); }
  void write(const std::string& name, const std::string& text) const {
    std::filesystem::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }
  std::string read(const std::string& name) const {
    std::ifstream file(folder_ / name, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
  }
  std::vector<nlohmann::json> metrics(const std::string& output_dir) const {
    std::vector<nlohmann::json> lines;
    std::istringstream text(read(output_dir + "/metrics.jsonl"));
    for (std::string line; std::getline(text, line);) lines.push_back(nlohmann::json::parse(line));
    return lines;
  }
  // Rows that have something to learn in them, of unequal length.
  void write_data(const std::string& name, int rows) const {
    std::string text;
    for (int i = 0; i < rows; ++i) {
      const std::string word(size_t(1 + i % 7), char('a' + i % 26));
      text +=
          nlohmann::json{{"prompt", "say " + word + ":"}, {"completion", " " + word + "!"}}.dump() +
          "\n";
    }
    write(name, text);
  }

  static std::string binary() {
    const char* given = std::getenv("GRAFT_BINARY");
    return std::filesystem::absolute(given ? given : "build/graft");
  }
  struct Outcome {
    int status;
    std::string out, err;
  };
  // Runs a shell command in which $GRAFT is the binary; the working directory is the test's folder.
  Outcome shell(const std::string& command) const {
    const std::string line = "cd '" + folder_.string() + "' && GRAFT='" + binary() + "' && (" +
                             command + ") >stdout.txt 2>stderr.txt";
    const int status = std::system(line.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), read("stdout.txt"),
            read("stderr.txt")};
  }

  std::filesystem::path folder_;

 private:
  static nlohmann::json tokenizer() {
    nlohmann::json vocab;
    for (int c = 32; c < 127; ++c)
      vocab[c == 32 ? std::string("\xC4\xA0") : std::string(1, char(c))] = c - 32;
    return {{"version", "1.0"},
            {"added_tokens",
             {{{"id", 95},
               {"content", "<eos>"},
               {"single_word", false},
               {"lstrip", false},
               {"rstrip", false},
               {"normalized", false},
               {"special", true}}}},
            {"normalizer", nullptr},
            {"pre_tokenizer",
             {{"type", "ByteLevel"},
              {"add_prefix_space", false},
              {"trim_offsets", true},
              {"use_regex", true}}},
            {"post_processor", nullptr},
            {"decoder",
             {{"type", "ByteLevel"},
              {"add_prefix_space", true},
              {"trim_offsets", true},
              {"use_regex", true}}},
            {"model",
             {{"type", "BPE"},
              {"dropout", nullptr},
              {"unk_token", nullptr},
              {"continuing_subword_prefix", nullptr},
              {"end_of_word_suffix", nullptr},
              {"fuse_unk", false},
              {"byte_fallback", false},
              {"vocab", vocab},
              {"merges", nlohmann::json::array()}}}};
  }
};

}  // namespace graft
