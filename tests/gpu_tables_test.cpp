// The tables of README.md that are made from bench/results/*.json.
#include "bench/gpu_tables.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace graft {
namespace {

Json row(const std::string& who, double tok_s, bool utilisation) {
  Json json = {{"who", who}, {"model", "m"}, {"seq", 2048}, {"batch", 8}, {"checkpoint", false}};
  if (tok_s > 0) {
    json["tok_s"] = tok_s;
    json["peak_gpu_gib"] = {{"at_once", tok_s / 1000}};
    if (utilisation) json["utilisation"] = tok_s / 1e4;
  } else {
    json["error"] = "out of memory";
  }
  return json;
}

Json result_with(const std::string& section, const std::vector<Json>& rows) {
  Json result = {{"device", {{"gpu", "NVIDIA X1"}}}};
  result[section] = {
      {"commit", "abc"}, {"date", "2030-01-02"}, {"driver", "580.1"}, {"rows", rows}};
  return result;
}

TEST(GpuTables, GiveMediansOverTheRoundsAndRatiosOfThem) {
  const Json result = result_with(
      "peers", {row("graft", 6000, true), row("peft", 1000, false), row("graft", 2000, true),
                row("peft", 3000, false), row("graft", 4500, true)});
  EXPECT_EQ(step_table(result),
            "| case | who | tokens/s | graft is faster by | utilisation | peak, GiB |\n"
            "| --- | --- | --- | --- | --- | --- |\n"
            "| m, 16384 tokens | graft | 4500 |  | 45 % | 6.0 |\n"
            "| m, 16384 tokens | peft | 2000 | 2.25 |  | 3.0 |\n");
}

TEST(GpuTables, TellMethodsApart) {
  Json other = row("graft", 100, true), peer = row("peft", 50, false);
  other["method"] = peer["method"] = "qlora";
  const std::string table =
      step_table(result_with("peers", {row("graft", 6000, true), other, peer}));
  EXPECT_NE(table.find("| m, 16384 tokens | graft | 6000 |"), std::string::npos) << table;
  EXPECT_NE(table.find("| m, qlora, 16384 tokens | peft | 50 | 2.00 |"), std::string::npos)
      << table;
}

TEST(GpuTables, GiveNoRatioWhereOneOfTheTwoFailed) {
  const std::string ours =
      step_table(result_with("peers", {row("graft", 6000, true), row("peft", 0, false)}));
  EXPECT_NE(ours.find("| m, 16384 tokens | peft | out of memory |  |  |  |\n"), std::string::npos);
  const std::string theirs =
      step_table(result_with("peers", {row("graft", 0, true), row("peft", 3000, false)}));
  EXPECT_NE(theirs.find("| peft | 3000 |  |  | 3.0 |\n"), std::string::npos);
}

TEST(GpuTables, TakeFromTheStepSectionOnlyCasesThatPeersLacks) {
  Json result = result_with("peers", {row("graft", 6000, true)});
  Json other = row("graft", 100, true);
  other["batch"] = 1;
  result["step"] = {{"rows", Json::array({row("graft", 7777, true), other})}};
  const std::string table = step_table(result);
  EXPECT_EQ(table.find("7777"), std::string::npos);
  EXPECT_NE(table.find("| m, 2048 tokens | graft | 100 |"), std::string::npos);
}

TEST(GpuTables, CompareAMethodWithTheSameMethodOfThePeer) {
  std::vector<Json> rows;
  for (const char* method : {"lora", "dora"})
    for (const char* who : {"graft", "peft"}) {
      Json one = row(who, who[0] == 'g' ? 6000 : method[0] == 'l' ? 3000 : 2000, false);
      one["method"] = method;
      rows.push_back(one);
    }
  const std::string table = step_table(result_with("peers", rows));
  EXPECT_NE(table.find("| m, 16384 tokens | peft | 3000 | 2.00 |"), std::string::npos) << table;
  EXPECT_NE(table.find("| m, dora, 16384 tokens | peft | 2000 | 3.00 |"), std::string::npos)
      << table;
}

TEST(GpuTables, ReplaceOnlyWhatStandsBetweenTheirMarkers) {
  const std::string page = "before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n";
  EXPECT_EQ(with_tables(page, {}),
            "before\n<!-- gpu -->\nNo GPU has been measured yet.\n<!-- /gpu -->\nafter\n");
  const std::vector<Json> results = {result_with("step", {row("graft", 6000, true)})};
  const std::string once = with_tables(page, results);
  EXPECT_EQ(with_tables(once, results), once);
  EXPECT_NE(once.find("**NVIDIA X1** (2030-01-02, commit abc, driver 580.1)"), std::string::npos);
  std::vector<Json> own = results;
  own[0]["step"]["cublas"] = false;
  EXPECT_NE(with_tables(page, own).find("driver 580.1, without cuBLAS: products by graft's own"),
            std::string::npos);
  EXPECT_THROW(with_tables("no markers", results), Error);
  EXPECT_THROW(with_tables("<!-- gpu -->\nnot closed", results), Error);
}

TEST(GpuTables, ListTheKernelsOfTheLastModel) {
  const Json result = result_with(
      "bench",
      {{{"roofline", "copy"}, {"gb_s", 3000.0}},
       {{"kernel", "add"}, {"model", "small"}, {"shape", "s"}, {"us", 1.0}, {"share", 0.5}},
       {{"kernel", "add"},
        {"model", "large"},
        {"shape", "T 9"},
        {"us", 12.34},
        {"gb_s", 1500.0},
        {"share", 0.5}}});
  const std::string text = kernel_section({result});
  EXPECT_NE(text.find("; copy 3000 GB/s; large\n"), std::string::npos) << text;
  EXPECT_NE(text.find("| add | T 9 | 12.3 | 1500 |  | 50 % |\n"), std::string::npos) << text;
  EXPECT_EQ(text.find("| s |"), std::string::npos) << text;
}

TEST(GpuTables, InTheReadmesAreThoseOfTheResults) {
  const auto read = [](const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  std::vector<std::filesystem::path> paths;
  if (std::filesystem::is_directory("bench/results"))
    for (const auto& entry : std::filesystem::directory_iterator("bench/results"))
      if (entry.path().extension() == ".json") paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<Json> results;
  for (const auto& path : paths) results.push_back(Json::parse(read(path)));
  for (const char* page : {"README.md", "bench/README.md"})
    EXPECT_EQ(with_tables(read(page), results), read(page)) << "make gpu-tables mends it";
}

TEST(GpuTables, NameFilesByTheGpu) {
  EXPECT_EQ(file_name_of("NVIDIA H100 80GB HBM3"), "nvidia-h100-80gb-hbm3.json");
  EXPECT_EQ(file_name_of("NVIDIA RTX 6000 (Ada)"), "nvidia-rtx-6000-ada.json");
  EXPECT_THROW(file_name_of("--"), Error);
}

}  // namespace
}  // namespace graft
