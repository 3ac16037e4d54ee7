// graft generate as it is called: the ids of the golden files, flags in both spellings, one line
// for what is wrong.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "models/adapter.h"
#include "models/generate.h"
#include "models/weights.h"
#include "train/commands.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Ids = std::vector<int32_t>;

// Standard output of a call.
std::string run(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "graft generate");
  std::vector<char*> pointers;
  for (std::string& argument : arguments) pointers.push_back(argument.data());
  testing::internal::CaptureStdout();
  try {
    EXPECT_EQ(generate_command(int(pointers.size()), pointers.data()), 0);
  } catch (...) {
    testing::internal::GetCapturedStdout();
    throw;
  }
  return testing::internal::GetCapturedStdout();
}

std::string refusal(const std::vector<std::string>& arguments) {
  try {
    run(arguments);
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_EQ(what.find('\n'), std::string::npos) << what;
    return what;
  }
  return "accepted";
}

std::string joined(const Ids& ids) {
  std::string text;
  for (const int32_t id : ids) text += (text.empty() ? "" : " ") + std::to_string(id);
  return text + "\n";
}

// The golden model llama_gqa (96 tokens) with a tokenizer in which id i is the character ' ' + i.
class GenerateCommand : public testing::Test {
 protected:
  GenerateCommand()
      : directory_(fs::temp_directory_path() / ("graft_command_" + std::to_string(getpid()))) {
    fs::remove_all(directory_);
    fs::create_directories(directory_);
    const fs::path golden = "tests/golden/models/llama_gqa";
    for (const char* file : {"config.json", "model.safetensors"})
      fs::copy_file(golden / file, directory_ / file);
    Json vocab = Json::object();
    for (int i = 0; i < 95; ++i) vocab[std::string(1, char(' ' + i))] = i;
    vocab["<end>"] = 95;
    const Json tokenizer = {
        {"version", "1.0"},
        {"truncation", nullptr},
        {"padding", nullptr},
        {"added_tokens", Json::array()},
        {"normalizer", nullptr},
        {"pre_tokenizer", nullptr},
        {"post_processor", nullptr},
        {"decoder", {{"type", "Fuse"}}},
        {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", Json::array()}}}};
    std::ofstream(directory_ / "tokenizer.json") << tokenizer.dump();
    const Json expected = Json::parse(std::ifstream(golden / "golden.json"));
    greedy_ids_ = expected["greedy_ids"].get<Ids>();
    prompt_ids_ = expected["greedy_prompt"].get<Ids>();
    for (const int32_t id : prompt_ids_) prompt_ += char(' ' + id);
  }
  ~GenerateCommand() override { fs::remove_all(directory_); }

  std::vector<std::string> with(const std::vector<std::string>& more) const {
    std::vector<std::string> arguments = {"--model", directory_.string(), "--prompt", prompt_};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  std::string count() const { return std::to_string(greedy_ids_.size()); }

  fs::path directory_;
  std::string prompt_;
  Ids prompt_ids_, greedy_ids_;
};

TEST_F(GenerateCommand, PrintsTheGreedyIdsOfTransformers) {
  const std::string wanted = joined(greedy_ids_);
  EXPECT_EQ(run(with({"--ids", "--temperature", "0", "--ignore-eos", "--max-new-tokens", count()})),
            wanted);
  // Greedy is the default where no generation_config.json asks for more.
  EXPECT_EQ(run(with({"--ids", "--max_new_tokens=" + count(), "--ignore_eos"})), wanted);
}

TEST_F(GenerateCommand, PrintsTheContinuationAsText) {
  std::string wanted;
  for (const int32_t id : greedy_ids_)
    wanted += id == 95 ? "<end>" : std::string(1, char(' ' + id));
  EXPECT_EQ(run(with({"--max-new-tokens", count(), "--ignore-eos"})), wanted + "\n");
}

TEST_F(GenerateCommand, TakesAPromptThatStartsWithDashes) {
  EXPECT_EQ(run({"--prompt", "--x_y", "--model", directory_.string(), "--max-new-tokens", "3"}),
            run({"--prompt=--x_y", "--model", directory_.string(), "--max-new-tokens", "3"}));
}

TEST_F(GenerateCommand, StopsAtTheEosOfTheGenerationConfigUnlessTold) {
  std::ofstream(directory_ / "generation_config.json")
      << Json{{"eos_token_id", {greedy_ids_[2]}}}.dump();
  Ids until = greedy_ids_;
  until.resize(size_t(std::find(until.begin(), until.end(), until[2]) - until.begin()) + 1);
  EXPECT_EQ(run(with({"--ids", "--max-new-tokens", count()})), joined(until));
  EXPECT_EQ(run(with({"--ids", "--max-new-tokens", count(), "--ignore-eos"})), joined(greedy_ids_));
}

TEST_F(GenerateCommand, SamplesFromTheSeed) {
  const auto sample = [&](const char* seed) {
    return run(with({"--ids", "--temperature", "2", "--seed", seed, "--threads", "1"}));
  };
  EXPECT_EQ(sample("1"), sample("1"));
  EXPECT_NE(sample("1"), sample("2"));
  EXPECT_EQ(run(with({"--ids", "--temperature", "2", "--top-k", "1", "--ignore-eos",
                      "--max-new-tokens", count()})),
            joined(greedy_ids_));
}

TEST_F(GenerateCommand, PutsAnAdapterOnTheModel) {
  const std::string adapter = "tests/golden/adapters/llama_gqa";
  if (!fs::exists(adapter)) GTEST_SKIP() << adapter << " is not there";
  const auto model = load_model(directory_.string());
  load_adapter(*model, adapter);
  GenerationConfig config;
  config.do_sample = false;
  config.max_new_tokens = 24;
  const Ids wanted = generate(*model, prompt_ids_, config);
  EXPECT_NE(wanted, greedy_ids_);
  EXPECT_EQ(run(with({"--ids", "--adapter", adapter, "--max-new-tokens", "24", "--ignore-eos"})),
            joined(wanted));
}

TEST_F(GenerateCommand, SaysInOneLineWhatIsWrong) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"--temperature", "-1"}, "--temperature is '-1'"},
      {{"--temperature", "warm"}, "--temperature is 'warm'"},
      {{"--temperature", "nan"}, "--temperature is 'nan'"},
      {{"--top-p", "1.5"}, "--top-p is '1.5'"},
      {{"--min-p", "0.1x"}, "--min-p is '0.1x'"},
      {{"--top-k", "1.5"}, "--top-k is '1.5'"},
      {{"--seed", "99999999999999999999"}, "--seed is '99999999999999999999'"},
      {{"--max-new-tokens", "0"}, "--max-new-tokens is '0'"},
      {{"--repetition-penalty", "0"}, "--repetition-penalty is 0"},
      {{"--threads", "0"}, "--threads is '0'"},
      {{"--dtype", "int8"}, "--dtype is 'int8'"},
      {{"--adapter", "nowhere"}, "nowhere"},
      {{"--bogus", "1"}, "bogus"},
      {{"more"}, "unexpected argument 'more'"}};
  for (const auto& [flags, part] : cases) {
    const std::string got = refusal(with(flags));
    EXPECT_NE(got.find(part), std::string::npos) << got;
  }
  EXPECT_NE(refusal({"--prompt", "x"}).find("--model DIR is missing"), std::string::npos);
  EXPECT_NE(refusal({"--model", "x"}).find("--prompt"), std::string::npos);
  EXPECT_NE(refusal({"--model", directory_.string(), "--prompt", ""}).find("no tokens"),
            std::string::npos);
  EXPECT_NE(refusal({"--model", "a/b", "--prompt", "x"}).find("a/b: no such directory"),
            std::string::npos);
}

TEST(GenerateCommandOnStories260K, PrintsTheGoldenText) {
  const char* given = std::getenv("GRAFT_SHARED_DATA");
  const fs::path directory = fs::path(given ? given : "../shared/data") / "stories260K";
  if (!fs::exists(directory)) GTEST_SKIP() << directory << " is not there";
  const Json golden = Json::parse(std::ifstream(directory / "golden.json"));
  const std::string prompt = golden["prompt"], text = golden["greedy_text"];
  EXPECT_EQ(prompt + run({"--model", directory.string(), "--prompt", prompt, "--temperature", "0",
                          "--max-new-tokens", "64"}),
            text + "\n");
  EXPECT_EQ(run({"--model", directory.string(), "--prompt", prompt, "--temperature", "0",
                 "--max-new-tokens", "64", "--ids"}),
            joined(golden["greedy_ids"].get<Ids>()));
}

}  // namespace
}  // namespace graft
