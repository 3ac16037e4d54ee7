#include "train/option_keys.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "train/option_readers.h"

namespace graft {
namespace {

using Group = OptionKey::Group;
using Form = OptionKey::Form;
using Json = nlohmann::ordered_json;

// --- rows of the table ---------------------------------------------------------------------------
// at(...) gives the member of the options that a row stands for.

template <class Member>
auto at(Member TrainOptions::*member) {
  return [member](auto& o) -> auto& { return o.*member; };
}
template <class Member>
auto at(Member LoraConfig::*member) {
  return [member](auto& o) -> auto& { return o.lora.*member; };
}

struct Row {
  OptionKey key;
  Row alias(std::string name) && {
    key.alias = std::move(name);
    return std::move(*this);
  }
  Row keeps_result() && {
    key.changes_result = false;
    return std::move(*this);
  }
};

template <class At, class Read>
Row row(Group group, Form form, std::string name, At of, std::string expected, std::string help,
        Read read) {
  return {{std::move(name), "", group, form, true, std::move(expected), std::move(help), read,
           [of](const TrainOptions& o) { return Json(of(o)); }}};
}

template <class At>
Row integer(Group group, std::string name, At of, int64_t min, std::string help) {
  // Counts are multiplied with each other: below 2^31 that fits. The seed may be any word.
  using Value = std::decay_t<decltype(of(std::declval<TrainOptions&>()))>;
  constexpr bool count = std::is_signed_v<Value>;
  return row(group, Form::Scalar, std::move(name), of,
             concat("an integer from ", min, " up", count ? ", below 2^31" : ""), std::move(help),
             [of, min](TrainOptions& o, const YAML::Node& node) {
               Value value;
               if (!read_number(value, node) || std::cmp_less(value, min)) return false;
               if (count && std::cmp_greater(value, INT32_MAX)) return false;
               of(o) = value;
               return true;
             });
}

struct Interval {
  const char* text;  // "a number from 0 to 1"
  double min, max;
  bool open_min = false, open_max = false;
  bool holds(double x) const {
    return (open_min ? x > min : x >= min) && (open_max ? x < max : x <= max);
  }
};
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Interval kNotNegative = {"a number from 0 up", 0, kInfinity};
constexpr Interval kPositive = {"a number above 0", 0, kInfinity, true};
constexpr Interval kEpochs = {"a number above 0, at most 1e6", 0, 1e6, true};
constexpr Interval kShare = {"a number from 0 to 1", 0, 1};
constexpr Interval kBelowOne = {"a number from 0 to below 1", 0, 1, false, true};

template <class At>
Row number(Group group, std::string name, At of, Interval interval, std::string help) {
  return row(group, Form::Scalar, std::move(name), of, interval.text, std::move(help),
             [of, interval](TrainOptions& o, const YAML::Node& node) {
               double value;
               if (!read_number(value, node) || !interval.holds(value)) return false;
               of(o) = value;
               return true;
             });
}

template <class At>
Row boolean(Group group, std::string name, At of, std::string help) {
  return row(group, Form::Boolean, std::move(name), of, "true or false", std::move(help),
             [of](TrainOptions& o, const YAML::Node& node) { return read_boolean(of(o), node); });
}

template <class At>
Row text(Group group, std::string name, At of, std::string expected, std::string help) {
  return row(group, Form::Scalar, std::move(name), of, std::move(expected), std::move(help),
             [of](TrainOptions& o, const YAML::Node& node) { return read_text(of(o), node); });
}

template <class At>
Row text_list(Group group, std::string name, At of, std::string expected, std::string help) {
  return row(
      group, Form::List, std::move(name), of, std::move(expected), std::move(help),
      [of](TrainOptions& o, const YAML::Node& node) { return read_list(of(o), node, read_text); });
}

// One word out of some; each stands for a value.
template <class At, class Value>
Row choice(Group group, std::string name, At of, std::vector<std::pair<std::string, Value>> words,
           std::string help) {
  std::string expected;
  for (size_t i = 0; i < words.size(); ++i)
    expected += (i == 0 ? "" : i + 1 == words.size() ? " or " : ", ") + words[i].first;
  Row made = {{std::move(name), "", group, Form::Scalar, true, expected, std::move(help), {}, {}}};
  made.key.read = [of, words](TrainOptions& o, const YAML::Node& node) {
    for (const auto& [word, value] : words)
      if (node.IsScalar() && node.Scalar() == word) return of(o) = value, true;
    return false;
  };
  made.key.write = [of, words](const TrainOptions& o) {
    for (const auto& [word, value] : words)
      if (of(o) == value) return Json(word);
    return Json();
  };
  return made;
}

// DoRA is written as such, whichever of the two keys asked for it.
Row method_row() {
  using Method = TrainOptions::Method;
  Row made = choice<decltype(at(&TrainOptions::method)), Method>(
      Group::Run, "method", at(&TrainOptions::method),
      {{"lora", Method::Lora},
       {"dora", Method::Dora},
       {"qlora", Method::Qlora},
       {"qdora", Method::Qdora},
       {"full", Method::Full}},
      "train an adapter, one that also learns the length of each weight row (dora), either on a "
      "base in NF4 (qlora, qdora), or all weights");
  made.key.write = [write = made.key.write](const TrainOptions& o) {
    if (!uses_dora(o)) return write(o);
    return Json(is_quantised(o.method) ? "qdora" : "dora");
  };
  return made;
}

std::vector<Row> run_rows() {
  using O = TrainOptions;
  constexpr Group g = Group::Run;
  return {
      text(g, "model", at(&O::model), "a directory or a hub id",
           "base model: a Hugging Face directory, or a hub id in the local cache")
          .keeps_result(),
      text(g, "output_dir", at(&O::output_dir), "a directory", "where the adapter goes")
          .keeps_result(),
      method_row(),
      choice<decltype(at(&O::bnb_4bit_quant_type)), std::string>(
          g, "bnb_4bit_quant_type", at(&O::bnb_4bit_quant_type), {{"nf4", "nf4"}},
          "methods qlora and qdora: what linear layers are quantised to"),
      boolean(g, "bnb_4bit_use_double_quant", at(&O::bnb_4bit_use_double_quant),
              "methods qlora and qdora: quantise the scales too"),
      text(g, "adapter", at(&O::adapter), "a directory", "start from this adapter").keeps_result(),
      text_list(g, "base_adapters", at(&O::base_adapters), "directories, or DIR:WEIGHT",
                "frozen adapters on the base, on top of which the trained one learns")
          .keeps_result(),
      boolean(g, "allow_other_base", at(&O::allow_other_base),
              "take adapters whose fingerprint names another base")
          .keeps_result(),
      boolean(g, "random_init", at(&O::random_init),
              "method full: start from random weights; of the model only config.json is read"),
      integer(g, "logging_steps", at(&O::logging_steps), 1, "steps from one log line to the next")
          .keeps_result(),
      integer(g, "eval_steps", at(&O::eval_steps), 0,
              "steps from one evaluation to the next; 0: first and last only")
          .keeps_result(),
      integer(g, "save_steps", at(&O::save_steps), 0,
              "steps from one checkpoint to the next; 0: none")
          .keeps_result(),
      integer(g, "save_total_limit", at(&O::save_total_limit), 0,
              "newest checkpoints that are kept; 0: all")
          .keeps_result(),
      boolean(g, "resume", at(&O::resume), "continue from the newest checkpoint of output_dir")
          .keeps_result(),
  };
}

std::vector<Row> data_rows() {
  using O = TrainOptions;
  constexpr Group g = Group::Data;
  return {
      text_list(g, "data", at(&O::data), "paths of .txt or .jsonl files",
                "training data: files, folders or patterns; *.txt, or *.jsonl with text or "
                "prompt and completion")
          .keeps_result(),
      text_list(g, "eval_data", at(&O::eval_data), "paths of .txt or .jsonl files",
                "data of the eval loss")
          .keeps_result(),
      number(g, "eval_split", at(&O::eval_split), kNotNegative,
             "rows of data that are held out for the eval loss: a share, or from 1 up a number"),
      integer(g, "max_seq_length", at(&O::max_seq_length), 2,
              "longest row in tokens; longer ones are truncated, text is cut into rows"),
      boolean(g, "shuffle", at(&O::shuffle), "draw the rows of each epoch in a random order"),
      integer(g, "seed", at(&O::seed), 0, "of initialisation, order and dropout"),
  };
}

std::vector<Row> optimizer_rows() {
  using O = TrainOptions;
  using S = Schedule::Type;
  constexpr Group g = Group::Optimizer;
  return {
      choice<decltype(at(&O::optim)), O::Optimizer>(
          g, "optim", at(&O::optim),
          {{"adamw_torch", O::Optimizer::AdamW}, {"adamw_8bit", O::Optimizer::AdamW8bit}},
          "AdamW with its state in float32, or in 8 bits with a scale for 256"),
      number(g, "learning_rate", at(&O::learning_rate), kNotNegative,
             "the highest of the schedule"),
      number(g, "num_epochs", at(&O::num_epochs), kEpochs, "passes over the data")
          .alias("num_train_epochs"),
      integer(g, "max_steps", at(&O::max_steps), -1,
              "optimizer steps; where above 0 it overrides num_epochs"),
      integer(g, "per_device_train_batch_size", at(&O::per_device_train_batch_size), 1,
              "rows that run at once"),
      integer(g, "gradient_accumulation_steps", at(&O::gradient_accumulation_steps), 1,
              "batches whose gradients make one optimizer step"),
      choice<decltype(at(&O::lr_scheduler_type)), S>(
          g, "lr_scheduler_type", at(&O::lr_scheduler_type),
          {{"constant", S::Constant},
           {"constant_with_warmup", S::ConstantWithWarmup},
           {"linear", S::Linear},
           {"cosine", S::Cosine}},
          "how the learning rate falls"),
      integer(g, "warmup_steps", at(&O::warmup_steps), 0,
              "steps of rising learning rate; where above 0 it overrides warmup_ratio"),
      number(g, "warmup_ratio", at(&O::warmup_ratio), kShare, "the same as a share of all steps"),
      number(g, "min_lr_ratio", at(&O::min_lr_ratio), kShare,
             "cosine: share of learning_rate that is left at the end"),
      number(g, "weight_decay", at(&O::weight_decay), kNotNegative, "AdamW"),
      number(g, "adam_beta1", at(&O::adam_beta1), kBelowOne, "AdamW"),
      number(g, "adam_beta2", at(&O::adam_beta2), kBelowOne, "AdamW"),
      number(g, "adam_epsilon", at(&O::adam_epsilon), kNotNegative, "AdamW"),
      number(g, "max_grad_norm", at(&O::max_grad_norm), kNotNegative,
             "gradients are clipped to this norm; 0: not at all"),
      number(g, "loraplus_lr_ratio", at(&O::loraplus_lr_ratio), kPositive,
             "LoRA+: B learns so many times as fast as A"),
  };
}

// A key of the LoRA group whose reading and writing are still to be given.
Row lora_row(std::string name, Form form, std::string expected, std::string help) {
  return {
      {std::move(name), "", Group::Lora, form, true, std::move(expected), std::move(help), {}, {}}};
}

// A list of names, or one regular expression (or all-linear, which nothing may exclude) as a plain
// scalar, as PEFT has it.
Row module_names(std::string name, std::vector<std::string> LoraConfig::*names,
                 bool LoraConfig::*is_regex, std::string help) {
  const bool all_linear = name == "target_modules";
  Row made = text_list(Group::Lora, std::move(name), at(names),
                       all_linear ? "a list of module names, a regular expression or all-linear"
                                  : "a list of module names or a regular expression",
                       std::move(help));
  made.key.read = [names, is_regex, all_linear](TrainOptions& o, const YAML::Node& node) {
    std::vector<std::string> found;
    if (!read_list(found, node, read_text)) return false;
    if (!all_linear && node.IsScalar() && node.Scalar() == "all-linear") return false;
    o.lora.*names = std::move(found);
    o.lora.*is_regex = node.IsScalar() && node.Scalar() != "all-linear";
    return true;
  };
  made.key.write = [names, is_regex](const TrainOptions& o) {
    const auto& list = o.lora.*names;
    const bool scalar = o.lora.*is_regex || (list.size() == 1 && list[0] == "all-linear");
    return scalar ? Json(list[0]) : Json(list);
  };
  return made;
}

template <class Value>
Row pattern(std::string name, std::vector<std::pair<std::string, Value>> LoraConfig::*member,
            Value min, std::string expected, std::string help) {
  Row made = lora_row(std::move(name), Form::Map, std::move(expected), std::move(help));
  made.key.read = [member, min](TrainOptions& o, const YAML::Node& node) {
    return read_map(o.lora.*member, node, min);
  };
  made.key.write = [member](const TrainOptions& o) {
    Json map = Json::object();
    for (const auto& [key, value] : o.lora.*member) map[key] = value;
    return map;
  };
  return made;
}

Row lora_alpha_row() {
  Row made = lora_row("lora_alpha", Form::Scalar, kPositive.text,
                      "scale: the update is lora_alpha / r times B A; default 2 r");
  made.key.read = [](TrainOptions& o, const YAML::Node& node) {
    double value;
    if (!read_number(value, node) || !kPositive.holds(value)) return false;
    o.lora.lora_alpha = value;
    return true;
  };
  made.key.write = [](const TrainOptions& o) { return Json(o.lora.alpha()); };
  return made;
}

Row layers_row() {
  Row made = lora_row("layers_to_transform", Form::List, "layer numbers from 0 up",
                      "only these layers; default all");
  made.key.read = [](TrainOptions& o, const YAML::Node& node) {
    return read_list(o.lora.layers_to_transform, node, [](int64_t& value, const YAML::Node& item) {
      return read_number(value, item) && value >= 0;
    });
  };
  made.key.write = [](const TrainOptions& o) { return Json(o.lora.layers_to_transform); };
  return made;
}

Row tokens_row() {
  Row made = lora_row("trainable_token_indices", Form::List, "token ids",
                      "tokens whose rows of embed_tokens are trained too");
  made.key.read = [](TrainOptions& o, const YAML::Node& node) {
    return read_list(o.lora.trainable_token_indices, node,
                     [](int64_t& value, const YAML::Node& item) {
                       return read_number(value, item) && value >= 0;
                     });
  };
  made.key.write = [](const TrainOptions& o) { return Json(o.lora.trainable_token_indices); };
  return made;
}

Row dora_row() {
  Row made = boolean(Group::Lora, "use_dora", at(&LoraConfig::use_dora), "the same as method dora");
  made.key.write = [](const TrainOptions& o) { return Json(uses_dora(o)); };
  return made;
}

Row bias_row() {
  using Bias = LoraConfig::Bias;
  return choice<decltype(at(&LoraConfig::bias)), Bias>(
      Group::Lora, "bias", at(&LoraConfig::bias),
      {{"none", Bias::None}, {"lora_only", Bias::LoraOnly}, {"all", Bias::All}},
      "biases of the base that are trained: none, of the adapted layers, or all");
}

Row init_row() {
  using Init = LoraConfig::Init;
  Row made = lora_row(
      "init_lora_weights", Form::Scalar,
      "true, gaussian, false, pissa, pissa_niter_N (N from 0 to 1000) or olora",
      "how A begins: Kaiming uniform, or Gaussian, with B zero; false: both random; "
      "pissa, olora: A and B as the main part of each weight, by SVD (niter: a faster one) or QR, "
      "and the base as the rest");
  made.key.read = [](TrainOptions& o, const YAML::Node& node) {
    if (!node.IsScalar()) return false;
    std::string word = node.Scalar();
    o.lora.pissa_niter.reset();
    if (const std::string prefix = "pissa_niter_"; word.starts_with(prefix)) {
      int64_t rounds;
      if (!std::isdigit(uint8_t(word[prefix.size()]))) return false;
      if (!read_number(rounds, YAML::Node(word.substr(prefix.size())))) return false;
      if (rounds < 0 || rounds > 1000) return false;
      o.lora.pissa_niter = rounds;
      word = "pissa";
    }
    for (const Init init :
         {Init::KaimingUniform, Init::Gaussian, Init::Random, Init::Pissa, Init::Olora})
      if (LoraConfig one; (one.init_lora_weights = init, init_name(one) == word))
        return o.lora.init_lora_weights = init, true;
    return false;
  };
  made.key.write = [](const TrainOptions& o) {
    const std::string name = init_name(o.lora);
    return name == "true" || name == "false" ? Json(name == "true") : Json(name);
  };
  return made;
}

std::vector<Row> lora_rows() {
  using C = LoraConfig;
  constexpr Group g = Group::Lora;
  return {
      integer(g, "r", at(&C::r), 1, "rank of the update"),
      lora_alpha_row(),
      number(g, "lora_dropout", at(&C::lora_dropout), kBelowOne,
             "share of the adapter's inputs that a training step drops"),
      module_names("target_modules", &C::target_modules, &C::target_is_regex,
                   "layers that get an adapter"),
      module_names("exclude_modules", &C::exclude_modules, &C::exclude_is_regex,
                   "layers that get none"),
      layers_row(),
      tokens_row(),
      pattern<int64_t>("rank_pattern", &C::rank_pattern, 1,
                       "a map from module patterns to integers from 1 up", "r by module"),
      pattern<double>("alpha_pattern", &C::alpha_pattern, 0,
                      "a map from module patterns to numbers from 0 up", "lora_alpha by module"),
      boolean(g, "use_rslora", at(&C::use_rslora), "scale by lora_alpha / sqrt(r)"),
      dora_row(),
      bias_row(),
      text_list(g, "modules_to_save", at(&C::modules_to_save), "a list of module names",
                "trained whole and saved: lm_head, embed_tokens or norms"),
      init_row(),
      choice<decltype(at(&C::task_type)), std::string>(g, "task_type", at(&C::task_type),
                                                       {{"CAUSAL_LM", "CAUSAL_LM"}}, "")
          .keeps_result(),
      text(g, "base_model_name_or_path", at(&C::base_model_name_or_path), "a name or path",
           "what adapter_config.json calls the base; default: model as given")
          .keeps_result(),
  };
}

Row dtype_row() {
  Row made = {{"dtype",
               "",
               Group::Engine,
               Form::Scalar,
               true,
               "float32 or bfloat16",
               "of the base weights and activations; default: that of the model's files",
               {},
               {}}};
  made.key.read = [](TrainOptions& o, const YAML::Node& node) {
    if (node.IsNull()) return o.dtype.reset(), true;
    if (!node.IsScalar()) return false;
    if (node.Scalar() == "float32") return o.dtype = DType::F32, true;
    if (node.Scalar() == "bfloat16") return o.dtype = DType::BF16, true;
    return false;
  };
  made.key.write = [](const TrainOptions& o) {
    if (!o.dtype) return Json();
    return Json(*o.dtype == DType::F32 ? "float32" : "bfloat16");
  };
  return made;
}

std::vector<Row> engine_rows() {
  using O = TrainOptions;
  constexpr Group g = Group::Engine;
  return {
      dtype_row(),
      boolean(g, "gradient_checkpointing", at(&O::gradient_checkpointing),
              "recompute activations in the backward: less memory, a third more work")
          .keeps_result(),
      integer(g, "threads", at(&O::threads), 0, "threads of the CPU; 0: all there are")
          .keeps_result(),
      choice<decltype(at(&O::device)), O::DeviceChoice>(
          g, "device", at(&O::device),
          {{"auto", O::DeviceChoice::Auto},
           {"cpu", O::DeviceChoice::Cpu},
           {"cuda", O::DeviceChoice::Cuda}},
          "where to run; auto: a GPU that can be used")
          .keeps_result(),
      boolean(g, "cuda_graph", at(&O::cuda_graph),
              "GPU: capture steps as graphs; pays where rows of few lengths make short steps")
          .keeps_result(),
      choice<decltype(at(&O::lora_layout)), LoraLayout>(
          g, "lora_layout", at(&O::lora_layout),
          {{"plain", LoraLayout::Plain},
           {"merged", LoraLayout::Merged},
           {"bordered", LoraLayout::Bordered}},
          "products on a GPU: layer by layer; q, k, v and gate, up in one; or the adapters' in "
          "those "
          "of the base too (without dropout)")
          .keeps_result(),
      boolean(g, "tune", at(&O::tune),
              "on a GPU, time the algorithms for each shape of product and keep the choice in "
              "output_dir/gemm_plan.json")
          .keeps_result(),
  };
}

}  // namespace

const std::vector<OptionKey>& option_keys() {
  static const std::vector<OptionKey> keys = [] {
    std::vector<OptionKey> all;
    for (auto rows : {run_rows(), data_rows(), optimizer_rows(), lora_rows(), engine_rows()})
      for (Row& row : rows) all.push_back(std::move(row.key));
    return all;
  }();
  return keys;
}

const OptionKey* find_option_key(const std::string& name) {
  for (const OptionKey& key : option_keys())
    if (key.name == name || (!key.alias.empty() && key.alias == name)) return &key;
  return nullptr;
}

}  // namespace graft
