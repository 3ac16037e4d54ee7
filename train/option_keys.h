// The table of training keys. One row says how a key is called, what it takes, how it is read and
// written; everything else (files, flags, --help, the resolved configuration) walks the table.
#pragma once

#include <yaml-cpp/yaml.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "train/options.h"

namespace graft {

struct OptionKey {
  enum class Group { Run, Data, Optimizer, Lora, Engine };
  enum class Form { Scalar, Boolean, List, Map };

  std::string name, alias;  // alias: another accepted name, or empty
  Group group;
  Form form;
  bool changes_result;   // whether the trained bytes depend on it
  std::string expected;  // "an integer from 1 up", for errors and --help
  std::string help;
  // False when the node is not what was expected; then options are as before.
  std::function<bool(TrainOptions&, const YAML::Node&)> read;
  std::function<nlohmann::ordered_json(const TrainOptions&)> write;
};

const std::vector<OptionKey>& option_keys();
const OptionKey* find_option_key(const std::string& name);  // by name or alias; null: none

// The name among the keys (and "lora") that a wrong one most likely stands for.
std::string nearest_option_name(const std::string& unknown);  // "": none is near

}  // namespace graft
