// From a YAML node to a value of an option; false when the node is not one, and then the value is
// as it was. For option_keys.cpp.
#pragma once

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace graft {

// A quoted scalar ("16") is text, never a number or a boolean.
inline bool is_plain(const YAML::Node& node) { return node.IsScalar() && node.Tag() != "!"; }

template <class Number>
bool read_number(Number& value, const YAML::Node& node) {
  if (!is_plain(node)) return false;
  const std::string& text = node.Scalar();
  const char* begin = text.data() + (text.size() > 1 && text[0] == '+');
  const auto [end, error] = std::from_chars(begin, text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return false;
  if constexpr (std::is_floating_point_v<Number>) return std::isfinite(value);
  return true;
}

inline bool read_boolean(bool& value, const YAML::Node& node) {
  if (!is_plain(node)) return false;
  std::string text = node.Scalar();
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return tolower(c); });
  if (text == "true" || text == "yes" || text == "on") return value = true, true;
  if (text == "false" || text == "no" || text == "off") return value = false, true;
  return false;
}

inline bool read_text(std::string& value, const YAML::Node& node) {
  if (!node.IsScalar()) return false;
  value = node.Scalar();
  return true;
}

// One scalar is a list of one.
template <class Item, class ReadItem>
bool read_list(std::vector<Item>& values, const YAML::Node& node, ReadItem read_item) {
  std::vector<Item> found;
  const auto add = [&](const YAML::Node& item) {
    Item value{};
    if (!read_item(value, item)) return false;
    found.push_back(std::move(value));
    return true;
  };
  if (node.IsSequence()) {
    for (const auto& item : node)
      if (!add(item)) return false;
  } else if (!node.IsNull() && !add(node)) {
    return false;
  }
  values = std::move(found);
  return true;
}

template <class Value>
bool read_map(std::vector<std::pair<std::string, Value>>& values, const YAML::Node& node,
              Value min) {
  std::vector<std::pair<std::string, Value>> found;
  if (!node.IsMap() && !node.IsNull()) return false;
  for (const auto& item : node) {
    std::string name;
    Value value{};
    if (!read_text(name, item.first) || !read_number(value, item.second) || value < min)
      return false;
    for (const auto& other : found)
      if (other.first == name) return false;
    found.emplace_back(std::move(name), value);
  }
  values = std::move(found);
  return true;
}

}  // namespace graft
