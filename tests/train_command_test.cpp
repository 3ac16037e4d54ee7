// graft train as a process: exit statuses, one line for whatever goes wrong, Ctrl-C, limits of the
// machine, and that a run can be had again from what it wrote.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "tensor/check.h"
#include "tests/tiny_run.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

class TrainCommand : public TinyRun {
 protected:
  void SetUp() override {
    ASSERT_TRUE(fs::exists(binary())) << binary() << ": build it with make, or set GRAFT_BINARY";
    write_data("data.jsonl", 22);
    write("train.yaml",
          "model: model\ndata: data.jsonl\noutput_dir: out\nlearning_rate: 1e-2\nmax_steps: 6\n"
          "gradient_accumulation_steps: 4\nlora: {r: 4}\n");
  }
  // The command fails with one line on standard error that holds `expected`, and this status.
  void expect_error(const std::string& command, const std::string& expected, int status = 1) {
    const Outcome outcome = shell(command);
    EXPECT_EQ(outcome.status, status) << command;
    EXPECT_EQ(outcome.err.rfind("graft: error: ", 0), 0u) << command << ": " << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_NE(outcome.err.find(expected), std::string::npos)
        << command << "\n  got      " << outcome.err << "  expected " << expected;
  }
  // Starts graft train with these flags; waits until it has logged `lines` lines.
  pid_t start(std::vector<std::string> flags, const std::string& output_dir, int lines) {
    std::vector<std::string> args = {binary(), "train", path("train.yaml"), "--output-dir",
                                     path(output_dir)};
    args.insert(args.end(), flags.begin(), flags.end());
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
      if (!std::freopen(path("console.txt").c_str(), "w", stdout)) _exit(126);
      execv(argv[0], argv.data());
      _exit(127);
    }
    for (int i = 0; i < 3000; ++i) {
      const std::string text = read(output_dir + "/metrics.jsonl");
      if (fs::exists(path(output_dir + "/metrics.jsonl")) &&
          std::count(text.begin(), text.end(), '\n') >= lines)
        return pid;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    ADD_FAILURE() << "nothing was logged";
    return pid;
  }
};

TEST_F(TrainCommand, TrainsFromAFileWithOneLinePerStepInAPipe) {
  const Outcome outcome = shell("$GRAFT train train.yaml --max-steps 3");
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  EXPECT_NE(outcome.out.find("trainable params: "), std::string::npos);
  EXPECT_NE(outcome.out.find("\nstep 3/3 | loss "), std::string::npos);
  EXPECT_EQ(outcome.out.find('\r'), std::string::npos);
  EXPECT_TRUE(fs::exists(path("out/adapter_model.safetensors")));
  EXPECT_TRUE(fs::exists(path("out/adapter_config.json")));
  EXPECT_EQ(metrics("out").size(), 3u);
}

// Qwen3-4B's counts at r 16 and 32 are PEFT's; Llama-3.1-8B's follow from r times the sum of in and
// out over the seven projections of 32 layers.
TEST_F(TrainCommand, InfoPrintsTheRanksThatGuidesGive) {
  const auto info = [&](const std::string& model) {
    const Outcome outcome =
        shell("$GRAFT info " + fs::absolute("bench/models/" + model + ".json").string());
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return outcome.out;
  };
  const auto expect = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << "wanted: " << part << "\n" << text;
  };
  const std::string small = info("qwen3-4b"), large = info("llama-3.1-8b");
  expect(small, "guides give r 16 to 32 for 4.0 B parameters");
  expect(small, "\n    16         33030144   0.8145%");
  expect(small, "\n    32         66060288   1.6157%");
  expect(large, "guides give r 32 to 64 for 8.0 B parameters");
  const int64_t per_layer = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3,
                per_rank = 32 * per_layer;
  expect(large, concat("\n    32 ", std::string(8, ' '), 32 * per_rank));
  expect(large, concat("\n    64 ", std::string(7, ' '), 64 * per_rank));
}

TEST_F(TrainCommand, FlagsAloneAreEnough) {
  const Outcome outcome =
      shell("$GRAFT train --model model --data data.jsonl --output_dir flags --max-steps=2 --r 2");
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_NE(read("flags/adapter_config.json").find("\"base_model_name_or_path\": \"model\""),
            std::string::npos);
}

TEST_F(TrainCommand, TheResolvedConfigurationGivesTheSameBytesAgain) {
  ASSERT_EQ(shell("$GRAFT train train.yaml --seed 7 --eval-split 2").status, 0);
  ASSERT_EQ(shell("cd / && $GRAFT train '" + path("out/train_config.yaml") + "' --output-dir '" +
                  path("again") + "'")
                .status,
            0);
  EXPECT_TRUE(read("again/adapter_model.safetensors") == read("out/adapter_model.safetensors"));
  EXPECT_EQ(read("again/adapter_config.json"), read("out/adapter_config.json"));
}

TEST_F(TrainCommand, CtrlCFinishesTheStepSavesAndExitsWith130) {
  const std::string flags = " --max-steps 120";
  ASSERT_EQ(shell("$GRAFT train train.yaml --output-dir whole" + flags).status, 0);
  const pid_t pid = start({"--max-steps", "120"}, "out", 3);
  kill(pid, SIGINT);
  int status = 0;
  waitpid(pid, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 130);
  EXPECT_FALSE(fs::exists(path("out/adapter_model.safetensors")));
  const int64_t step = metrics("out").back()["step"];
  EXPECT_TRUE(fs::exists(path("out/checkpoint-" + std::to_string(step)))) << step;
  const Outcome resumed = shell("$GRAFT train train.yaml --resume" + flags);
  EXPECT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_NE(resumed.out.find("going on from"), std::string::npos) << resumed.out;
  EXPECT_TRUE(read("out/adapter_model.safetensors") == read("whole/adapter_model.safetensors"));
}

TEST_F(TrainCommand, TheSecondCtrlCEndsTheProcessAtOnce) {
  write_data("data.jsonl", 20000);  // one step of many seconds
  const pid_t pid = start({"--gradient-accumulation-steps", "20000"}, "out", 0);
  kill(pid, SIGINT);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  kill(pid, SIGINT);
  int status = 0;
  waitpid(pid, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGINT);
}

TEST_F(TrainCommand, UsageErrorsExitWith2) {
  expect_error("$GRAFT", "no command is given", 2);
  expect_error("$GRAFT trian", "unknown command 'trian'", 2);
  expect_error("$GRAFT train", "nothing to do", 2);
  expect_error("$GRAFT train train.yaml --lerning-rate 1", "did you mean --learning-rate?", 2);
  expect_error("$GRAFT train train.yaml --r 0", "--r: got '0', expected an integer from 1 up", 2);
  expect_error("$GRAFT train train.yaml --r", "", 2);
  expect_error("$GRAFT train a.yaml b.yaml", "unexpected argument 'b.yaml'", 2);
  EXPECT_EQ(shell("$GRAFT --help").status, 0);
  EXPECT_EQ(shell("$GRAFT train --help").status, 0);
  EXPECT_EQ(shell("$GRAFT --version").out.rfind("graft ", 0), 0u);
}

TEST_F(TrainCommand, BadInputIsOneLineAndNothingIsWritten) {
  expect_error("$GRAFT train missing.yaml", "missing.yaml: no such file");
  expect_error("$GRAFT train --model model --data data.jsonl", "output_dir is missing");
  expect_error("$GRAFT train --output-dir out --data data.jsonl", "model is missing");
  expect_error("$GRAFT train train.yaml --model no/such", "no/such");
  expect_error("$GRAFT train train.yaml --data missing.jsonl", "missing.jsonl: no such file");
  write("bad.yaml", "model: model\nmax_step: 3\n");
  expect_error("$GRAFT train bad.yaml",
               "bad.yaml:2: unknown key 'max_step'; did you mean max_steps?");
  write("bad.yaml", "seed: 1\nseed: 1\n");
  expect_error("$GRAFT train bad.yaml", "bad.yaml:2: key 'seed' is given twice");
  write("bad.yaml", "model: [\n");
  expect_error("$GRAFT train bad.yaml", "bad.yaml:");
  write("bad.jsonl", "{\"text\": \"a\"}\n{\"text\": }\n");
  expect_error("$GRAFT train train.yaml --data bad.jsonl", "bad.jsonl:2: not JSON");
  write("empty.jsonl", "");
  expect_error("$GRAFT train train.yaml --data empty.jsonl", "empty.jsonl: is empty");
  expect_error("$GRAFT train train.yaml --max-seq-length 4",
               "data.jsonl:1: no token of this row is trained");
  expect_error("$GRAFT train train.yaml --target-modules query", "query");
  expect_error("$GRAFT train train.yaml --adapter nowhere", "nowhere");
  EXPECT_FALSE(fs::exists(path("out")));
}

TEST_F(TrainCommand, ABrokenModelIsOneLineAndNothingIsWritten) {
  const std::string weights = read("model/model.safetensors"), config = read("model/config.json");
  write("model/model.safetensors", weights.substr(0, weights.size() / 2));
  expect_error("$GRAFT train train.yaml", "model.safetensors");
  fs::remove(path("model/model.safetensors"));
  expect_error("$GRAFT train train.yaml", "model.safetensors");
  write("model/model.safetensors", weights);
  auto json = nlohmann::json::parse(config);
  json["hidden_size"] = 64;
  write("model/config.json", json.dump());
  expect_error("$GRAFT train train.yaml", "");
  json["model_type"] = "gpt2";
  write("model/config.json", json.dump());
  expect_error("$GRAFT train train.yaml", "gpt2");
  write("model/config.json", config);
  fs::rename(path("model/tokenizer.json"), path("tokenizer.json"));
  expect_error("$GRAFT train train.yaml", "tokenizer.json");
  EXPECT_FALSE(fs::exists(path("out")));
}

TEST_F(TrainCommand, AnotherRunsOutputIsLeftUntouched) {
  ASSERT_EQ(shell("$GRAFT train train.yaml").status, 0);
  const std::string adapter = read("out/adapter_model.safetensors"),
                    log = read("out/metrics.jsonl");
  expect_error("$GRAFT train train.yaml --seed 3", "holds another run");
  expect_error("$GRAFT train train.yaml --output-dir data.jsonl", "is not a directory");
  EXPECT_TRUE(read("out/adapter_model.safetensors") == adapter);
  EXPECT_EQ(read("out/metrics.jsonl"), log);
}

// A limit on the size of files fails a write as a full disk does.
TEST_F(TrainCommand, AFullDiskIsOneLineAndLeavesOlderCheckpoints) {
  ASSERT_EQ(shell("$GRAFT train train.yaml --save-steps 3 --max-steps 3").status, 0);
  const std::string state = read("out/checkpoint-3/trainer_state.json");
  fs::remove(path("out/adapter_model.safetensors"));
  expect_error("ulimit -f 16; $GRAFT train train.yaml --save-steps 3 --max-steps 3 --resume",
               "adapter_model.safetensors");
  EXPECT_EQ(read("out/checkpoint-3/trainer_state.json"), state);
  EXPECT_FALSE(fs::exists(path("out/adapter_model.safetensors")));
  expect_error("ulimit -f 16; $GRAFT train train.yaml --save-steps 3 --output-dir full",
               "checkpoint: ");
  EXPECT_FALSE(fs::exists(path("full/checkpoint-3.tmp")));
  EXPECT_FALSE(fs::exists(path("full/checkpoint-3")));
}

TEST_F(TrainCommand, TooLittleMemoryForTheModelIsOneLine) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the address sanitizer needs terabytes of address space";
#endif
  auto json = nlohmann::json::parse(read("model/config.json"));
  json["intermediate_size"] = 1 << 22;
  write("model/config.json", json.dump());
  expect_error(
      "ulimit -v 600000; $GRAFT train --model model --data data.jsonl --output-dir out --method "
      "full --random-init",
      "memory");
  EXPECT_FALSE(fs::exists(path("out")));
}

// No limit is set: the kernel would let the memory be reserved, and end the process later.
TEST_F(TrainCommand, AModelLargerThanTheMachineIsOneLine) {
  auto json = nlohmann::json::parse(read("model/config.json"));
  json["intermediate_size"] = 1 << 30;
  json["num_hidden_layers"] = 100;  // 41 TB
  write("model/config.json", json.dump());
  expect_error(
      "$GRAFT train --model model --data data.jsonl --output-dir out --method full --random-init",
      "not enough memory");
  EXPECT_FALSE(fs::exists(path("out")));
}

}  // namespace
}  // namespace graft
