// The life of an adapter at the level of the binary: stacked in generate and under training,
// combined, converted and merged; and what is refused, with nothing left behind.
#include <algorithm>
#include <set>

#include "models/adapter_stack.h"
#include "models/combine.h"
#include "models/weights.h"
#include "tests/golden_case.h"
#include "tests/tiny_run.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

class Life : public TinyRun {
 protected:
  void SetUp() override {
    ASSERT_TRUE(fs::exists(binary())) << binary() << ": build it with make, or set GRAFT_BINARY";
    for (const char* name : {"qwen3_tied", "patterns", "dora_patterns"})
      for (const char* file : {"adapter_config.json", "adapter_model.safetensors"}) {
        fs::create_directories(path(name));
        fs::copy(std::string("tests/golden/adapters/") + name + "/" + file, path(name));
      }
  }
  std::string ok(const std::string& command) const {
    const Outcome outcome = shell("$GRAFT " + command);
    EXPECT_EQ(outcome.status, 0) << command << ": " << outcome.err;
    return outcome.out;
  }
  std::set<std::string> files() const {
    std::set<std::string> names;
    for (const auto& entry : fs::recursive_directory_iterator(folder_))
      names.insert(fs::relative(entry.path(), folder_));
    names.erase("stdout.txt");
    names.erase("stderr.txt");
    return names;
  }
  void refused(const std::string& command, const std::vector<std::string>& parts) const {
    const auto before = files();
    const Outcome outcome = shell("$GRAFT " + command);
    EXPECT_TRUE(outcome.status == 1 || outcome.status == 2) << command << ": " << outcome.status;
    EXPECT_EQ(outcome.err.rfind("graft: error: ", 0), 0u) << command << ": " << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    for (const std::string& part : parts)
      EXPECT_NE(outcome.err.find(part), std::string::npos)
          << command << "\n  got      " << outcome.err << "  expected " << part;
    EXPECT_EQ(files(), before) << command;
  }
  const std::string kGenerate = "generate --model model --prompt hello --max-new-tokens 12 --ids ";
  const std::string kBoth = "--adapter qwen3_tied:0.7 --adapter patterns:-0.4 ";
};

// One answer by four ways: two adapters stacked, combined by cat, by svd of full rank, and merged.
TEST_F(Life, GivesOneAnswerStackedCombinedAndMerged) {
  const std::string stacked = ok(kGenerate + kBoth);
  EXPECT_NE(stacked, ok(kGenerate));
  EXPECT_NE(stacked, ok(kGenerate + "--adapter qwen3_tied"));
  ok("combine " + kBoth + "-o cat");
  EXPECT_EQ(ok(kGenerate + "--adapter cat"), stacked);
  const std::string table = ok("combine " + kBoth + "-o svd --method svd --rank 12");
  EXPECT_NE(table.find("model.layers.1.self_attn.q_proj"), std::string::npos) << table;
  EXPECT_EQ(ok(kGenerate + "--adapter svd"), stacked);
  const std::string told = ok("merge --model model " + kBoth + "-o merged");
  EXPECT_NE(told.find("certificate over "), std::string::npos) << told;
  EXPECT_EQ(ok("generate --model merged --prompt hello --max-new-tokens 12 --ids"), stacked);
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "config.json"})
    EXPECT_TRUE(fs::exists(path(std::string("merged/") + name))) << name;
  EXPECT_FALSE(fs::exists(path("merged.unfinished")));
}

TEST_F(Life, TakesAnAdapterWithAColonOrACommaInItsPath) {
  fs::copy(path("qwen3_tied"), path("a:0.5,b"));
  EXPECT_EQ(ok(kGenerate + "--adapter a:0.5,b"), ok(kGenerate + "--adapter qwen3_tied"));
  EXPECT_EQ(ok(kGenerate + "--adapter=a:0.5,b:0.25"), ok(kGenerate + "--adapter qwen3_tied:0.25"));
}

// Modules of its own: trained by flags, generated with, merged, and refused where they would have
// to be added.
TEST_F(Life, TakesWholeModulesToWhereTheyCanGo) {
  write_data("data.jsonl", 22);
  const std::string train = "train --model model --data data.jsonl --max-steps 6 --r 2 ";
  ok(train + "--learning-rate 1e-2 --modules-to-save lm_head,norm --output-dir whole");
  EXPECT_NE(read("whole/adapter_config.json").find("\"lm_head\""), std::string::npos);
  const std::string with = ok(kGenerate + "--adapter whole");
  EXPECT_NE(with, ok(kGenerate));
  ok("merge --model model --adapter whole -o merged");
  EXPECT_EQ(ok("generate --model merged --prompt hello --max-new-tokens 12 --ids"), with);
  ok("convert --adapter whole -o copy");
  EXPECT_EQ(read("copy/adapter_model.safetensors"), read("whole/adapter_model.safetensors"));
  const std::string both = ok(kGenerate + "--adapter whole --adapter patterns:0.5");
  EXPECT_EQ(ok(kGenerate + "--adapter patterns:0.5 --adapter whole"), both);
  // On top of it, and with the same modules again.
  ok(train + "--base-adapters whole --output-dir top");
  refused(train + "--base-adapters whole --modules-to-save lm_head --output-dir out",
          {"whole: has its own 'lm_head.weight', and so has another adapter"});
  refused(kGenerate + "--adapter whole:0.5", {"whole: has its own", "its weight must be 1"});
  refused(kGenerate + "--adapter whole --adapter copy", {"copy: has its own"});
  refused("combine --adapter whole --adapter patterns -o out", {"whole has its own"});
  refused("convert --adapter whole --rank 1 -o out", {"whole has its own", "--to peft"});
  refused("convert --adapter whole --to gguf -o out", {"whole has its own", "--to peft"});
  refused(train + "--bias all --output-dir out", {"the model has no biases"});
  refused(train + "--modules-to-save mlp --output-dir out", {"matches model.layers.0.mlp"});
}

// Training on top of frozen adapters: they stay as they are, and the result belongs on top of them.
TEST_F(Life, TrainsOnTopOfFrozenAdapters) {
  write_data("data.jsonl", 22);
  write(
      "train.yaml",
      "model: model\ndata: data.jsonl\noutput_dir: out\nmax_steps: 6\nlearning_rate: 1e-2\n"
      "base_adapters: [qwen3_tied:0.7, patterns]\neval_split: 4\nlora: {r: 2, lora_dropout: 0}\n");
  const std::string before = read("qwen3_tied/adapter_model.safetensors");
  ok("train train.yaml");
  EXPECT_EQ(read("qwen3_tied/adapter_model.safetensors"), before);
  // Its eval loss is that of the stack of all three.
  const auto eval_loss = [&](const std::string& adapters, const std::string& out) {
    write("again.yaml", "model: model\ndata: data.jsonl\noutput_dir: " + out +
                            "\nmax_steps: 1\nlearning_rate: 0\neval_split: 4\nbase_adapters: [" +
                            adapters + "]\nlora: {r: 2}\n");
    ok("train again.yaml");
    for (const Json& line : metrics(out))
      if (line.contains("eval_loss")) return line["eval_loss"].get<double>();
    return 0.0;
  };
  double last = 0;
  for (const Json& line : metrics("out"))
    if (line.contains("eval_loss")) last = line["eval_loss"];
  const double together = eval_loss("qwen3_tied:0.7, patterns, out", "again1");
  EXPECT_NEAR(together, last, 1e-5 * last);
  EXPECT_GT(std::abs(eval_loss("out", "again2") - last), 1e-3 * last);
  // The options that are written give the same run, and another set of adapters is another run.
  EXPECT_NE(read("out/train_config.yaml").find("qwen3_tied:0.7"), std::string::npos);
  refused("train train.yaml --output-dir out2 --base-adapters nowhere",
          {"nowhere/adapter_config.json"});
  refused("train train.yaml --output-dir out2 --method full", {"base_adapters"});
}

TEST_F(Life, ReducesRanksAndSaysWhatThatCosts) {
  const std::string table = ok("convert --adapter qwen3_tied --rank 2 -o small");
  EXPECT_NE(table.find("least energy, largest error"), std::string::npos) << table;
  const AdapterFile small = read_adapter(path("small"));
  EXPECT_EQ(small.config.r, 2);
  EXPECT_EQ(small.modules.size(), 14u);
  EXPECT_NE(ok(kGenerate + "--adapter small"), ok(kGenerate));
}

// A DoRA adapter stacked, merged, as LoRA of full rank, and as LoRA of a rank that loses something.
TEST_F(Life, TakesDoraAllTheWay) {
  const std::string both = "--adapter dora_patterns --adapter qwen3_tied:0.5 ";
  const std::string stacked = ok(kGenerate + both);
  EXPECT_NE(stacked, ok(kGenerate + "--adapter qwen3_tied:0.5"));
  ok("merge --model model " + both + "-o merged");
  EXPECT_EQ(ok("generate --model merged --prompt hello --max-new-tokens 12 --ids"), stacked);
  refused("combine " + both + "-o sum", {"dora_patterns is a DoRA adapter", "--method svd"});
  ok("combine --model model " + both + "-o sum --method svd --rank 64");
  EXPECT_EQ(ok(kGenerate + "--adapter sum"), stacked);
  const std::string table =
      ok("convert --model model --adapter dora_patterns --to lora --rank 4 -o lora");
  EXPECT_NE(table.find("least energy, largest error"), std::string::npos) << table;
  EXPECT_FALSE(read_adapter(path("lora")).config.use_dora);
  refused("convert --model model --adapter dora_patterns --to gguf -o x.gguf", {"--to lora"});
  refused("convert --model model --adapter dora_patterns --rank 2 -o x", {"take --to lora"});
  ok("convert --model model --adapter dora_patterns --to mlx -o mlx");
  ok("convert --model model --adapter mlx -o back");
  EXPECT_TRUE(read_adapter(path("back")).config.use_dora);
  EXPECT_EQ(ok(kGenerate + "--adapter back"), ok(kGenerate + "--adapter dora_patterns"));
}

// On a base in NF4, saved so or made so while it is loaded: the merged model is dense, in the
// embedding's dtype, and what that loses is said.
TEST_F(Life, MergesIntoANf4Base) {
  const std::string quantised = "tests/golden/quantised/";
  fs::copy("tests/golden/trajectories/qlora/final", path("a"));
  for (const char* name : {"base", "nf4_double"}) {
    fs::copy(quantised + name, path(name));
    for (const char* file : {"tokenizer.json", "tokenizer_config.json"})
      fs::copy(path(std::string("model/") + file), path(name));
  }
  const std::string words = " --prompt hello --max-new-tokens 12 --ids --ignore-eos ";
  const std::string wanted = ok("generate --model nf4_double --adapter a" + words);
  const std::string told = ok("merge --model nf4_double --adapter a -o saved");
  for (const char* part : {"certificate over ", "14 weights of the base are NF4; the files have ",
                           "differ by up to 0, all by 0 %", "quantised to NF4 again"})
    EXPECT_NE(told.find(part), std::string::npos) << told << part;
  EXPECT_EQ(ModelConfig::load(path("saved")).dtype, DType::F32);
  EXPECT_FALSE(ModelConfig::load(path("saved")).nf4);
  EXPECT_EQ(ok("generate --model saved" + words), wanted);

  const std::string in_4bit = "merge --model base --load-in-4bit --adapter a ";
  ok(in_4bit + "-o made --dtype float32");
  EXPECT_EQ(ok("generate --model made" + words), wanted);
  const std::string narrow = ok(in_4bit + "-o narrow");
  EXPECT_NE(narrow.find("the files have them in BF16"), std::string::npos) << narrow;
  EXPECT_EQ(narrow.find("differ by up to 0,"), std::string::npos) << narrow;
  EXPECT_EQ(ModelConfig::load(path("narrow")).dtype, DType::BF16);
  EXPECT_EQ(ok("merge --model base --adapter a -o dense").find("NF4"), std::string::npos);
  EXPECT_NE(read("dense/model.safetensors"), read("narrow/model.safetensors"));
  refused(in_4bit + "-o out --max-difference 0 --max-kl 0", {"out is not kept"});
  refused("merge --model base --adapter a -o out --bnb-4bit-use-double-quant false",
          {"merge: --bnb-4bit-use-double-quant is given without --load-in-4bit"});
}

TEST_F(Life, ComesBackFromMlxAsItWent) {
  ok("convert --model model --adapter patterns --to mlx -o mlx");
  const Json config = Json::parse(read("mlx/adapter_config.json"));
  EXPECT_EQ(config["fine_tune_type"], "lora");
  EXPECT_EQ(config["num_layers"], 1);  // of two: patterns has the last one alone
  ok("convert --model model --adapter mlx -o back");
  EXPECT_EQ(ok(kGenerate + "--adapter back"), ok(kGenerate + "--adapter patterns"));
}

TEST_F(Life, MergeKeepsNothingBeyondItsLimit) {
  refused("merge --model model " + kBoth + "-o merged --max-difference 0 --max-kl 0",
          {"merged is not kept", "logits differ by"});
  refused("merge --model model " + kBoth + "-o merged --dtype bfloat16 --max-kl 1e-12",
          {"merged is not kept", "KL is"});
  refused("merge --model model --adapter qwen3_tied:1e30 -o merged",
          {"merged is not kept", "logits are not finite, or all 0", "out of range"});
  write("empty.txt", "");
  refused("merge --model model " + kBoth + "-o merged --text empty.txt", {"empty.txt: is empty"});
  refused("merge --model model " + kBoth + "-o ''", {"--output-dir is empty"});
  fs::copy(path("qwen3_tied"), path("moved"));
  Json elsewhere = Json::parse(read("moved/adapter_config.json"));
  elsewhere["base_model_name_or_path"] = "not here/base";
  write("moved/adapter_config.json", elsewhere.dump());
  for (const std::string command :
       {"merge -o merged --adapter moved", "generate --prompt x --adapter moved"})
    refused(command, {"not here/base: no such directory", "base_model_name_or_path", "--model"});
  ok("merge --model model " + kBoth + "-o merged --dtype bfloat16");
  EXPECT_EQ(ModelConfig::load(path("merged")).dtype, DType::BF16);
  write("text.txt", "some other text");
  EXPECT_NE(ok("merge --model model " + kBoth + "-o other --text text.txt").find("over 15 tokens"),
            std::string::npos);
}

// What generate refuses is not rewritten either, where the base is there to check it against.
TEST_F(Life, RewritesNoAdapterThatDoesNotFitItsBase) {
  const AdapterFile whole = read_adapter(path("qwen3_tied"));
  const auto broken = [&](const char* name, auto change) {
    AdapterFile file = whole;
    change(file);
    write_adapter(file, path(name));
  };
  broken("less", [](AdapterFile& file) { file.modules.erase(file.modules.begin()); });
  broken("narrow", [](AdapterFile& file) {
    for (AdapterModule& module : file.modules)
      if (module.name == "model.layers.0.mlp.up_proj")
        module.a = Tensor::zeros({module.a.size(0), 8}, DType::F32);
  });
  broken("deep", [](AdapterFile& file) {
    file.modules.push_back(file.modules.back());
    file.modules.back().name = "model.layers.9.mlp.up_proj";
  });
  broken("foreign", [](AdapterFile& file) { file.base.weights = "1-0123456789abcdef"; });
  Json config = Json::parse(read("qwen3_tied/adapter_config.json"));
  config["modules_to_save"] = {"lm_head"};
  fs::copy(path("qwen3_tied"), path("promised"));
  write("promised/adapter_config.json", config.dump());
  const std::pair<std::string, std::string> cases[] = {
      {"less", "are missing"},
      {"narrow", "'model.layers.0.mlp.up_proj' has A (4, 8)"},
      {"deep", "'model.layers.9.mlp.up_proj' has no place"},
      {"foreign", "belongs to another base"},
      {"promised", "the tensor of 'lm_head.weight' is missing"}};
  for (const auto& [name, text] : cases) {
    refused(kGenerate + "--adapter " + name, {text});
    for (const char* command :
         {"combine --model model -o out", "combine --model model -o out --method svd",
          "convert --model model -o out", "convert --model model -o out --rank 2",
          "convert --model model -o out --to mlx", "convert --model model -o out --to gguf"})
      refused(std::string(command) + " --adapter " + name, {name, text});
  }
  ok("combine --model model -o out --allow-other-base --adapter foreign");
  // Without the base it can't be known, and that is said.
  const Outcome outcome = shell("$GRAFT combine -o blind --adapter less");
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_EQ(outcome.err.rfind("graft: names, shapes and fingerprint were not checked against the "
                              "base (tests/golden/models/qwen3_tied: no such directory",
                              0),
            0u)
      << outcome.err;
  refused("combine -o out2 --adapter promised", {"promised", "'lm_head', whose tensor is missing"});
  // Of a base without weights, as a cache may have it, the config says what fits.
  fs::create_directories(path("tests/golden/models/qwen3_tied"));
  fs::copy(path("model/config.json"), path("tests/golden/models/qwen3_tied"));
  refused("combine -o out2 --adapter less", {"less", "are missing"});
  for (const char* command : {"combine", "convert", "convert --to mlx"}) {
    const Outcome half =
        shell(concat("$GRAFT ", command, " -o '", command, "' --adapter qwen3_tied"));
    EXPECT_EQ(half.status, 0) << half.err;
    EXPECT_EQ(half.err.rfind("graft: the fingerprint was not checked against the base (", 0), 0u)
        << half.err;
  }
}

// A limit of the size of files stands for a full disk.
TEST_F(Life, LeavesNothingWhereNothingCanBeWritten) {
  const auto before = files();
  for (const char* command : {"combine --model model -o out --adapter qwen3_tied",
                              "convert --model model -o out --adapter qwen3_tied",
                              "convert --model model -o out --to mlx --adapter qwen3_tied",
                              "convert --model model -o new/new/out --adapter qwen3_tied",
                              "convert --model model -o out --to gguf --adapter qwen3_tied",
                              "merge --model model -o out --adapter qwen3_tied",
                              "merge --model model -o new/out --adapter qwen3_tied"}) {
    const Outcome outcome = shell(std::string("ulimit -f 4; $GRAFT ") + command);
    EXPECT_EQ(outcome.status, 1) << command;
    EXPECT_NE(outcome.err.find("cannot be written: File too large\n"), std::string::npos)
        << command << ": " << outcome.err;
    EXPECT_EQ(files(), before) << command;
  }
}

TEST_F(Life, SaysWhereWeightsAreOutOfRange) {
  refused(kGenerate + "--adapter qwen3_tied:1e39", {"logits that are not finite"});
  refused("combine -o out --adapter qwen3_tied:1e39", {"beyond what F32 can hold"});
  for (const char* dtype : {"float32", "bfloat16"})
    refused(std::string("merge --model model -o out --adapter qwen3_tied:1e39 --dtype ") + dtype,
            {"_proj.weight' has values that", "cannot hold", "smaller weights"});
  refused("merge --model model -o out --adapter qwen3_tied:1e7 --dtype float16",
          {"that F16 cannot hold", "--dtype float32"});
}

TEST_F(Life, SaysInOneLineWhatIsWrong) {
  const std::string merge = "merge --model model -o out ", combine = "combine -o out ",
                    convert = "convert --model model -o out --adapter qwen3_tied ";
  refused(merge, {"--adapter DIR[:WEIGHT] is missing"});
  refused("merge --model model --adapter qwen3_tied", {"--output-dir DIR is missing"});
  refused(merge + "--adapter nowhere", {"nowhere/adapter_config.json"});
  refused(merge + "--adapter qwen3_tied:x", {"qwen3_tied:x"});
  refused(merge + "--adapter", {"--adapter needs a directory"});
  refused(merge + kBoth + "--dtype int8", {"--dtype is 'int8'"});
  refused(merge + kBoth + "--max-kl -1", {"--max-kl is '-1'"});
  refused(merge + kBoth + "--text nowhere", {"nowhere: cannot be read"});
  refused(merge + kBoth + "--text model", {"model: cannot be read", "--text names a file"});
  refused("merge --model model -o /proc/nowhere/out " + kBoth, {"/proc/nowhere"});
  refused("combine -o /proc/nowhere/out " + kBoth, {"/proc/nowhere"});
  refused(merge + kBoth + "--bogus", {"unknown flag --bogus"});
  refused("merge --model model -o model " + kBoth, {"model: is there already"});
  refused(combine, {"--adapter DIR[:WEIGHT] is missing"});
  refused(combine + kBoth + "--method linear", {"--method is 'linear'", "cat or svd"});
  refused(combine + kBoth + "--rank 4", {"--rank is given with method cat"});
  refused(combine + kBoth + "--method svd --rank 0", {"--rank is '0'", "from 1 to 2147483647"});
  refused("combine -o model " + kBoth, {"model holds files already"});
  refused(convert + "--to onnx", {"--to is 'onnx'", "peft, lora, mlx or gguf"});
  refused(convert + "--adapter patterns", {"expected one --adapter"});
  refused("convert -o out --adapter qwen3_tied:0.5", {"graft combine takes weights"});
  refused("convert -o out --model nowhere --to gguf --adapter qwen3_tied", {"nowhere"});
  fs::copy(path("qwen3_tied"), path("torn"));
  const std::string bytes = read("torn/adapter_model.safetensors");
  write("torn/adapter_model.safetensors", bytes.substr(0, bytes.size() - 9));
  for (const std::string& command :
       {merge + "--adapter torn", combine + "--adapter torn",
        std::string("convert -o out --adapter torn"), kGenerate + "--adapter torn"})
    refused(command, {"torn/adapter_model.safetensors", "truncated"});
}

// B all zero, and an adapter of another base: refused everywhere, taken where one says so.
TEST_F(Life, RefusesUntrainedAdaptersAndThoseOfAnotherBase) {
  write_data("data.jsonl", 8);
  write("train.yaml",
        "model: model\ndata: data.jsonl\noutput_dir: zero\nmax_steps: 1\nlearning_rate: 0\n");
  ok("train train.yaml");
  const std::vector<std::string> commands = {kGenerate + "--adapter zero",
                                             "merge --model model -o out --adapter zero",
                                             "combine -o out --adapter zero"};
  for (const std::string& command : commands) refused(command, {"B is zero in all 14 modules"});
  EXPECT_EQ(ok(kGenerate + "--adapter zero --allow-empty"), ok(kGenerate));
  refused("train train.yaml --output-dir top --base-adapters zero",
          {"zero: B is zero in all 14 modules", "leave it out of base_adapters"});

  Json config = Json::parse(read("model/config.json"));
  ok("merge --model model --adapter qwen3_tied -o other");  // another base of the same shape
  refused("generate --model other --prompt hello --adapter zero --allow-empty",
          {"belongs to another base", "--allow-other-base"});
  refused("merge --model other -o out --adapter zero --allow-empty", {"belongs to another base"});
  ok("generate --model other --prompt hello --adapter zero --allow-empty --allow-other-base");
  write("train.yaml",
        "model: other\ndata: data.jsonl\noutput_dir: more\nmax_steps: 1\nadapter: zero\n");
  refused("train train.yaml", {"belongs to another base"});
  ok("train train.yaml --allow-other-base");
}

}  // namespace
}  // namespace graft
