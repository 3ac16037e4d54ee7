// The README's tables about GPUs, made from bench/results/*.json: what gpu_results prints and its
// test checks. A result file is
//   {"device": {"gpu": NAME, ...}, SECTION: {"commit", "date", "driver", "rows": [...]}, ...}
// with the sections test, bench, step and peers (and ladder, which is cuda_ladder's), whose rows
// are the lines that the programs print.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "bench/page.h"
#include "tensor/check.h"

namespace graft {

using Json = nlohmann::ordered_json;

// "NVIDIA H100 80GB HBM3" is kept in nvidia-h100-80gb-hbm3.json.
inline std::string file_name_of(const std::string& gpu) {
  std::string name;
  for (const char c : gpu) {
    if (std::isalnum(static_cast<unsigned char>(c)))
      name += char(std::tolower(static_cast<unsigned char>(c)));
    else if (!name.empty() && name.back() != '-')
      name += '-';
  }
  while (!name.empty() && name.back() == '-') name.pop_back();
  CHECK(!name.empty(), "results: the GPU has no name");
  return name + ".json";
}

inline std::string with_decimals(double value, int decimals) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.*f", decimals, value);
  return text;
}

// The rows of one case and one program, over the rounds of a run.
struct StepRuns {
  std::vector<Json> rows;
  double median(const std::string& key) const {
    std::vector<double> values;
    for (const Json& row : rows)
      if (row.contains(key)) values.push_back(row[key].get<double>());
    CHECK(!values.empty(), "results: no ", key, " in any row");
    std::sort(values.begin(), values.end());
    const size_t n = values.size();
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
  }
  bool measured() const {
    return std::any_of(rows.begin(), rows.end(),
                       [](const Json& row) { return row.contains("tok_s"); });
  }
};

// Model (and the method, where that is not LoRA), tokens, checkpoint; in the order of the first row
// of each.
using StepCase = std::tuple<std::string, int64_t, bool>;

inline StepCase case_of(const Json& row) {
  const std::string method = row.value("method", "lora");
  return {row["model"].get<std::string>() + (method == "lora" ? "" : ", " + method),
          row["seq"].get<int64_t>() * row["batch"].get<int64_t>(), row["checkpoint"].get<bool>()};
}

inline std::string step_line(const StepCase& at, const std::string& who, const StepRuns& runs,
                             const StepRuns* graft) {
  const auto& [model, tokens, checkpoint] = at;
  std::string line = "| " + model + ", " + std::to_string(tokens) + " tokens" +
                     (checkpoint ? ", checkpointing" : "") + " | " + who + " | ";
  if (!runs.measured()) return line + runs.rows[0].value("error", "not measured") + " |  |  |  |\n";
  line += with_decimals(runs.median("tok_s"), 0) + " | ";
  if (graft && graft->measured() && who != "graft")
    line += with_decimals(graft->median("tok_s") / runs.median("tok_s"), 2);
  line += " | ";
  if (runs.rows[0].contains("utilisation"))
    line += with_decimals(100 * runs.median("utilisation"), 0) + " %";
  line += " | ";
  std::vector<double> peaks;
  for (const Json& row : runs.rows)
    if (row.contains("peak_gpu_gib")) peaks.push_back(row["peak_gpu_gib"]["at_once"].get<double>());
  if (!peaks.empty()) line += with_decimals(*std::max_element(peaks.begin(), peaks.end()), 1);
  return line + " |\n";
}

// A step in graft and its peers: the cases of `peers`, and those that only `step` has.
inline std::string step_table(const Json& result) {
  std::vector<StepCase> order;
  std::map<StepCase, std::map<std::string, StepRuns>> cases;
  for (const char* section : {"peers", "step"}) {
    if (!result.contains(section)) continue;
    std::vector<StepCase> here;
    for (const Json& row : result[section]["rows"]) {
      const StepCase at = case_of(row);
      if (std::find(order.begin(), order.end(), at) != order.end()) continue;
      if (std::find(here.begin(), here.end(), at) == here.end()) here.push_back(at);
      cases[at][row["who"].get<std::string>()].rows.push_back(row);
    }
    order.insert(order.end(), here.begin(), here.end());
  }
  if (order.empty()) return "";
  std::string table =
      "| case | who | tokens/s | graft is faster by | utilisation | peak, GiB |\n"
      "| --- | --- | --- | --- | --- | --- |\n";
  for (const StepCase& at : order) {
    const auto& who = cases[at];
    const auto graft = who.find("graft");
    const StepRuns* ours = graft == who.end() ? nullptr : &graft->second;
    if (ours) table += step_line(at, "graft", *ours, ours);
    for (const auto& [name, runs] : who)
      if (name != "graft") table += step_line(at, name, runs, ours);
  }
  return table;
}

// One line of what a section was measured with.
inline std::string stamp(const Json& result, const std::string& section) {
  const Json& s = result[section];
  return s.value("date", "") + ", commit " + s.value("commit", "") +
         (s.value("driver", "").empty() ? "" : ", driver " + s.value("driver", "")) +
         (s.value("cublas", true) ? "" : ", without cuBLAS: products by graft's own GEMM");
}

inline std::string test_line(const Json& result) {
  if (!result.contains("test")) return "";
  std::string line = "Tests on the device (" + stamp(result, "test") + "): ";
  bool first = true;
  for (const Json& row : result["test"]["rows"]) {
    line += (first ? "" : "; ") + row.value("what", "") + ": " + row.value("outcome", "");
    first = false;
  }
  return line + ".\n\n";
}

inline std::string gpu_section(const std::vector<Json>& results) {
  std::string text;
  for (const Json& result : results) {
    if (!result.contains("test") && !result.contains("step") && !result.contains("peers")) continue;
    text += "**" + result["device"]["gpu"].get<std::string>() + "**";
    for (const char* section : {"peers", "step"})
      if (result.contains(section)) {
        text += " (" + stamp(result, section) + ")";
        break;
      }
    text += "\n\n" + test_line(result) + step_table(result) + "\n";
  }
  if (text.empty()) return "No GPU has been measured yet.\n";
  text.pop_back();
  return text;
}

// Every kernel at the shapes of the largest model that was run.
inline std::string kernel_section(const std::vector<Json>& results) {
  std::string text;
  for (const Json& result : results) {
    if (!result.contains("bench")) continue;
    text +=
        "**" + result["device"]["gpu"].get<std::string>() + "** (" + stamp(result, "bench") + ")";
    std::string model;
    for (const Json& row : result["bench"]["rows"]) {
      model = row.value("model", model);
      if (row.contains("roofline"))
        text +=
            "; " + row["roofline"].get<std::string>() + " " +
            (row.contains("gb_s") ? with_decimals(row["gb_s"].get<double>(), 0) + " GB/s"
                                  : with_decimals(row["tflop_s"].get<double>(), 0) + " TFLOP/s");
    }
    text += "; " + model +
            "\n\n| kernel | shape | us | GB/s | TFLOP/s | share of the roofline |\n" +
            "| --- | --- | --- | --- | --- | --- |\n";
    for (const Json& row : result["bench"]["rows"]) {
      if (row.value("model", "") != model || !row.contains("kernel")) continue;
      text += "| " + row["kernel"].get<std::string>() + " | " + row["shape"].get<std::string>() +
              " | " + with_decimals(row["us"].get<double>(), 1) + " | " +
              (row.contains("gb_s") ? with_decimals(row["gb_s"].get<double>(), 0) : "") + " | " +
              (row.contains("tflop_s") ? with_decimals(row["tflop_s"].get<double>(), 1) : "") +
              " | " + with_decimals(100 * row["share"].get<double>(), 0) + " % |\n";
    }
    text += "\n";
  }
  if (text.empty()) return "No GPU has been measured yet.\n";
  text.pop_back();
  return text;
}

// `page` with the tables of GPUs renewed, both or the one that it has.
inline std::string with_tables(std::string page, const std::vector<Json>& results) {
  bool found = false;
  for (const auto& [name, text] : {std::pair<std::string, std::string>{"gpu", gpu_section(results)},
                                   {"gpu-kernels", kernel_section(results)}}) {
    if (page.find("<!-- " + name + " -->\n") == std::string::npos) continue;
    page = with_section(page, name, text);
    found = true;
  }
  CHECK(found, "results: the page has neither <!-- gpu --> nor <!-- gpu-kernels -->");
  return page;
}

}  // namespace graft
