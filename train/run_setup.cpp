#include "train/run_setup.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "models/adapter_stack.h"
#include "models/model_files.h"
#include "models/replaced_parameters.h"
#include "models/residual_base.h"
#include "models/tokenizer.h"
#include "models/weights.h"
#include "train/checkpoint.h"
#include "train/option_keys.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

bool is_full(const TrainOptions& options) { return options.method == TrainOptions::Method::Full; }

TextEncoder text_encoder(const Tokenizer& tokenizer) {
  TextEncoder encoder;
  encoder.encode = [&tokenizer](const std::string& text) {
    Encoding encoding = tokenizer.encode(text);
    return TextEncoder::Tokens{std::move(encoding.ids), std::move(encoding.offsets)};
  };
  encoder.eos_id = tokenizer.eos_id().value_or(-1);
  return encoder;
}

nlohmann::ordered_json read_json(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  auto object = nlohmann::ordered_json::parse(file, nullptr, /*allow_exceptions=*/false);
  CHECK(object.is_object(), path, ": is not a JSON object");
  return object;
}

// Loads options.adapter. Its rank, alpha and targets hold: LoRA keys that were given must say the
// same, but for the dropout, which may be chosen anew.
void load_start_adapter(Decoder& model, TrainOptions& options) {
  TrainOptions loaded = options;
  loaded.lora = load_adapter(model, options.adapter, {options.allow_other_base});
  CHECK(loaded.lora.use_dora || !is_dora(options.method), "adapter: ", options.adapter,
        " is plain LoRA, but the method is ",
        is_quantised(options.method) ? "qdora; take qlora" : "dora; leave method out");
  loaded.lora.task_type = "CAUSAL_LM";
  loaded.lora.init_lora_weights = options.lora.init_lora_weights;  // nothing is initialised
  loaded.lora.base_model_name_or_path = options.lora.base_model_name_or_path;
  if (options.given.contains("lora_dropout")) {
    loaded.lora.lora_dropout = options.lora.lora_dropout;
    for (NamedLinear& layer : adaptable_layers(model))
      if (layer.linear->lora) layer.linear->lora->dropout_p = options.lora.lora_dropout;
  }
  for (const OptionKey& key : option_keys()) {
    if (key.group != OptionKey::Group::Lora || !options.given.contains(key.name)) continue;
    auto wanted = key.write(options), held = key.write(loaded);
    if (key.form == OptionKey::Form::List && wanted.is_array() && held.is_array()) {
      std::sort(wanted.begin(), wanted.end());  // PEFT writes the names as a set
      std::sort(held.begin(), held.end());
    }
    CHECK(wanted == held, "adapter: ", options.adapter, " has ", key.name, " ", held.dump(),
          ", but the options say ", wanted.dump(), "; leave the key out");
  }
  options = std::move(loaded);
}

struct CollectLeaves : Visitor {
  std::vector<std::pair<std::string, Variable>> leaves;
  bool full = false;
  void parameter(const std::string& name, Variable& value) override {
    if (!full) {  // what an adapter has of its own
      if (value.requires_grad()) leaves.emplace_back(name, value);
      return;
    }
    // F16 is a type of files: trained weights work in F32.
    if (value.value().dtype() == DType::F16)
      value.set_value(value.value().to(DType::F32, Scope::Weights));
    value.set_requires_grad(true);
    leaves.emplace_back(name, value);
  }
  void embedding(const std::string& name, Embedding& module) override {
    linear(name, module);
    for (auto& leaf : token_leaves(name, module)) leaves.push_back(std::move(leaf));
  }
  void linear(const std::string& name, Linear& module) override {
    if (!module.lora) return;
    for (auto& leaf : adapter_leaves(name, *module.lora)) leaves.push_back(std::move(leaf));
  }
};

}  // namespace

void check_output_dir(const TrainOptions& options) {
  const fs::path folder = options.output_dir;
  std::error_code error;
  const bool exists = fs::exists(folder, error);
  CHECK(!error, "output_dir: ", options.output_dir, " cannot be used: ", error.message());
  // What creates it and writes into it comes after minutes of loading; say now what would fail.
  fs::path nearest = fs::absolute(folder);
  while (!fs::exists(nearest, error) && nearest.has_relative_path())
    nearest = nearest.parent_path();
  CHECK(access(nearest.c_str(), W_OK | X_OK) == 0 || !fs::is_directory(nearest),
        "output_dir: ", options.output_dir, " cannot be written: ", nearest.string(), ": ",
        std::strerror(errno));
  CHECK(exists || fs::is_directory(nearest), "output_dir: ", options.output_dir,
        " cannot be created: ", nearest.string(), " is not a directory");
  if (!exists) return;
  CHECK(fs::is_directory(folder), "output_dir: ", options.output_dir, " is not a directory");
  if (options.resume) return;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    const bool of_a_run = name == "train_config.yaml" || name == "metrics.jsonl" ||
                          name == "adapter_config.json" || name.ends_with(".safetensors") ||
                          name.rfind("checkpoint-", 0) == 0;
    CHECK(!of_a_run, "output_dir: ", options.output_dir, " holds another run (", name,
          "); choose another directory, or continue it with resume: true");
  }
}

TrainData load_data(const TrainOptions& options, const std::string& model_dir) {
  CHECK(!options.data.empty(),
        "train: data is missing; give .txt or .jsonl files in the config file or as --data");
  const Tokenizer tokenizer = Tokenizer::load(model_dir);
  const TextEncoder encoder = text_encoder(tokenizer);
  TrainData data;
  data.train = load_dataset(options.data, encoder, options.max_seq_length);
  if (!options.eval_data.empty())
    data.eval = load_dataset(options.eval_data, encoder, options.max_seq_length);
  return data;
}

void check_token_ids(const TrainData& data, const ModelConfig& config) {
  for (const Dataset* dataset : {&data.train, &data.eval})
    for (const Row& row : dataset->rows)
      for (int32_t id : row.ids)
        CHECK(id >= 0 && id < config.vocab_size, "data: the tokenizer gives id ", id,
              ", but the model has ", config.vocab_size,
              " tokens; tokenizer.json and config.json do not belong together");
}

Quantisation quantisation_of(const TrainOptions& options) {
  return {is_quantised(options.method), options.bnb_4bit_use_double_quant};
}

std::vector<LoraTarget> attach_fresh_adapter(Decoder& model, const LoraConfig& config,
                                             uint64_t seed) {
  const std::vector<LoraTarget> targets = attach_lora(model, config, seed);
  start_replaced_parameters(model, config);
  const auto trained = [](const ReplacedParameter& one) { return is_bias(one.name); };
  CHECK(config.bias == LoraConfig::Bias::None ||
            std::any_of(model.replaced.begin(), model.replaced.end(), trained),
        "train: bias is ", config.bias == LoraConfig::Bias::All ? "all" : "lora_only", ", but ",
        config.bias == LoraConfig::Bias::All ? "the model has no biases"
                                             : "no adapted layer has a bias",
        "; leave it out");
  return targets;
}

std::unique_ptr<Decoder> prepare_model(TrainOptions& options, const std::string& model_dir,
                                       Device device) {
  std::unique_ptr<Decoder> model;
  if (options.random_init) {
    const ModelConfig config = ModelConfig::load(model_dir);
    const DType dtype =
        options.dtype.value_or(config.dtype == DType::BF16 ? DType::BF16 : DType::F32);
    const double range = read_json(model_dir + "/config.json").value("initializer_range", 0.02);
    model = random_model(config, dtype, options.seed, range, device);
  } else {
    model = load_model(model_dir, options.dtype, device, quantisation_of(options));
  }
  if (!is_full(options)) options.lora.use_dora = uses_dora(options);
  const bool nf4 = has_nf4_weights(*model);
  CHECK(!is_full(options) || !nf4, "train: the weights of ", model_dir,
        " are NF4, which method full cannot train; take the unquantised model, or method qlora");
  CHECK(!nf4 || options.lora_layout == LoraLayout::Plain,
        "train: lora_layout is given, but the weights of ", model_dir,
        " are NF4 and cannot be merged; leave it out");
  const bool residual = !is_full(options) && has_residual_base(options.lora);
  CHECK(!residual || !nf4, "train: init_lora_weights is ", init_name(options.lora),
        ", but the weights of ", model_dir, " are NF4; take the unquantised model");
  if (is_full(options))
    widen_weights(*model);
  else if (options.adapter.empty())
    attach_fresh_adapter(*model, options.lora, options.seed);
  else
    load_start_adapter(*model, options);
  CHECK(options.loraplus_lr_ratio == 1 || !model->embed_tokens.lora,
        "train: loraplus_lr_ratio is given, and target_modules name the embedding, for which LoRA+ "
        "has a rate of its own that graft has not; leave either out");
  if (residual) {
    CHECK(!model->embed_tokens.lora && !model->lm_head.lora,
          "train: init_lora_weights is pissa or olora, and target_modules name embed_tokens or "
          "lm_head, whose weights nothing may be taken out of; leave either out");
    take_out_adapters(*model, options.lora, options.seed);
  }
  AdapterStack stack(*model);
  for (const std::string& text : options.base_adapters) {
    const AdapterChoice base = parse_adapter_choice(text);
    const AdapterFile file = read_adapter(base.directory);
    check_not_empty(file, "leave it out of base_adapters");
    stack.put_on(file, base.weight, {options.allow_other_base});
  }
  // F16 weights that are used in place have no name among the dtypes to ask for.
  const bool f16 = model->embed_tokens.weight.value().dtype() == DType::F16;
  if (!options.dtype && !f16) options.dtype = model->compute_dtype();
  return model;
}

int64_t all_parameters(int64_t base, TrainOptions::Method method,
                       const std::vector<ParameterBuffer::Entry>& trained) {
  if (method == TrainOptions::Method::Full) return base;
  for (const ParameterBuffer::Entry& entry : trained)
    if (!is_bias(entry.name)) base += entry.variable.shape().num_elements();
  return base;
}

std::vector<std::pair<std::string, Variable>> trained_leaves(Decoder& model,
                                                             TrainOptions::Method method,
                                                             double loraplus_lr_ratio) {
  CollectLeaves collect;
  collect.full = method == TrainOptions::Method::Full;
  model.visit("", collect);
  if (loraplus_lr_ratio != 1)
    std::stable_partition(collect.leaves.begin(), collect.leaves.end(), [](const auto& leaf) {
      return !ParameterBuffer::has_rate_of_b(leaf.first, leaf.second);
    });
  return std::move(collect.leaves);
}

std::vector<std::pair<std::string, std::string>> run_result_keys(const TrainOptions& options,
                                                                 const std::string& model_dir,
                                                                 const TrainData& data) {
  auto keys = result_keys(options);
  const auto add = [&](const char* name, const auto&... parts) {
    keys.emplace_back(name, concat(parts...));
  };
  add("data", data.train.rows.size(), " rows, fingerprint ", data.train.fingerprint());
  // Hashing all weights would read them all: sizes, and the config, tell models apart.
  uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(model_dir))
    if (entry.path().extension() == ".safetensors") bytes += fs::file_size(entry.path());
  add("model", "config ", hash_file(model_dir + "/config.json"), ", weights of ",
      options.random_init ? 0 : bytes, " bytes");
  if (!options.adapter.empty())
    add("adapter", "fingerprint ", hash_file(options.adapter + "/adapter_model.safetensors"));
  std::string under;
  for (const std::string& text : options.base_adapters) {
    const AdapterChoice base = parse_adapter_choice(text);
    under +=
        concat(under.empty() ? "" : ", ", "fingerprint ",
               hash_file(base.directory + "/adapter_model.safetensors"), " weight ", base.weight);
  }
  add("base_adapters", under.empty() ? "none" : under);
  return keys;
}

void save_model(Decoder& model, const TrainOptions& options, const std::string& model_dir,
                const std::string& folder) {
  if (!is_full(options)) return save_adapter(model, options.lora, folder);
  fs::create_directories(folder);
  save_weights(model, folder, model.compute_dtype());
  copy_model_files(model_dir, folder, model.compute_dtype(), model.config().tie_word_embeddings);
}

}  // namespace graft
