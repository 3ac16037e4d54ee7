// Parses what ptxas and the GPU build left behind, and writes the table.
#include "bench/cuda_ladder_table.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cuda/variants.h"
#include "tensor/check.h"

namespace graft {
namespace {

// Dense BF16 tensor-core and memory peaks of the data sheets.
struct Card {
  const char* name;  // part of what the driver calls it; the first that fits counts
  double bytes_per_second, flop_per_second;
};
constexpr Card kCards[] = {{"H200", 4.8e12, 989e12},
                           {"H100 80GB HBM3", 3.35e12, 989e12},
                           {"H100 PCIe", 2.0e12, 756e12},
                           {"A100-SXM4-80GB", 2.039e12, 312e12},
                           {"A100-SXM4-40GB", 1.555e12, 312e12}};

const Card* card_named(const std::string& device) {
  for (const Card& card : kCards)
    if (device.find(card.name) != std::string::npos) return &card;
  return nullptr;
}

template <class... T>
std::string text(const char* format, T... values) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}

double roofline_us(const LadderCosts& costs, const Card& card) {
  return 1e6 * std::max(costs.bytes / card.bytes_per_second, costs.flop / card.flop_per_second);
}

std::string demangled(const std::string& symbol) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : symbol;
}

// "void graft::(anonymous namespace)::kernel<int>(int*, int)" -> "...::kernel<int>".
std::string without_parameters(const std::string& name) {
  int depth = 0;
  for (size_t i = name.size(); i-- > 0;) {
    depth += name[i] == ')' ? 1 : name[i] == '(' ? -1 : 0;
    if (depth == 0) return name.substr(0, i);
  }
  return name;
}

// The number that ends where `text` begins in the line.
int number_before(const std::string& line, const std::string& text) {
  const size_t end = line.find(text);
  CHECK(end != std::string::npos, "cuda_ladder: no \"", text, "\" in ptxas's line: ", line);
  size_t begin = end;
  while (begin > 0 && line[begin - 1] >= '0' && line[begin - 1] <= '9') --begin;
  CHECK(begin < end, "cuda_ladder: no number before \"", text, "\" in ptxas's line: ", line);
  return std::stoi(line.substr(begin, end - begin));
}

const KernelResources* resources_of(const std::map<std::string, KernelResources>& kernels,
                                    const std::string& kernel) {
  const std::string ending = "::" + kernel;
  for (const auto& [name, resources] : kernels)
    if (name.ends_with(ending)) return &resources;
  return nullptr;
}

// Time, rate and share of the roofline, or dashes.
std::string time_cells(const CardTimes& card, const LadderFamily& family, const LadderCosts& costs,
                       const std::string& key) {
  const auto times = card.families.find(family.name);
  if (times == card.families.end() || times->second.sizes != family.bench_sizes ||
      !times->second.us.count(key))
    return " - | - | - |";
  const double us = times->second.us.at(key);
  const Card* peaks = card_named(card.device);
  const bool by_flop =
      !peaks || costs.flop / peaks->flop_per_second > costs.bytes / peaks->bytes_per_second;
  std::string cells = text(" %.0f |", us);
  cells += by_flop ? text(" %.1f TFLOP/s |", 1e-6 * costs.flop / us)
                   : text(" %.0f GB/s |", 1e-3 * costs.bytes / us);
  return cells + (peaks ? text(" %.0f %% |", 100 * roofline_us(costs, *peaks) / us) : " - |");
}

std::string rung_row(const LadderFamily& family, const LadderRung& rung, const LadderCosts& costs,
                     const LadderMeasurements& measured, const std::vector<CardTimes>& cards) {
  std::string row =
      "| " + std::to_string(rung.number) + " " + rung.name + " | " + rung.sentence + " |";
  for (const CardTimes& card : cards)
    row += time_cells(card, family, costs, std::to_string(rung.number));
  const KernelResources* resources = resources_of(measured.kernels, rung.kernel);
  CHECK(resources || measured.kernels.empty(), "cuda_ladder: ptxas saw no kernel ", rung.kernel,
        " of ", family.name, " rung ", rung.number);
  row += resources ? " " + std::to_string(resources->registers) + " | " +
                         std::to_string(resources->spilled_bytes) + " |"
                   : " - | - |";
  const auto waves = measured.bank_waves.find(family.name);
  if (waves == measured.bank_waves.end() || !waves->second.count(rung.number)) return row + " - |";
  const double per_tile = waves->second.at(rung.number);
  return row + (per_tile == 0 ? " |" : text(" %.2f |", per_tile));
}

std::string family_section(const LadderFamily& family, const LadderMeasurements& measured,
                           const std::vector<CardTimes>& cards) {
  const LadderCosts costs = family.costs(family.bench_sizes);
  const std::string names = family.dimensions;
  std::string sizes;
  for (int64_t size : family.bench_sizes)
    sizes += (sizes.empty() ? "" : " x ") + std::to_string(size);
  std::string section = "**" + std::string(family.name) + "** " + family.equation + "; " + names +
                        " = " + sizes + ": " + text("%.3g GFLOP, ", 1e-9 * costs.flop) +
                        text("%.3g MB, ", 1e-6 * costs.bytes) +
                        text("at least %.0f us on an H200\n\n", roofline_us(costs, kCards[0]));
  section += "| rung | what is new |";
  for (const CardTimes& card : cards)
    section += " us" + (card.device.empty() ? "" : ", " + card.device) + " | rate | of roofline |";
  section += " registers | spilled bytes | waves |\n| --- | --- |";
  for (size_t i = 0; i < cards.size(); ++i) section += " --- | --- | --- |";
  section += " --- | --- | --- |\n";
  for (const LadderRung& rung : family.rungs)
    section += rung_row(family, rung, costs, measured, cards) + "\n";
  if (!family.library) return section + "\n";
  section += "| " + std::string(family.library_name) + " | The library, through the backend. |";
  for (const CardTimes& card : cards) section += time_cells(card, family, costs, "library");
  return section + " | | |\n\n";
}

}  // namespace

void read_ptxas(std::map<std::string, KernelResources>& kernels, const std::string& path) {
  std::ifstream in(path);
  CHECK(in, "cuda_ladder: cannot read ", path);
  std::string kernel;
  for (std::string line; std::getline(in, line);) {
    if (line.find("Compiling entry function '") != std::string::npos) {
      const size_t from = line.find('\'') + 1;
      kernel = without_parameters(demangled(line.substr(from, line.find('\'', from) - from)));
    }
    if (kernel.empty()) continue;
    if (line.find("bytes spill stores") != std::string::npos)
      kernels[kernel].spilled_bytes =
          number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
    if (line.find("Used ") != std::string::npos) {
      kernels[kernel].registers = number_before(line, " registers");
      kernel.clear();  // what follows is another's
    }
  }
}

void read_results(std::vector<CardTimes>& cards, const std::string& path) {
  std::ifstream in(path);
  CHECK(in, "cuda_ladder: cannot read ", path);
  const nlohmann::json all = nlohmann::json::parse(in, nullptr, false);
  CHECK(!all.is_discarded(), "cuda_ladder: ", path, " is not JSON");
  if (!all.contains("ladder")) return;
  const nlohmann::json& ladder = all["ladder"];
  CardTimes card;
  card.device = ladder.at("device").get<std::string>();
  card.commit = ladder.value("commit", "");
  for (const auto& [name, family] : ladder.at("families").items())
    card.families[name] = {family.at("sizes").get<std::vector<int64_t>>(),
                           family.at("us").get<std::map<std::string, double>>()};
  cards.push_back(card);
}

std::string ladder_markdown(const LadderMeasurements& measured) {
  std::vector<CardTimes> cards = measured.cards;
  std::sort(cards.begin(), cards.end(),
            [](const CardTimes& a, const CardTimes& b) { return a.device < b.device; });
  std::string markdown;
  for (const CardTimes& card : cards)
    markdown += card.device + ": commit " + card.commit + ", bench/cuda_ladder.\n";
  if (cards.empty()) {
    markdown += "No GPU has been timed.\n";
    cards.push_back({});  // a column of dashes
  }
  markdown += "\n";
  for (const LadderFamily& family : ladder_families())
    markdown += family_section(family, measured, cards);
  return markdown;
}

}  // namespace graft
