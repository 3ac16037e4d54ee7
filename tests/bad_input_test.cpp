// Bad input, at the level of the binary: each case ends with a status that is not zero and one line
// that names the file and what is wrong, and every file that was there has the bytes it had.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>

#include "tests/tiny_run.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

class BadInput : public TinyRun {
 protected:
  void SetUp() override {
    ASSERT_TRUE(fs::exists(binary())) << binary() << ": build it with make, or set GRAFT_BINARY";
    write_data("data.jsonl", 22);
    write("train.yaml", kOptions);
    for (const char* name : {"adapter_config.json", "adapter_model.safetensors"}) {
      fs::create_directories(path("adapter"));
      fs::copy(std::string("tests/golden/adapters/qwen3_tied/") + name, path("adapter"));
    }
  }

  // Every path below the folder with its bytes, the output of the last command aside.
  std::map<std::string, std::string> snapshot() const {
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::recursive_directory_iterator(folder_)) {
      const std::string name = fs::relative(entry.path(), folder_);
      if (name == "stdout.txt" || name == "stderr.txt") continue;
      files[name] = entry.is_regular_file() ? read(name) : "";
    }
    return files;
  }
  void refused(const std::string& command, const std::vector<std::string>& expected) {
    const auto before = snapshot();
    const Outcome outcome = shell("timeout 60 $GRAFT " + command);
    EXPECT_TRUE(outcome.status == 1 || outcome.status == 2)
        << command << " ended with " << outcome.status << ": " << outcome.err;
    EXPECT_EQ(outcome.err.rfind("graft: error: ", 0), 0u) << command << ": " << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    for (const std::string& part : expected)
      EXPECT_NE(outcome.err.find(part), std::string::npos)
          << command << "\n  got      " << outcome.err << "  expected " << part;
    EXPECT_TRUE(snapshot() == before) << command << ": files were changed";
  }
  // The same with a file that holds something else for a moment.
  void refused_with(const std::string& name, const std::string& text, const std::string& command,
                    const std::vector<std::string>& expected) {
    const bool existed = fs::exists(path(name));
    const std::string before = existed ? read(name) : "";
    write(name, text);
    refused(command, expected);
    existed ? write(name, before) : void(fs::remove(path(name)));
  }
  void refused_config(const std::string& key, const Json& value,
                      const std::vector<std::string>& expected) {
    Json config = Json::parse(read("model/config.json"));
    if (value.is_discarded())
      config.erase(key);
    else
      config[key] = value;
    refused_with("model/config.json", config.dump(), kGenerate, expected);
  }
  // A safetensors file with another header, or more data.
  std::string edited(const std::string& name, const std::function<void(Json&)>& edit,
                     const std::string& more = "") const {
    const std::string bytes = read(name);
    uint64_t length;
    std::memcpy(&length, bytes.data(), 8);
    Json header = Json::parse(bytes.substr(8, length));
    edit(header);
    return with_header(header.dump(), bytes.substr(8 + length) + more);
  }
  static std::string with_header(const std::string& header, const std::string& data) {
    const uint64_t length = header.size();
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    return bytes + header + data;
  }

  static constexpr const char* kOptions =
      "model: model\ndata: data.jsonl\noutput_dir: out\nmax_steps: 2\n";
  static constexpr const char* kGenerate =
      "generate --model model --prompt hello --max-new-tokens 2";
  static constexpr const char* kWeights = "model/model.safetensors";
  static constexpr const char* kNorm = "model.layers.0.input_layernorm.weight";
};

TEST_F(BadInput, SafetensorsFilesThatAreTornOrNoneAreRefused) {
  const std::string bytes = read(kWeights), file = kWeights;
  const auto refuse = [&](const std::string& text, const std::string& expected) {
    refused_with(kWeights, text, kGenerate, {file, expected});
  };
  refuse("", "truncated: 0 bytes");
  refuse(bytes.substr(0, 7), "truncated: 7 bytes");
  refuse(bytes.substr(0, 200), "but the file has 200");
  refuse(bytes.substr(0, bytes.size() - 1), "it is truncated, download it again");
  refuse(bytes + "x", "bytes of data");
  refuse(std::string(8, '\xff') + bytes.substr(8), "the header should have 18446744073709551615");
  refuse(with_header("{\"a\": ", bytes), "the header is not JSON");
  refuse(with_header(std::string(1000000, '['), bytes), "the header is not JSON");
  refuse(with_header("[1]", ""), "the header is not a JSON object");
  refused_with(kWeights, bytes.substr(0, bytes.size() - 1), "train train.yaml", {file});
  fs::remove(path(kWeights));
  refused(kGenerate, {"model", "neither model.safetensors nor"});
}

TEST_F(BadInput, TensorsThatDoNotFitTheFileOrTheModelAreRefused) {
  const std::string file = kWeights, norm = kNorm;
  const auto refuse = [&](const std::function<void(Json&)>& edit, const std::string& expected,
                          const std::string& more = "") {
    refused_with(kWeights, edited(kWeights, edit, more), kGenerate, {expected});
  };
  const auto set = [&](const char* key, const Json& value) {
    return [=](Json& header) { header[kNorm][key] = value; };
  };
  refuse([](Json& h) { h[kNorm]["data_offsets"] = h["model.norm.weight"]["data_offsets"]; }, file);
  refuse(set("data_offsets", {1 << 30, (1 << 30) + 128}), file);
  refuse(set("data_offsets", {-128, 0}), "wanted begin <= end");
  refuse(set("data_offsets", {1.5, 1e30}), "wanted begin <= end");
  refuse(set("dtype", "F99"), "unknown dtype 'F99'");
  refuse(set("dtype", "I32"), "graft reads F32, BF16 and F16");
  refuse(set("dtype", 3), "no dtype");
  refuse(set("shape", {-32}), "wanted whole numbers from 0");
  refuse(set("shape", {int64_t(1) << 62, int64_t(1) << 62}), "wanted whole numbers from 0");
  refuse(set("shape", {32, 1}), "config.json implies (32)");
  refuse([](Json& h) { h.erase(kNorm); }, file);
  refuse([](Json& h) { h["x"] = h[kNorm], h.erase(kNorm); }, norm + "' is missing");
  refuse(
      [](Json& h) {
        int64_t end = 0;
        for (const auto& [name, entry] : h.items())
          if (name != "__metadata__") end = std::max(end, int64_t(entry["data_offsets"][1]));
        h["extra"] = {{"dtype", "F32"}, {"shape", {1}}, {"data_offsets", {end, end + 4}}};
      },
      "'extra' has no place in the model", "\1\1\1\1");
  for (const float value : {NAN, std::numeric_limits<float>::infinity()}) {
    std::string bytes = read(kWeights);
    std::memcpy(bytes.data() + bytes.size() - 4, &value, 4);
    refused_with(kWeights, bytes, kGenerate, {file, "holds NaN or infinity"});
    refused_with(kWeights, bytes, "train train.yaml", {file, "holds NaN or infinity"});
  }
}

TEST_F(BadInput, ShardsThatAreMissingOrElsewhereAreRefused) {
  fs::remove_all(path("model"));
  fs::create_directories(path("model"));
  for (const auto& entry : fs::directory_iterator("tests/golden/models/llama_mha"))
    fs::copy(entry.path(), path("model"));
  write("model/tokenizer.json", R"({"model": {"type": "BPE", "vocab": {"h": 0}, "merges": []}})");
  const std::string index = "model/model.safetensors.index.json",
                    shard = "model/model-00002-of-00003.safetensors";
  const auto refuse = [&](const Json& place, const std::string& expected) {
    Json json = Json::parse(read(index));
    json["weight_map"]["lm_head.weight"] = place;
    refused_with(index, json.dump(), kGenerate, {expected});
  };
  refuse("../model/model-00001-of-00003.safetensors", "wanted a name in the same directory");
  refuse("/etc/passwd", index);
  refuse("none.safetensors", "model/none.safetensors: this shard is missing");
  refuse(3, "gives no file name for tensor 'lm_head.weight'");
  refused_with(index, "{", kGenerate, {index + ": not JSON"});
  refused_with(index, "{}", kGenerate, {index + ": weight_map is missing"});
  refused_with(shard, "abc", kGenerate, {shard + ": truncated"});
  fs::remove(path(shard));
  refused(kGenerate, {shard + ": this shard is missing"});
}

TEST_F(BadInput, ConfigsWithoutAKeyOrWithAnAbsurdOneAreRefused) {
  const std::string file = "model/config.json";
  const Json gone(Json::value_t::discarded);
  refused_with(file, "", kGenerate, {file + ": is empty"});
  refused_with(file, "{", kGenerate, {file + ": not JSON"});
  refused_with(file, "[]", kGenerate, {file + ": not a JSON object"});
  refused_with(file, std::string(1000000, '['), kGenerate, {file + ": not JSON"});
  for (const char* key : {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                          "intermediate_size"}) {
    refused_config(key, gone, {file, std::string(key) + " is missing"});
    for (const Json& value : {Json(0), Json(-1), Json(1e30), Json("x"), Json(1.5), Json(true)})
      refused_config(key, value, {file, key});
    refused_config(key, 2147483647, {"model/"});  // the shape of the weights, or a bound
  }
  refused_config("num_key_value_heads", 3, {file, "num_key_value_heads"});
  refused_config("rms_norm_eps", -1, {file, "rms_norm_eps"});
  refused_config("rope_theta", 0, {file, "rope_theta"});
  refused_config("tie_word_embeddings", "yes", {file, "tie_word_embeddings"});
  refused_config("hidden_act", "gelu", {file, "'gelu' is not supported"});
  refused_config("model_type", "gpt2", {file, "gpt2"});
  refused_config("quantization_config", Json::object(), {file, "quantised"});
  const auto rope = [&](const Json& value, const std::string& expected) {
    refused_config("rope_parameters", value, {file, expected});
  };
  rope({{"rope_type", "longrope"}}, "'longrope' is not supported");
  rope({{"rope_type", "linear"}}, "factor is missing");
  rope({{"rope_type", "linear"}, {"factor", 0}}, "factor is 0");
  rope({{"rope_type", 3}}, "rope_type");
  Json config = Json::parse(read(file));
  config["use_sliding_window"] = true;
  config["sliding_window"] = 16;
  config["max_window_layers"] = 0;
  refused_with(file, config.dump(), kGenerate, {file, "sliding windows are not supported"});
  fs::remove(path(file));
  refused(kGenerate, {"model: no config.json there"});
  refused("info model", {"model: no config.json there"});
}

TEST_F(BadInput, TokenizersThatAreBrokenOrOfAnotherKindAreRefused) {
  const std::string file = "model/tokenizer.json", command = "tokenize --model model hello";
  refused_with(file, "", command, {file});
  refused_with(file, "{}", command, {file, "'model' is missing"});
  const auto refuse = [&](const char* part, const Json& value, const std::string& expected,
                          const std::string& run = "") {
    Json json = Json::parse(read(file));
    json[Json::json_pointer(part)] = value;
    refused_with(file, json.dump(), run.empty() ? command : run, {expected});
  };
  refuse("/model/type", "WordPiece", "WordPiece");
  refuse("/model/type", "Unigram", "Unigram");
  refuse("/model/vocab", 3, file);
  refuse("/model/vocab", {{"a", -1}}, file);
  refuse("/model/merges", {"zz q"}, "is not in the vocabulary");
  refuse("/pre_tokenizer", {{"type", "Nope"}}, "Nope");
  refuse("/decoder", {{"type", "Nope"}}, "Nope");
  refuse("/normalizer", {{"type", "Nope"}}, "Nope");
  refuse("/model/vocab/h", 150, "vocabulary of 96", kGenerate);
  refuse("/model/vocab/s", 150, "150", "train train.yaml");
  refused_with("model/tokenizer_config.json", "{", "train train.yaml", {"tokenizer_config.json"});
  refused_with("model/tokenizer_config.json", "{}", "train train.yaml", {"no eos_token"});
}

TEST_F(BadInput, DataThatCannotBeTrainedOnIsRefusedWithItsLine) {
  std::string good = "{\"text\": \"hello\"}\n";
  const auto refuse = [&](const std::string& line, const std::string& expected) {
    refused_with("bad.jsonl", good + line + "\n", "train train.yaml --data bad.jsonl",
                 {"bad.jsonl:2: ", expected});
  };
  refuse("{\"text\": ", "not JSON");
  refuse("\xff", "not JSON");
  refuse("{\"text\": \"\xff\"}", "not JSON");
  refuse("{\"text\": \"a \\ud83d b\"}", "half a surrogate pair (byte 19)");
  refuse("[1]", "got array, expected an object");
  refuse("{\"text\": 3}", "text: got number, expected a string");
  refuse("{\"text\": \"a\", \"prompt\": \"b\"}", "leave one of the two");
  refuse("{\"messages\": []}", "neither text nor prompt");
  refuse("{\"text\": \"\"}", "the row is empty");
  good = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
  refuse("{\"prompt\": \"b\"}", "completion is missing");
  refuse("{\"prompt\": [], \"completion\": \"a\"}", "prompt: got array");
  refuse("{\"prompt\": \"" + std::string(2000, 'a') + "\", \"completion\": \"b\"}",
         "raise max_seq_length");
  for (const char* text : {"", "\n \n"})
    refused_with("bad.jsonl", text, "train train.yaml --data bad.jsonl", {"bad.jsonl: is empty"});
  refused_with("bad.txt", "", "train train.yaml --data bad.txt", {"bad.txt: is empty"});
  refused_with("bad.csv", "a", "train train.yaml --data bad.csv", {"bad.csv: unknown kind"});
  refused("train train.yaml --data no/such.jsonl", {"no/such.jsonl: no such file"});
  refused("train train.yaml --data adapter", {"adapter: no .txt or .jsonl file"});
  refused("train train.yaml --eval-split 22", {"eval_split"});
  refused("train train.yaml --eval-split 1e30", {"eval_split"});
}

TEST_F(BadInput, OptionsThatAreUnknownDoubledOrOutOfRangeAreRefused) {
  const auto refuse = [&](const std::string& lines, const std::string& expected) {
    refused_with("bad.yaml", kOptions + lines, "train bad.yaml", {"bad.yaml:5: ", expected});
  };
  refuse("learning_rat: 1\n", "did you mean learning_rate?");
  refuse("lora: {lora_alfa: 1}\n", "did you mean lora_alpha?");
  refuse("lora: {r: 1, r: 2}\n", "key 'r' is given twice");
  refuse("max_steps: 3\n", "given twice");
  refuse("lora: {r: 0}\n", "r: got '0'");
  refuse("lora: &a {r: *a}\n", "r: got a map");
  refuse("target_modules: &x [*x]\n", "target_modules: got a list");
  refuse("seed: [x", "not YAML");
  refuse("resume: 3\n", "expected true or false");
  refuse("dtype: int8\n", "dtype");
  for (const char* text : {"- a\n", "hello", "--- {seed: 1}\n--- {seed: 2}\n"})
    refused_with("bad.yaml", text, "train bad.yaml", {"bad.yaml: "});
  refused_with("bad.yaml", kOptions + std::string("lora: {r: 1}\nlora_alpha: 2\n"),
               "train bad.yaml", {"bad.yaml:6: ", "put all LoRA keys in one place"});
  refused_with("bad.yaml", kOptions + std::string("lora:\n\tr: 2\n"), "train bad.yaml",
               {"bad.yaml:6: not YAML"});
  for (const char* key : {"learning_rate",
                          "num_epochs",
                          "per_device_train_batch_size",
                          "gradient_accumulation_steps",
                          "max_seq_length",
                          "warmup_steps",
                          "warmup_ratio",
                          "min_lr_ratio",
                          "weight_decay",
                          "adam_beta1",
                          "adam_beta2",
                          "adam_epsilon",
                          "max_grad_norm",
                          "eval_split",
                          "eval_steps",
                          "save_steps",
                          "save_total_limit",
                          "logging_steps",
                          "threads",
                          "seed",
                          "r",
                          "lora_alpha",
                          "lora_dropout"})
    for (const char* value : {"-1", ".nan", "x", "[]", "\"1\"", "1e400"})
      refuse(std::string(key) + ": " + value + "\n", std::string(key) + ": got ");
  for (const char* key : {"per_device_train_batch_size", "gradient_accumulation_steps", "r",
                          "max_seq_length", "save_steps"})
    refuse(std::string(key) + ": 9223372036854775807\n", "below 2^31");
  refuse("num_epochs: 1e30\n", "at most 1e6");
  refused("train train.yaml --target-modules query", {"(query) matches no module", "q_proj"});
  refused("train train.yaml --layers-to-transform 99", {"the layers of the model are 0 to 1"});
}

TEST_F(BadInput, AdaptersThatDoNotFitAreNeverHalfLoaded) {
  const std::string command = std::string(kGenerate) + " --adapter adapter",
                    config = "adapter/adapter_config.json",
                    weights = "adapter/adapter_model.safetensors";
  const auto refuse = [&](const char* key, const Json& value, const std::string& expected) {
    Json json = Json::parse(read(config));
    json[key] = value;
    refused_with(config, json.dump(), command, {"adapter", expected});
    refused_with(config, json.dump(), "train train.yaml --adapter adapter", {expected});
  };
  refuse("r", 8, "expected (8, 32)");
  refuse("r", 0, "r is 0");
  refuse("r", "x", "expected an integer");
  refuse("use_dora", true, "lora_magnitude_vector' is missing");
  refuse("brand_new_key", 3, "brand_new_key is 3");
  refuse("bias", "some", "bias is \"some\"");
  refuse("modules_to_save", {"score"}, "which is no module of the model");
  refuse("peft_type", "IA3", "expected \"LORA\"");
  refuse("target_modules", {"q_proj"}, "has no place: target_modules");
  refuse("target_modules", {"nope"}, "matches no module");
  refused_with(config, "{", command, {config + ": not JSON"});
  const std::string bytes = read(weights);
  refused_with(weights, bytes.substr(0, bytes.size() - 5), command, {weights, "truncated"});
  const std::string renamed = edited(weights, [](Json& header) {
    const std::string first =
        header.contains("__metadata__") ? std::next(header.begin()).key() : header.begin().key();
    header["x"] = header[first];
    header.erase(first);
  });
  refused_with(weights, renamed, command, {weights, "'x' has no place"});
  refused(std::string(kGenerate) + " --adapter nowhere", {"nowhere/adapter_config.json"});
}

TEST_F(BadInput, OutputDirectoriesThatCannotBeUsedAreRefusedBeforeLoading) {
  refused("train train.yaml --output-dir train.yaml", {"train.yaml is not a directory"});
  refused("train train.yaml --output-dir train.yaml/x", {"cannot be created", "not a directory"});
  refused("train train.yaml --output-dir model", {"holds another run (model.safetensors)"});
  refused("train train.yaml --output-dir " + std::string(300, 'a'), {"output_dir", "too long"});
  fs::create_directories(path("locked"));
  fs::permissions(path("locked"), fs::perms::owner_read | fs::perms::owner_exec);
  if (geteuid() != 0)  // root may write anywhere
    refused("train train.yaml --output-dir locked/out", {"locked", "Permission denied"});
}

TEST_F(BadInput, AbsurdFlagsAndInputsOfTheOtherCommandsAreRefused) {
  for (const char* flags :
       {"--temperature -1", "--temperature nan", "--top-p 2", "--top-p -1", "--top-k -1",
        "--top-k 1.5", "--min-p 2", "--repetition-penalty 0", "--max-new-tokens 0",
        "--max-new-tokens -1", "--max-new-tokens 1e3", "--seed x", "--dtype int8", "--threads 0"})
    refused(std::string("generate --model model --prompt hello ") + flags,
            {std::string(flags).substr(0, std::string(flags).find(' '))});
  refused("generate --model model --prompt a --temprature 1", {"did you mean --temperature?"});
  refused("generate --model model --prompt ''", {"the prompt has no tokens"});
  refused("generate --model model --prompt \"$(printf '\\377')\"", {"the prompt has no tokens"});
  refused("generate --model model --prompt - <model", {"standard input cannot be read"});
  refused("generate --model model --prompt a >/dev/full", {"cannot write"});
  refused("generate --model train.yaml --prompt a", {"train.yaml: not a directory"});
  refused("tokenize --model model --idz a", {"did you mean --ids?"});
  refused("tokenize --model model - <model", {"standard input cannot be read"});
  refused("tokenize --model model a >/dev/full", {"cannot be written"});
  refused("info train.yaml", {"train.yaml: not JSON"});
  refused("info model --r 0", {"--r: got '0'"});
  refused("info model/tokenizer.json", {"model/tokenizer.json: model_type is missing"});
}

TEST_F(BadInput, TokenizeTakesAnyBytesAndAClosedPipeEndsQuietly) {
  std::string bytes;
  for (int i = 0; i < 200000; ++i) bytes += char((i * 2654435761u) >> 24);
  write("bytes.bin", bytes);
  const Outcome any = shell("$GRAFT tokenize --model model - <bytes.bin | tail -1");
  EXPECT_EQ(any.err, "");
  EXPECT_NE(any.out.find(".."), std::string::npos);
  const Outcome head = shell(
      "yes hello | head -c 1000000 | $GRAFT tokenize --model model - | "
      "head -1");
  EXPECT_EQ(head.out, "     72\th\t0..1\n");
  EXPECT_EQ(head.err, "");
}

}  // namespace
}  // namespace graft
