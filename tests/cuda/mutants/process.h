// Shell commands with a time limit.
#pragma once

#include <string>

namespace graft::mutants {

struct Outcome {
  bool ok = false, timed_out = false;
  double seconds = 0;
};

// Runs `command` by /bin/sh with its output in the file `log`; after `limit` seconds it is killed
// with all that it started. It dies with this process.
Outcome run(const std::string& command, const std::string& log, double limit);

std::string read_file(const std::string& path);
void write_file(const std::string& path, const std::string& text);

}  // namespace graft::mutants
