#include "tests/cuda/mutants/build.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <sstream>
#include <stdexcept>

#include "tests/cuda/mutants/process.h"

namespace graft::mutants {
namespace {

namespace fs = std::filesystem;

constexpr double kCompileLimit = 600;
constexpr const char* kOriginal = "original";  // the folder of the unchanged tree's objects

std::string filled(std::string text, const std::vector<std::pair<std::string, std::string>>& fill) {
  for (const auto& [name, value] : fill)
    for (size_t at; (at = text.find(name)) != std::string::npos;)
      text.replace(at, name.size(), value);
  return text;
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// build/emu/fast/cuda/rope.cu.o -> cuda/rope.cu, build/emu/fast/tests/cuda/a_test.o ->
// tests/cuda/a_test.cpp
std::string source_of(const std::string& object) {
  const std::string root = "build/emu/";
  const std::string name = object.substr(object.find('/', root.size()) + 1);
  const std::string stem = name.substr(0, name.size() - 2);
  return ends_with(stem, ".cu") ? stem : stem + ".cpp";
}

std::string object_in(const std::string& dir, const Kind& kind, const std::string& source) {
  return dir + "/" + kind.name + "/" + source + ".o";
}

// The test that ran when the program ended.
std::string last_test(const std::string& log) {
  const std::string mark = "[ RUN      ] ";
  const size_t at = log.rfind(mark);
  if (at == std::string::npos) return "before the first test";
  const size_t begin = at + mark.size();
  return log.substr(begin, log.find('\n', begin) - begin);
}

}  // namespace

TestTable::TestTable(const std::string& path) {
  std::istringstream lines(read_file(path));
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line.substr(0, line.find('#')));
    std::string file, filter;
    if (words >> file >> filter) filters_[file] = filter;
  }
  if (!filters_.count("*")) throw std::runtime_error("mutants: " + path + " has no line for *");
}

const std::string& TestTable::filter(const std::string& file) const {
  const auto own = filters_.find(file);
  return own != filters_.end() ? own->second : filters_.at("*");
}

Builder::Builder(std::string folder, std::vector<Kind> kinds, TestTable tests)
    : folder_(std::move(folder)), kinds_(std::move(kinds)), tests_(std::move(tests)) {
  fs::remove_all(folder_);
  fs::create_directories(folder_);
}

std::string Builder::test_command(const std::string& program, const std::string& file) const {
  return program + " --gtest_fail_fast --gtest_throw_on_failure --gtest_filter='" +
         tests_.filter(file) + "'";
}

void Builder::check_unchanged(const std::string& file) {
  for (const Kind& kind : kinds_) {
    const std::string key = kind.name + " " + tests_.filter(file);
    if (limits_.count(key)) continue;
    const std::string program = "build/emu/" + kind.name + "/cuda_tests";
    const std::string log = folder_ + "/" + kind.name + ".log";
    const Outcome outcome = run(test_command(program, file), log, kCompileLimit);
    const std::string text = read_file(log);
    if (!outcome.ok || text.find("[  PASSED  ] 0 tests") != std::string::npos)
      throw std::runtime_error("mutants: the unchanged tree fails, or has no test: " + kind.name +
                               " " + tests_.filter(file) + ", see " + log);
    limits_[key] = 15 + 8 * outcome.seconds;
    std::printf("unchanged, %s: %s passes in %.1f s\n", kind.name.c_str(),
                tests_.filter(file).c_str(), outcome.seconds);
  }
}

// What has to be compiled again: the file, or all that include it.
std::vector<Builder::Unit> Builder::units(const Kind& kind, const std::string& file) const {
  std::vector<Unit> units;
  for (const std::string& object : kind.objects) {
    const std::string source = source_of(object);
    if (ends_with(file, ".cu")) {
      if (source == file) units.push_back({source, object});
      continue;
    }
    std::istringstream depends(read_file(object.substr(0, object.size() - 1) + "d"));
    for (std::string word; depends >> word;)
      if (word == file) {
        units.push_back({source, object});
        break;
      }
  }
  if (units.empty()) throw std::runtime_error("mutants: no object is made from " + file);
  return units;
}

bool Builder::compile(const Kind& kind, const Unit& unit, const std::string& dir,
                      std::string& log) const {
  const std::string object = object_in(dir, kind, unit.source);
  const std::string shadow = dir + "/" + unit.source;
  fs::create_directories(fs::path(object).parent_path());
  const std::string command =
      filled(kind.compile, {{"{dir}", dir},
                            {"{source}", fs::exists(shadow) ? shadow : unit.source},
                            {"{object}", object}});
  const bool ok = run(command, object + ".log", kCompileLimit).ok;
  log += read_file(object + ".log");
  return ok;
}

// Whether the compiler made the same bytes of the changed text. Such a change is none.
bool Builder::same_program(const Kind& kind, const std::vector<Unit>& units,
                           const std::string& dir) {
  for (const Unit& unit : units) {
    const std::string original = folder_ + "/" + kOriginal;
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::string object = object_in(original, kind, unit.source);
    if (!fs::exists(object)) {
      const std::string copy = original + "/" + unit.source;
      fs::create_directories(fs::path(copy).parent_path());
      if (ends_with(unit.source, ".cu")) fs::copy_file(unit.source, copy);
      std::string log;
      if (!compile(kind, unit, original, log))
        throw std::runtime_error("mutants: the unchanged " + unit.source + " fails:\n" + log);
    }
    if (read_file(object) != read_file(object_in(dir, kind, unit.source))) return false;
  }
  return true;
}

bool Builder::link(const Kind& kind, const std::vector<Unit>& units, const std::string& dir) const {
  std::string objects;
  for (const std::string& object : kind.objects) {
    const auto changed = std::find_if(units.begin(), units.end(),
                                      [&](const Unit& unit) { return unit.object == object; });
    objects += " " + (changed == units.end() ? object : object_in(dir, kind, changed->source));
  }
  const std::string program = dir + "/" + kind.name + "/cuda_tests";
  return run(filled(kind.link, {{"{objects}", objects}, {"{program}", program}}), program + ".log",
             kCompileLimit)
      .ok;
}

Verdict Builder::judge(const Site& site, const std::string& original, int number) {
  const std::string dir = folder_ + "/" + std::to_string(number);
  fs::create_directories(fs::path(dir + "/" + site.file).parent_path());
  write_file(dir + "/" + site.file, changed_text(original, site));
  Verdict verdict;
  for (const Kind& kind : kinds_) {
    const bool first = &kind == &kinds_.front();
    const std::vector<Unit> units = this->units(kind, site.file);
    std::string log;
    for (const Unit& unit : units)
      if (!compile(kind, unit, dir, log)) {
        const bool asserted = log.find("static assertion failed") != std::string::npos;
        verdict = {asserted ? Verdict::kCaught : Verdict::kNoCompile, "static_assert"};
        break;
      }
    if (verdict.result != Verdict::kSurvived) break;
    if (first && same_program(kind, units, dir)) {
      verdict.result = Verdict::kSameProgram;
      break;
    }
    if (!link(kind, units, dir)) {
      verdict.result = Verdict::kNoCompile;
      break;
    }
    const std::string program = dir + "/" + kind.name + "/cuda_tests";
    const double limit = limits_.at(kind.name + " " + tests_.filter(site.file));
    const Outcome outcome = run(test_command(program, site.file), dir + "/tests.log", limit);
    if (!outcome.ok) {
      verdict.result = Verdict::kCaught;
      verdict.by = kind.name + ", " + last_test(read_file(dir + "/tests.log")) +
                   (outcome.timed_out ? " (no end)" : "");
      break;
    }
    fs::remove_all(dir + "/" + kind.name);
  }
  if (verdict.result != Verdict::kSurvived) fs::remove_all(dir);
  return verdict;
}

}  // namespace graft::mutants
