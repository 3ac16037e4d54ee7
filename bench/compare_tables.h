// The README's tables of methods, from the rows that bench/compare_methods.sh logs:
//   cost     what train_step prints: {"who": "graft", "method", "tok_s", "peak_rss_gib", ...}
//   quality  {"task", "method", "rank", "seed", "exact", "loss", "seconds"}; rank 0: no adapter;
//            method "none": the base as it is
#pragma once

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "bench/gpu_tables.h"
#include "tensor/check.h"

namespace graft {

struct Spread {
  double mean = 0, least = 0, most = 0;
};
inline Spread spread_of(const std::vector<double>& values) {
  CHECK(!values.empty(), "compare: nothing was measured");
  Spread spread{0, values[0], values[0]};
  for (const double value : values) {
    spread.mean += value / double(values.size());
    spread.least = std::min(spread.least, value);
    spread.most = std::max(spread.most, value);
  }
  return spread;
}

// Share of full fine-tuning's memory that guides to LoRA promise.
inline std::string promised_memory(const std::string& method) {
  static const std::map<std::string, std::string> promised = {
      {"full", "100 %"}, {"lora", "20 %"}, {"qlora", "10 %"}, {"dora", "25 %"}};
  const auto at = promised.find(method);
  return at == promised.end() ? "" : at->second;
}

inline std::string method_title(const std::string& method) {
  static const std::map<std::string, std::string> titles = {
      {"full", "full"}, {"lora", "LoRA"}, {"qlora", "QLoRA"}, {"dora", "DoRA"}};
  const auto at = titles.find(method);
  CHECK(at != titles.end(), "compare: no method ", method);
  return at->second;
}
inline const std::vector<std::string>& compared_methods() {
  static const std::vector<std::string> methods = {"full", "lora", "qlora", "dora"};
  return methods;
}

// Medians over the rounds; a method that failed has its error in the place of numbers.
inline std::string cost_table(const std::vector<Json>& rows) {
  std::map<std::string, StepRuns> runs;
  for (const Json& row : rows)
    if (row.contains("who")) runs[row["method"].get<std::string>()].rows.push_back(row);
  if (runs.empty()) return "";
  const auto median = [&](const char* method, const char* key) {
    return runs.contains(method) && runs[method].measured() ? runs[method].median(key) : 0.0;
  };
  const double full_memory = median("full", "peak_rss_gib"), full_rate = median("full", "tok_s");
  const auto percent = [](double value, double of) {
    return of > 0 ? with_decimals(100 * value / of, 0) + " %" : std::string();
  };
  std::string table =
      "| method | peak memory, GiB | of full | a guide's promise | tokens/s | of full |\n"
      "| --- | --- | --- | --- | --- | --- |\n";
  for (const std::string& method : compared_methods()) {
    if (!runs.contains(method)) continue;
    table += "| " + method_title(method) + " | ";
    if (!runs[method].measured()) {
      table += runs[method].rows[0].value("error", "not measured") + " | | " +
               promised_memory(method) + " | | |\n";
      continue;
    }
    const double memory = median(method.c_str(), "peak_rss_gib"),
                 rate = median(method.c_str(), "tok_s");
    table += with_decimals(memory, 2) + " | " + percent(memory, full_memory) + " | " +
             promised_memory(method) + " | " + with_decimals(rate, 1) + " | " +
             percent(rate, full_rate) + " |\n";
  }
  return table;
}

// "97.8 (95.5-99.0), 0.012": exact match in percent, mean and range over the seeds; held-out loss.
inline std::string quality_cell(const std::vector<Json>& rows) {
  if (rows.empty()) return "";
  std::vector<double> exact, loss;
  for (const Json& row : rows) {
    exact.push_back(100 * row["exact"].get<double>());
    loss.push_back(row["loss"].get<double>());
  }
  const Spread e = spread_of(exact);
  return with_decimals(e.mean, 1) + " (" + with_decimals(e.least, 1) + "-" +
         with_decimals(e.most, 1) + "), " + with_decimals(spread_of(loss).mean, 3);
}

inline std::string quality_tables(const std::vector<Json>& rows) {
  std::vector<std::string> tasks;
  std::set<int64_t> ranks;
  std::set<uint64_t> seeds;
  for (const Json& row : rows) {
    if (!row.contains("task")) continue;
    const std::string task = row["task"].get<std::string>();
    if (std::find(tasks.begin(), tasks.end(), task) == tasks.end()) tasks.push_back(task);
    if (row["rank"].get<int64_t>() > 0) ranks.insert(row["rank"].get<int64_t>());
    seeds.insert(row["seed"].get<uint64_t>());
  }
  std::string text;
  for (const std::string& task : tasks) {
    const auto cell = [&](const std::string& method, int64_t rank) {
      std::vector<Json> here;
      for (const Json& row : rows)
        if (row.contains("task") && row["task"] == task && row["method"] == method &&
            row["rank"] == rank)
          here.push_back(row);
      return quality_cell(here);
    };
    std::string head = "| " + task + " | no adapter |", line = "| --- | --- |";
    for (const int64_t rank : ranks) {
      head += " rank " + std::to_string(rank) + " |";
      line += " --- |";
    }
    text += head + "\n" + line + "\n";
    const std::string blanks = [&] {
      std::string cells;
      for (size_t i = 0; i < ranks.size(); ++i) cells += "  |";
      return cells;
    }();
    text += "| base | " + cell("none", 0) + " |" + blanks + "\n";
    for (const std::string& method : compared_methods()) {
      text += "| " + method_title(method) + " | " + cell(method, 0) + " |";
      if (method == "full") {
        text += blanks + "\n";
        continue;
      }
      for (const int64_t rank : ranks) text += " " + cell(method, rank) + " |";
      text += "\n";
    }
    text += "\n";
  }
  if (!text.empty()) text.pop_back();
  return text;
}

}  // namespace graft
