// Full, LoRA, QLoRA and DoRA on the bundled model: what make compare-methods runs for quality, and
// the README's tables of it.
//   compare_methods quality MODEL WORK [--ranks 2,4,8,16,32] [--methods none,full,lora,qlora,dora]
//   [--seeds 3] [--first-seed 1]
//                   [--shard 0/2] [--threads 1] [--learning-rate METHOD=RATE ...] [--items 6400]
//       trains every method on every task at every rank and prints a line of JSON for each run
//   compare_methods table LOG PAGE --heading TEXT
//       replaces what stands between <!-- methods --> and <!-- /methods --> in PAGE
#include <chrono>
#include <cstdio>
#include <cxxopts.hpp>
#include <filesystem>
#include <fstream>

#include "bench/compare_tables.h"
#include "models/adapter.h"
#include "models/weights.h"
#include "train/demo_answers.h"
#include "train/demo_data.h"
#include "train/finetune.h"
#include "train/run_setup.h"

using namespace graft;

namespace {

namespace fs = std::filesystem;

constexpr int kHeldOut = 200;

struct Settings {
  std::string model, work;
  std::vector<int64_t> ranks;
  std::vector<std::string> methods;
  uint64_t first_seed = 1, seeds = 3;
  int64_t shard = 0, shards = 1, threads = 0;
  int items = 0;
  std::map<std::string, double> learning_rates;
};

struct Case {
  DemoTask task;
  std::string method;  // none, full, lora, qlora, dora
  int64_t rank;        // 0: no adapter
  uint64_t seed;
};

std::vector<Case> all_cases(const Settings& settings) {
  std::vector<Case> cases;
  for (uint64_t seed = settings.first_seed; seed < settings.first_seed + settings.seeds; ++seed)
    for (const DemoTask task : kDemoTasks) {
      for (const std::string& method : settings.methods) {
        const bool adapter = method != "none" && method != "full";
        for (const int64_t rank : adapter ? settings.ranks : std::vector<int64_t>{0})
          cases.push_back({task, method, rank, seed});
      }
    }
  return cases;
}

TrainOptions recipe(const Settings& settings, const Case& c, const fs::path& folder) {
  using Method = TrainOptions::Method;
  static const std::map<std::string, Method> methods = {{"none", Method::Full},
                                                        {"full", Method::Full},
                                                        {"lora", Method::Lora},
                                                        {"qlora", Method::Qlora},
                                                        {"dora", Method::Dora}};
  TrainOptions options;
  options.model = settings.model;
  options.data = {folder / "train.jsonl"};
  options.eval_data = {folder / "held_out.jsonl"};
  options.output_dir = folder / "run";
  options.method = methods.at(c.method);
  options.seed = c.seed;
  options.threads = settings.threads;
  options.lora.r = std::max<int64_t>(c.rank, 1);
  options.lora.lora_dropout = 0;
  options.lora.base_model_name_or_path = settings.model;
  options.learning_rate = settings.learning_rates.at(c.method == "none" ? "full" : c.method);
  options.per_device_train_batch_size = 32;
  options.gradient_accumulation_steps = 1;
  options.max_seq_length = 64;
  options.save_steps = 0;
  return options;
}

// The model that the run left on disk, read back as a user would read it.
std::unique_ptr<Decoder> trained_model(const TrainOptions& options) {
  if (options.method == TrainOptions::Method::Full) return load_model(options.output_dir);
  auto model = load_model(options.model, {}, Device::CPU, quantisation_of(options));
  load_adapter(*model, options.output_dir);
  return model;
}

Json run_case(const Settings& settings, const Case& c) {
  const auto start = std::chrono::steady_clock::now();
  const fs::path folder = fs::path(settings.work) / ("shard-" + std::to_string(settings.shard));
  fs::remove_all(folder);
  fs::create_directories(folder);
  const DemoSplit split = demo_split(c.seed, settings.items, kHeldOut, c.task);
  write_items(folder / "train.jsonl", split.train);
  write_items(folder / "held_out.jsonl", split.held_out);

  TrainOptions options = recipe(settings, c, folder);
  const bool base = c.method == "none";
  if (base) options.max_steps = 1;  // a run of one step measures the loss before it
  const TrainResult result = finetune(options);
  const Tokenizer tokenizer = Tokenizer::load(settings.model);
  const auto model = base ? load_model(settings.model) : trained_model(options);
  const double exact = exact_match(answers(*model, tokenizer, split.held_out), split.held_out);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return {{"task", demo_task_name(c.task)},
          {"method", c.method},
          {"rank", c.rank},
          {"seed", c.seed},
          {"steps", base ? 0 : result.steps},
          {"learning_rate", base ? 0 : options.learning_rate},
          {"exact", exact},
          {"loss", base ? result.first_eval_loss.value() : result.last_eval_loss.value()},
          {"seconds", std::round(100 * seconds.count()) / 100}};
}

int quality(const Settings& settings) {
  const std::vector<Case> cases = all_cases(settings);
  for (size_t i = size_t(settings.shard); i < cases.size(); i += size_t(settings.shards)) {
    std::printf("%s\n", run_case(settings, cases[i]).dump().c_str());
    std::fflush(stdout);
  }
  return 0;
}

int table(const std::string& log, const std::string& page, const std::string& heading) {
  std::vector<Json> rows;
  std::ifstream lines(log);
  CHECK(lines.good(), log, ": cannot be read");
  for (std::string line; std::getline(lines, line);) {
    const Json row = Json::parse(line, nullptr, false);
    if (row.is_object()) rows.push_back(row);
  }
  const std::string costs = cost_table(rows), qualities = quality_tables(rows);
  CHECK(!costs.empty() && !qualities.empty(), log, ": holds no rows of cost or none of quality");
  replace_section(page, "methods", heading + "\n\n" + costs + "\n" + qualities);
  return 0;
}

Settings settings_of(const cxxopts::ParseResult& parsed, const std::vector<std::string>& places) {
  CHECK(places.size() == 3, "compare_methods quality: expected MODEL and WORK");
  Settings settings;
  settings.model = places[1];
  settings.work = places[2];
  settings.ranks = parsed["ranks"].as<std::vector<int64_t>>();
  settings.methods = parsed["methods"].as<std::vector<std::string>>();
  settings.first_seed = parsed["first-seed"].as<uint64_t>();
  settings.seeds = parsed["seeds"].as<uint64_t>();
  settings.threads = parsed["threads"].as<int64_t>();
  settings.items = parsed["items"].as<int>();
  const std::string shard = parsed["shard"].as<std::string>();
  long number = 0, count = 0;
  CHECK(
      std::sscanf(shard.c_str(), "%ld/%ld", &number, &count) == 2 && number >= 0 && number < count,
      "--shard: got '", shard, "', expected K/N with K from 0 to N - 1");
  settings.shard = number;
  settings.shards = count;
  // bench/README.md has what others gave with seed 0, which is none of those measured.
  settings.learning_rates = {{"full", 1.5e-3}, {"lora", 3e-3}, {"qlora", 3e-3}, {"dora", 3e-3}};
  for (const std::string& text : parsed["learning-rate"].as<std::vector<std::string>>()) {
    const size_t equals = text.find('=');
    if (text.empty()) continue;
    CHECK(equals != std::string::npos && settings.learning_rates.contains(text.substr(0, equals)),
          "--learning-rate: got '", text, "', expected METHOD=RATE");
    settings.learning_rates[text.substr(0, equals)] = std::stod(text.substr(equals + 1));
  }
  return settings;
}

int run(int argc, char** argv) {
  cxxopts::Options flags("compare_methods", "quality MODEL WORK | table LOG PAGE");
  flags.add_options()("ranks", "",
                      cxxopts::value<std::vector<int64_t>>()->default_value("2,4,8,16,32"))(
      "methods", "",
      cxxopts::value<std::vector<std::string>>()->default_value("none,full,lora,qlora,dora"))(
      "seeds", "how many", cxxopts::value<uint64_t>()->default_value("3"))(
      "first-seed", "", cxxopts::value<uint64_t>()->default_value("1"))(
      "shard", "K/N: every Nth run, from the Kth",
      cxxopts::value<std::string>()->default_value("0/1"))(
      "threads", "0: all", cxxopts::value<int64_t>()->default_value("0"))(
      "items", "to train on", cxxopts::value<int>()->default_value("6400"))(
      "learning-rate", "METHOD=RATE",
      cxxopts::value<std::vector<std::string>>()->default_value(""))(
      "heading", "what stands above the tables", cxxopts::value<std::string>()->default_value(""));
  flags.allow_unrecognised_options();
  const auto parsed = flags.parse(argc, argv);
  const std::vector<std::string>& places = parsed.unmatched();
  const std::string what = places.empty() ? "" : places[0];
  if (what == "quality") return quality(settings_of(parsed, places));
  if (what == "table" && places.size() == 3)
    return table(places[1], places[2], parsed["heading"].as<std::string>());
  fail("usage: compare_methods quality MODEL WORK [flags] | compare_methods table LOG PAGE");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "compare_methods: %s\n", error.what());
    return 1;
  }
}
