// Training checkpoints: whole or passed over, never half believed.
#include "train/checkpoint.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "tensor/safetensors.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

class TrainCheckpoint : public testing::Test {
 protected:
  TrainCheckpoint() {
    folder_ = fs::temp_directory_path() / ("graft_checkpoint_" + std::to_string(getpid()));
    fs::create_directories(folder_);
  }
  ~TrainCheckpoint() override { fs::remove_all(folder_); }

  static ParameterBuffer buffer() {
    std::vector<std::pair<std::string, Variable>> leaves;
    leaves.emplace_back("a", Variable(Tensor::from_floats({3}, {1, 2, 3}, DType::F32), true));
    return {leaves, Device::CPU, Scope::Adapters};
  }
  static TrainerState state(int64_t step) {
    TrainerState s;
    s.step = step;
    s.epoch = 2;
    s.position = 5;
    s.num_tokens = 100;
    s.num_label_tokens = 90;
    s.unlogged_loss = 0.1;
    s.unlogged_label_tokens = 7;
    s.first_eval_loss = 1.0 / 3;
    s.last_eval_step = 4;
    s.result_keys = {{"learning_rate", "0.1"}, {"seed", "1"}};
    return s;
  }
  std::string save(int64_t step, ParameterBuffer& parameters, int64_t limit = 0) {
    return save_checkpoint(folder_, state(step), parameters, limit, [](const std::string& folder) {
      write_file_atomically(folder + "/adapter_config.json", "{}");
    });
  }
  std::optional<std::string> newest() {
    said_.clear();
    return newest_checkpoint(folder_, [&](const std::string& text) { said_.push_back(text); });
  }
  std::string path(const std::string& name) { return folder_ / name; }

  fs::path folder_;
  std::vector<std::string> said_;
};

TEST_F(TrainCheckpoint, GivesBackStateAndOptimizer) {
  ParameterBuffer parameters = buffer();
  for (int i = 0; i < 3; ++i) {
    parameters.m().data<float>()[i] = float(i) / 3;
    parameters.v().data<float>()[i] = float(i) / 7;
  }
  EXPECT_EQ(save(12, parameters), path("checkpoint-12"));
  ParameterBuffer other = buffer();
  other.values().data<float>()[1] = 99;
  load_optimizer(other, path("checkpoint-12"));
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(other.values().data<float>()[i], float(i + 1));
    EXPECT_EQ(other.m().data<float>()[i], float(i) / 3);
    EXPECT_EQ(other.v().data<float>()[i], float(i) / 7);
  }
  const TrainerState loaded = load_trainer_state(path("checkpoint-12")), saved = state(12);
  EXPECT_EQ(loaded.step, saved.step);
  EXPECT_EQ(loaded.epoch, saved.epoch);
  EXPECT_EQ(loaded.position, saved.position);
  EXPECT_EQ(loaded.num_tokens, saved.num_tokens);
  EXPECT_EQ(loaded.num_label_tokens, saved.num_label_tokens);
  EXPECT_EQ(loaded.unlogged_loss, saved.unlogged_loss);
  EXPECT_EQ(loaded.unlogged_label_tokens, saved.unlogged_label_tokens);
  EXPECT_EQ(loaded.first_eval_loss, saved.first_eval_loss);
  EXPECT_EQ(loaded.last_eval_loss, saved.last_eval_loss);
  EXPECT_EQ(loaded.last_eval_step, saved.last_eval_step);
  EXPECT_EQ(loaded.result_keys, saved.result_keys);
}

TEST_F(TrainCheckpoint, TheNewestIsThatOfTheHighestStep) {
  ParameterBuffer parameters = buffer();
  EXPECT_FALSE(newest());
  save(9, parameters);
  save(10, parameters);
  fs::create_directories(path("checkpoint-best"));
  EXPECT_EQ(newest(), path("checkpoint-10"));
  EXPECT_TRUE(said_.empty());
}

TEST_F(TrainCheckpoint, TornOnesArePassedOverWithALine) {
  ParameterBuffer parameters = buffer();
  for (int64_t step : {1, 2, 3, 4, 5}) save(step, parameters);
  fs::resize_file(path("checkpoint-5/optimizer.safetensors"), 50);  // truncated
  fs::remove(path("checkpoint-4/adapter_config.json"));             // missing
  fs::remove(path("checkpoint-3/trainer_state.json"));
  {
    std::fstream file(path("checkpoint-2/optimizer.safetensors"),  // one byte changed
                      std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-1, std::ios::end);
    file.put(char(0x55));
  }
  fs::create_directories(path("checkpoint-6.tmp"));
  EXPECT_EQ(newest(), path("checkpoint-1"));
  ASSERT_EQ(said_.size(), 5u);
  EXPECT_EQ(said_[0], "resume: passing over checkpoint-6.tmp: it was never finished");
  EXPECT_EQ(said_[1],
            "resume: passing over checkpoint-5: optimizer.safetensors has 50 of " +
                std::to_string(fs::file_size(path("checkpoint-1/optimizer.safetensors"))) +
                " bytes");
  EXPECT_EQ(said_[2], "resume: passing over checkpoint-4: adapter_config.json is missing");
  EXPECT_NE(said_[3].find("trainer_state.json: is missing"), std::string::npos) << said_[3];
  EXPECT_EQ(said_[4], "resume: passing over checkpoint-2: optimizer.safetensors is damaged");
}

TEST_F(TrainCheckpoint, OnlyTheNewestAreKept) {
  ParameterBuffer parameters = buffer();
  for (int64_t step : {8, 9, 10, 11}) save(step, parameters, /*limit=*/2);
  EXPECT_FALSE(fs::exists(path("checkpoint-8")));
  EXPECT_FALSE(fs::exists(path("checkpoint-9")));
  EXPECT_TRUE(fs::exists(path("checkpoint-10")));
  EXPECT_TRUE(fs::exists(path("checkpoint-11")));
}

// A torn one with a higher number once took the place of the one just written.
TEST_F(TrainCheckpoint, TornOnesDoNotCountTowardsTheLimit) {
  ParameterBuffer parameters = buffer();
  save(8, parameters, 1);
  fs::copy(path("checkpoint-8"), path("checkpoint-150"), fs::copy_options::recursive);
  fs::resize_file(path("checkpoint-150/optimizer.safetensors"), 20);
  save(14, parameters, 1);
  EXPECT_EQ(newest(), path("checkpoint-14"));
  EXPECT_FALSE(fs::exists(path("checkpoint-8")));
}

TEST_F(TrainCheckpoint, AStateThatIsNotWholeIsPassedOver) {
  ParameterBuffer parameters = buffer();
  save(8, parameters);
  save(9, parameters);
  for (const char* text :
       {R"({"step":9,"files":{"adapter_config.json":{}}})", R"({"step":9,"files":{}})",
        R"({"step":9,"files":[]})", R"({"files":{"adapter_config.json":3}})", "[]", ""}) {
    std::ofstream(path("checkpoint-9/trainer_state.json")) << text;
    EXPECT_EQ(newest(), path("checkpoint-8")) << text;
    ASSERT_EQ(said_.size(), 1u) << text;
    EXPECT_EQ(said_[0].find("json.exception"), std::string::npos) << said_[0];
  }
}

TEST_F(TrainCheckpoint, AFailureLeavesOlderOnesAndNothingBesides) {
  ParameterBuffer parameters = buffer();
  save(1, parameters);
  EXPECT_THROW(save_checkpoint(folder_, state(2), parameters, 1,
                               [](const std::string& folder) {
                                 write_file_atomically(folder + "/half", "x");
                                 fail("no space left on device");
                               }),
               Error);
  EXPECT_EQ(newest(), path("checkpoint-1"));
  EXPECT_TRUE(said_.empty());
  EXPECT_FALSE(fs::exists(path("checkpoint-2.tmp")));
}

TEST_F(TrainCheckpoint, AnotherRunIsRefusedByTheKeysThatDiffer) {
  try {
    check_same_run(state(1), {{"learning_rate", "0.2"}, {"seed", "1"}}, "out/checkpoint-1");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "resume: out/checkpoint-1 belongs to another run: learning_rate (was 0.1, now "
                 "0.2); set them back, or train into another output_dir");
  }
  EXPECT_NO_THROW(check_same_run(state(1), state(2).result_keys, "x"));
}

TEST_F(TrainCheckpoint, ParametersOfAnotherNumberAreRefused) {
  ParameterBuffer parameters = buffer();
  save(1, parameters);
  std::vector<std::pair<std::string, Variable>> leaves;
  leaves.emplace_back("a", Variable(Tensor::zeros({40}, DType::F32), true));
  ParameterBuffer other(leaves, Device::CPU, Scope::Adapters);
  EXPECT_THROW(load_optimizer(other, path("checkpoint-1")), Error);
}

}  // namespace
}  // namespace graft
