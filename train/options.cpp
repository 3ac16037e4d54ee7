#include "train/options.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <cxxopts.hpp>
#include <filesystem>
#include <map>

#include "models/nearest_name.h"
#include "train/option_keys.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Form = OptionKey::Form;
using Group = OptionKey::Group;

// The file may be no text at all.
std::string cut_to_a_line(const std::string& text) {
  constexpr size_t kMost = 60;
  std::string line = text.substr(0, kMost);
  for (char& c : line)
    if (static_cast<unsigned char>(c) < ' ' || c == 127) c = '?';
  return text.size() > kMost ? line + "..." : line;
}

// What was found where something else was expected, short enough for one line.
std::string shown(const YAML::Node& node) {
  if (node.IsNull()) return "nothing";
  if (node.IsScalar())
    return (node.Tag() == "!" ? "the text '" : "'") + cut_to_a_line(node.Scalar()) + "'";
  if (!node.IsSequence()) return "a map";
  std::string list;  // which may hold itself
  for (const YAML::Node& item : node) {
    if (!item.IsScalar()) return "a list";
    list += (list.empty() ? "" : ", ") + item.Scalar();
  }
  return "the list [" + cut_to_a_line(list) + "]";
}

std::string dashed(std::string name) {
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}
std::string underscored(std::string name) {
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

// dashes: "--" for a flag.
std::string option_hint(const std::string& nearest, const std::string& dashes = "") {
  if (nearest.empty()) return "graft train --help lists all";
  return concat("did you mean ", dashes, dashes.empty() ? nearest : dashed(nearest), "?");
}

// --- the config file -----------------------------------------------------------------------------

class ConfigFile {
 public:
  ConfigFile(TrainOptions& options, std::string path) : options_(options), path_(std::move(path)) {}

  void read() {
    const YAML::Node root = parse();
    CHECK(root.IsMap() || root.IsNull(), path_, ": got ", shown(root),
          ", expected keys and values, one 'key: value' a line");
    for (const auto& item : root) read_item(item.first, item.second, /*in_lora_block=*/false);
    resolve_paths();
    options_.given.insert(given_.begin(), given_.end());
  }

 private:
  YAML::Node parse() const {
    CHECK(fs::exists(path_), path_, ": no such file; expected a YAML file of training options");
    CHECK(!fs::is_directory(path_), path_, ": is a directory; expected a YAML file");
    try {
      std::vector<YAML::Node> documents = YAML::LoadAllFromFile(path_);
      CHECK(documents.size() <= 1, path_, ": holds ", documents.size(),
            " YAML documents; expected one");
      return documents.empty() ? YAML::Node() : documents.front();
    } catch (const YAML::ParserException& error) {
      fail(path_, ":", error.mark.line + 1, ": not YAML: ", error.msg);
    } catch (const YAML::Exception& error) {
      fail(path_, ": cannot be read: ", error.what());
    }
  }

  std::string place(const YAML::Node& node) const {
    return concat(path_, ":", node.Mark().line + 1, ": ");
  }

  void read_item(const YAML::Node& name_node, const YAML::Node& value, bool in_lora_block) {
    CHECK(name_node.IsScalar(), place(name_node), "got ", shown(name_node), ", expected a key");
    const std::string name = name_node.Scalar();
    if (name == "lora" && !in_lora_block) return read_lora_block(name_node, value);

    const OptionKey* key = find_option_key(name);
    CHECK(key && (!in_lora_block || key->group == Group::Lora), place(name_node), "unknown key '",
          name,
          key ? "' in the lora block; it stands at top level"
              : "'; " + option_hint(nearest_option_name(name)));
    CHECK(given_.insert(key->name).second, place(name_node), "key '", name, "' is given twice",
          key->alias.empty() ? "" : concat(" (", key->name, " = ", key->alias, ")"),
          "; leave one of the two");
    if (key->group == Group::Lora && !in_lora_block) {
      CHECK(!lora_block_, place(name_node), "'", name,
            "' stands at top level beside a lora block; put all LoRA keys in one place");
      lora_at_top_ = name;
    }
    CHECK(key->read(options_, value), place(value.IsNull() ? name_node : value), name, ": got ",
          shown(value), ", expected ", key->expected);
  }

  void read_lora_block(const YAML::Node& name, const YAML::Node& block) {
    CHECK(!lora_block_, place(name), "key 'lora' is given twice; leave one of the two");
    CHECK(lora_at_top_.empty(), place(name), "'", lora_at_top_,
          "' stands at top level beside a lora block; put all LoRA keys in one place");
    CHECK(block.IsMap(), place(name), "lora: got ", shown(block),
          ", expected a map such as {r: 16, lora_alpha: 32}");
    lora_block_ = true;
    for (const auto& item : block) read_item(item.first, item.second, /*in_lora_block=*/true);
  }

  // Relative paths are relative to the file. A model that is no path from there is a hub id.
  void resolve_paths() {
    const fs::path folder = fs::path(path_).parent_path();
    const auto resolve = [&](std::string& path) { path = (folder / path).lexically_normal(); };
    if (given_.contains("output_dir")) resolve(options_.output_dir);
    if (given_.contains("adapter") && !options_.adapter.empty()) resolve(options_.adapter);
    if (given_.contains("base_adapters"))
      std::for_each(options_.base_adapters.begin(), options_.base_adapters.end(), resolve);
    if (given_.contains("data")) std::for_each(options_.data.begin(), options_.data.end(), resolve);
    if (given_.contains("eval_data"))
      std::for_each(options_.eval_data.begin(), options_.eval_data.end(), resolve);
    if (!given_.contains("model")) return;
    if (!given_.contains("base_model_name_or_path"))
      options_.lora.base_model_name_or_path = options_.model;
    if (fs::exists(folder / options_.model)) resolve(options_.model);
  }

  TrainOptions& options_;
  std::string path_;
  std::set<std::string> given_;
  bool lora_block_ = false;
  std::string lora_at_top_;
};

// --- flags ---------------------------------------------------------------------------------------

bool is_boolean_word(const std::string& text) {
  static const std::set<std::string> words = {"true", "false", "yes", "no", "on", "off"};
  return words.contains(text);
}

// Brings flags into the form that cxxopts takes: dashes, --flag=value for booleans, --no-flag.
std::vector<std::string> normalise(const std::vector<std::string>& args) {
  std::vector<std::string> result;
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i] == "-h" || args[i].rfind("--", 0) != 0 || args[i].size() == 2) {
      result.push_back(args[i]);
      continue;
    }
    const size_t equals = args[i].find('=');
    std::string name = underscored(args[i].substr(2, equals - 2));
    const std::string value = equals == std::string::npos ? "" : args[i].substr(equals);
    const OptionKey* key = find_option_key(name);
    if (!key && name.rfind("no_", 0) == 0 && value.empty()) {
      key = find_option_key(name.substr(3));
      if (key && key->form == Form::Boolean) {
        result.push_back("--" + dashed(key->name) + "=false");
        continue;
      }
      key = nullptr;
    }
    if (!key && name != "help" && name != "config")
      throw UsageError(concat("unknown flag --", args[i].substr(2, equals - 2), "; ",
                              option_hint(nearest_option_name(name), "--")));
    if (key) name = key->name;
    result.push_back("--" + dashed(name) + value);
    if (!key || !value.empty()) continue;
    const bool has_next = i + 1 < args.size();
    if (key->form == Form::Boolean) {
      if (has_next && is_boolean_word(args[i + 1])) result.back() += "=" + args[++i];
    } else if (has_next) {
      result.back() += "=" + args[++i];  // whatever it looks like: --max-steps -1
    }
  }
  for (size_t i = 0; i < result.size(); ++i)  // cxxopts knows flags of one letter as -r alone
    if (result[i].rfind("--r=", 0) == 0) {
      result.insert(result.begin() + i + 1, result[i].substr(4));
      result[i++] = "-r";
    }
  return result;
}

// A list as it stands on a command line: q_proj,v_proj. Anything with another character in it, such
// as .*_proj, is one regular expression.
YAML::Node list_node(const std::string& text, bool names) {
  const auto plain = [](unsigned char c) { return isalnum(c) || strchr("_.,-", c); };
  YAML::Node list(YAML::NodeType::Sequence);
  if (names && (text == "all-linear" || !std::all_of(text.begin(), text.end(), plain)))
    return YAML::Node(text);
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    if (end > begin) list.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return list;
}

YAML::Node flag_node(const OptionKey& key, const std::string& text) {
  const bool yaml = !text.empty() && (text[0] == '{' || text[0] == '[');
  try {
    if (yaml && key.form != Form::Scalar) return YAML::Load(text);
    if (key.form == Form::Map) return YAML::Load("{" + text + "}");
  } catch (const YAML::Exception&) {
    return YAML::Node(text);  // then it is not what was expected
  }
  if (key.form == Form::List) return list_node(text, key.group == Group::Lora);
  if (text == "null") return YAML::Node(YAML::NodeType::Null);
  return YAML::Node(text);
}

cxxopts::Options flag_parser() {
  static const std::map<Group, std::string> titles = {{Group::Run, "Run"},
                                                      {Group::Data, "Data"},
                                                      {Group::Optimizer, "Optimizer"},
                                                      {Group::Lora, "LoRA"},
                                                      {Group::Engine, "Engine"}};
  cxxopts::Options parser("graft train",
                          "Fine-tunes a model; every key of a config is a flag too.");
  parser.custom_help("[config.yaml] [flags]").positional_help("").set_width(100);
  const TrainOptions defaults;
  for (const OptionKey& key : option_keys()) {
    const std::string value = key.write(defaults).dump();
    std::string help = key.help + (key.help.empty() ? "" : "; ") + key.expected;
    if (value != "\"\"" && value != "null" && value != "[]" && value != "{}")
      help += " [" + value + "]";
    parser.add_options(titles.at(key.group))(
        dashed(key.name), help,
        key.form == Form::Boolean ? cxxopts::value<std::string>()->implicit_value("true")
                                  : cxxopts::value<std::string>());
  }
  parser.add_options("Other")("config", "file with these keys", cxxopts::value<std::string>());
  parser.add_options("Other")("h,help", "print this");
  parser.add_options("positional")("positional", "", cxxopts::value<std::vector<std::string>>());
  parser.parse_positional({"positional"});
  return parser;
}

cxxopts::ParseResult parse_flags(const std::vector<std::string>& args) {
  const std::vector<std::string> normal = normalise(args);
  std::vector<const char*> argv = {"graft train"};
  for (const std::string& arg : normal) argv.push_back(arg.c_str());
  try {
    return flag_parser().parse(int(argv.size()), argv.data());
  } catch (const cxxopts::exceptions::exception& error) {
    throw UsageError(error.what());
  }
}

CommandLine apply_flags(TrainOptions& options, const cxxopts::ParseResult& parsed) {
  for (const OptionKey& key : option_keys()) {
    const std::string flag = dashed(key.name);
    if (parsed.count(flag) == 0) continue;
    if (parsed.count(flag) > 1)
      throw UsageError(concat("--", flag, " is given twice; leave one of the two"));
    const std::string text = parsed[flag].as<std::string>();
    if (!key.read(options, flag_node(key, text)))
      throw UsageError(concat("--", flag, ": got '", text, "', expected ", key.expected));
    options.given.insert(key.name);
    if (key.name == "model" && !parsed.count("base-model-name-or-path"))
      options.lora.base_model_name_or_path = options.model;
  }
  CommandLine rest;
  rest.help = parsed.count("help");
  if (parsed.count("positional"))
    rest.positional = parsed["positional"].as<std::vector<std::string>>();
  return rest;
}

// Keys that say nothing where the base is not quantised.
bool is_of_quantisation(const std::string& name) { return name.rfind("bnb_4bit_", 0) == 0; }

std::string absolute(const std::string& path) {
  return path.empty() ? path : fs::absolute(path).lexically_normal().string();
}

}  // namespace

std::string nearest_option_name(const std::string& unknown) {
  // What people write who come from elsewhere; spelling alone would lead astray.
  static const std::map<std::string, std::string> meant = {
      {"lr", "learning_rate"},
      {"rank", "r"},
      {"lora_r", "r"},
      {"epochs", "num_epochs"},
      {"max_length", "max_seq_length"},
      {"batch_size", "per_device_train_batch_size"},
      {"alpha", "lora_alpha"},
      {"dropout", "lora_dropout"},
      {"scheduler", "lr_scheduler_type"},
      {"steps", "max_steps"}};
  if (const auto found = meant.find(unknown); found != meant.end()) return found->second;
  std::string nearest = "lora";
  size_t least = edit_distance(unknown, nearest);
  for (const OptionKey& key : option_keys())
    for (const std::string& name : {key.name, key.alias}) {
      if (name.empty()) continue;
      if (const size_t distance = edit_distance(unknown, name); distance < least) {
        least = distance;
        nearest = name;
      }
    }
  return least <= std::max<size_t>(2, unknown.size() / 3) ? nearest : "";
}

std::string unknown_flag_hint(const std::string& help, const std::vector<std::string>& args) {
  std::set<std::string> flags;
  for (size_t at = help.find("--"); at != std::string::npos; at = help.find("--", at + 2)) {
    const size_t end = help.find_first_not_of("abcdefghijklmnopqrstuvwxyz-", at);
    if (end != at + 2) flags.insert(help.substr(at, end - at));
  }
  for (const std::string& arg : args) {
    const std::string flag = arg.substr(0, arg.find('='));
    if (flag.rfind("--", 0) != 0 || flag.size() == 2 || flags.contains(flag)) continue;
    const auto nearer = [&](const std::string& a, const std::string& b) {
      return edit_distance(flag, a) < edit_distance(flag, b);
    };
    return concat("unknown flag ", flag, "; did you mean ",
                  *std::min_element(flags.begin(), flags.end(), nearer), "?");
  }
  return "";
}

void read_config_file(TrainOptions& options, const std::string& path) {
  ConfigFile(options, path).read();
}

CommandLine read_flags(TrainOptions& options, const std::vector<std::string>& args) {
  return apply_flags(options, parse_flags(args));
}

TrainOptions read_train_options(const std::vector<std::string>& args, CommandLine& rest,
                                bool config_flag) {
  const cxxopts::ParseResult parsed = parse_flags(args);
  TrainOptions options;
  TrainOptions scratch;
  rest = apply_flags(scratch, parsed);  // what is positional, before the file is read
  if (rest.help) return options;
  if (!config_flag && rest.positional.size() + parsed.count("config") > 1)
    throw UsageError("unexpected argument '" + rest.positional.back() +
                     "'; expected one config file and flags");
  if (parsed.count("config")) {
    read_config_file(options, parsed["config"].as<std::string>());
  } else if (!config_flag && !rest.positional.empty()) {
    read_config_file(options, rest.positional.front());
    rest.positional.erase(rest.positional.begin());
  }
  apply_flags(options, parsed);
  return options;
}

void validate(const TrainOptions& options) {
  const auto need = [](bool given, const char* key, const char* what) {
    CHECK(given, "train: ", key, " is missing; give ", what, " in the config file or as --",
          dashed(key));
  };
  need(!options.model.empty(), "model", "a model directory or hub id");
  need(!options.output_dir.empty(), "output_dir", "a directory for the result");
  CHECK(options.eval_data.empty() || options.eval_split == 0,
        "train: eval_data and eval_split are both given; leave one of the two");
  CHECK(options.eval_split < 1 || options.eval_split == std::floor(options.eval_split),
        "train: eval_split: got ", options.eval_split,
        ", expected a share below 1 or a whole number of rows");
  CHECK(options.min_lr_ratio == 0 || options.lr_scheduler_type == Schedule::Type::Cosine,
        "train: min_lr_ratio needs lr_scheduler_type cosine");
  const bool full = options.method == TrainOptions::Method::Full;
  CHECK(!full || options.adapter.empty(),
        "train: adapter is given with method full; it needs method lora");
  CHECK(!full || options.base_adapters.empty(),
        "train: base_adapters is given with method full; it needs method lora");
  CHECK(!full || options.loraplus_lr_ratio == 1,
        "train: loraplus_lr_ratio is given with method full; it needs method lora");
  const bool quantised = is_quantised(options.method);
  for (const std::string& name : options.given)
    CHECK(quantised || !is_of_quantisation(name), "train: ", name,
          " is given, but method is not qlora");
  CHECK(!quantised || options.lora_layout == LoraLayout::Plain,
        "train: lora_layout is given with method qlora, whose weights cannot be merged; leave it "
        "out");
  CHECK(full || !options.random_init, "train: random_init needs method full");
  CHECK(!full || options.lora_layout == LoraLayout::Plain,
        "train: lora_layout is given with method full; it needs method lora");
  CHECK(!is_dora(options.method) || options.lora.use_dora || !options.given.contains("use_dora"),
        "train: use_dora is false with method ",
        options.method == TrainOptions::Method::Dora ? "dora" : "qdora",
        "; leave one of the two out");
  if (!full && has_residual_base(options.lora)) {
    const std::string init = "train: init_lora_weights is " + init_name(options.lora);
    CHECK(options.adapter.empty(), init, " and adapter is given, whose A and B are as they are; ",
          "leave one of the two out");
    CHECK(!quantised, init, " with method qlora: what it leaves of a weight would be quantised ",
          "anew, and the adapter would not fit the base; take method lora or dora");
    CHECK(options.base_adapters.empty(), init, ", which changes the weights that base_adapters ",
          "belong to; merge them into the base first (graft merge), or leave one of the two out");
  }
  if (full) {
    for (const std::string& name : options.given)
      CHECK(find_option_key(name)->group != Group::Lora || name == "base_model_name_or_path",
            "train: ", name, " is given with method full; it needs method lora");
  } else {
    validate(options.lora);
  }
}

bool uses_dora(const TrainOptions& options) {
  return is_dora(options.method) ||
         (options.method != TrainOptions::Method::Full && options.lora.use_dora);
}

std::string resolved_yaml(const TrainOptions& options) {
  TrainOptions written = options;
  if (fs::exists(options.model)) written.model = absolute(options.model);
  written.output_dir = absolute(options.output_dir);
  written.adapter = absolute(options.adapter);
  for (auto* paths : {&written.data, &written.eval_data, &written.base_adapters})
    for (std::string& path : *paths) path = absolute(path);

  const bool full = options.method == TrainOptions::Method::Full;
  std::string top, lora;
  for (const OptionKey& key : option_keys()) {
    const nlohmann::ordered_json value = key.write(written);
    if (value.is_null() || value == "") continue;
    if (is_of_quantisation(key.name) && !is_quantised(options.method)) continue;
    // JSON is YAML: what dump() writes needs no other quoting.
    const std::string line = key.name + ": " + value.dump() + "\n";
    if (key.group == Group::Lora)
      lora += "  " + line;
    else
      top += line;
  }
  return "# Written by graft train: every option of the run, defaults included.\n" + top +
         (full ? "" : "lora:\n" + lora);
}

std::vector<std::pair<std::string, std::string>> result_keys(const TrainOptions& options) {
  std::vector<std::pair<std::string, std::string>> keys;
  for (const OptionKey& key : option_keys())
    if (key.changes_result && (is_quantised(options.method) || !is_of_quantisation(key.name)))
      keys.emplace_back(key.name, key.write(options).dump());
  return keys;
}

std::string train_flags_help() {
  return flag_parser().help({"Run", "Data", "Optimizer", "LoRA", "Engine", "Other"});
}

}  // namespace graft
