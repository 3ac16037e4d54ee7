// Keeps what was measured on GPUs, and makes the README's tables from it.
//   gpu_results collect DIR SECTION COMMIT DATE DEVICE   reads rows of JSON from standard input
//   (other
//       lines are passed over) into DIR/<gpu>.json, whose other sections stay; DEVICE is what
//       cuda_kernels --device-info prints. Prints the file's path.
//   gpu_results tables DIR PAGE...                       renews the tables of each page
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "bench/gpu_tables.h"

using namespace graft;

namespace {

namespace fs = std::filesystem;

void collect(const fs::path& directory, const std::string& section, const std::string& commit,
             const std::string& date, const std::string& device_line) {
  const Json device = Json::parse(device_line);
  const fs::path path = directory / file_name_of(device["gpu"].get<std::string>());
  Json result = fs::exists(path) ? Json::parse(read_text(path)) : Json::object();
  result["device"] = device;
  Json rows = Json::array();
  for (std::string line; std::getline(std::cin, line);) {
    const Json row = Json::parse(line, nullptr, false);
    if (row.is_object()) rows.push_back(row);
  }
  result[section] = {
      {"commit", commit}, {"date", date}, {"driver", device.value("driver", "")}, {"rows", rows}};
  if (device.value("cublas", true) == false) result[section]["cublas"] = false;
  fs::create_directories(directory);
  write_text(path, result.dump(1) + "\n");
  std::cout << path.string() << "\n";
}

std::vector<Json> all_results(const fs::path& directory) {
  std::vector<fs::path> paths;
  if (fs::is_directory(directory))
    for (const auto& entry : fs::directory_iterator(directory))
      if (entry.path().extension() == ".json") paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<Json> results;
  for (const fs::path& path : paths) results.push_back(Json::parse(read_text(path)));
  return results;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 7 && !std::strcmp(argv[1], "collect")) {
      collect(argv[2], argv[3], argv[4], argv[5], argv[6]);
    } else if (argc >= 4 && !std::strcmp(argv[1], "tables")) {
      const std::vector<Json> results = all_results(argv[2]);
      for (int i = 3; i < argc; ++i) write_text(argv[i], with_tables(read_text(argv[i]), results));
    } else {
      fail("usage: gpu_results collect DIR SECTION COMMIT DATE DEVICE | tables DIR PAGE...");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_results: %s\n", error.what());
    return 1;
  }
}
