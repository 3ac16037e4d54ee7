// A mutant from its text to a verdict: compile the changed file, link it with the objects of the
// normal builds, run the tests that concern it.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "tests/cuda/mutants/sites.h"

namespace graft::mutants {

// One of the three emulated builds, as the Makefile describes it. In `compile` stand {dir} for the
// mutant's folder, {source} and {object}; in `link` {objects} and {program}.
struct Kind {
  std::string name, compile, link;
  std::vector<std::string> objects;  // of the unchanged tree, in build/emu/NAME
};

// tests.txt: which tests concern which file. A line is `file filter`, '#' begins a comment; the
// file `*` stands for all that have no line of their own.
class TestTable {
 public:
  explicit TestTable(const std::string& path);
  const std::string& filter(const std::string& file) const;

 private:
  std::map<std::string, std::string> filters_;
};

struct Verdict {
  enum Result { kNoCompile, kSameProgram, kCaught, kSurvived } result = kSurvived;
  std::string by;  // kCaught: the build and the test
};

class Builder {
 public:
  Builder(std::string folder, std::vector<Kind> kinds, TestTable tests);

  // Runs the tests of `file` in all kinds on the unchanged tree; throws unless they pass. What they
  // take is the measure for endless loops later.
  void check_unchanged(const std::string& file);

  // The verdict on one mutant, built in folder/`number`.
  Verdict judge(const Site& site, const std::string& original, int number);

 private:
  struct Unit {
    std::string source, object;  // object: of the unchanged tree
  };
  std::vector<Unit> units(const Kind& kind, const std::string& file) const;
  bool compile(const Kind& kind, const Unit& unit, const std::string& dir, std::string& log) const;
  bool same_program(const Kind& kind, const std::vector<Unit>& units, const std::string& dir);
  bool link(const Kind& kind, const std::vector<Unit>& units, const std::string& dir) const;
  std::string test_command(const std::string& program, const std::string& file) const;

  std::string folder_;
  std::vector<Kind> kinds_;
  TestTable tests_;
  std::map<std::string, double> limits_;  // kind and filter -> seconds
  std::mutex mutex_;
};

}  // namespace graft::mutants
