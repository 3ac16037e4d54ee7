#include "tests/cuda/mutants/process.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace graft::mutants {
namespace {

constexpr rlim_t kLargestFile = rlim_t{1} << 30;  // a kernel in an endless loop may print

[[noreturn]] void become(const char* command, const char* log) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  const int fd = open(log, O_CREAT | O_TRUNC | O_WRONLY, 0644);
  dup2(fd, 1);
  dup2(fd, 2);
  const rlimit files = {kLargestFile, kLargestFile}, no_core = {0, 0};
  setrlimit(RLIMIT_FSIZE, &files);
  setrlimit(RLIMIT_CORE, &no_core);
  execl("/bin/sh", "sh", "-c", command, static_cast<char*>(nullptr));
  _exit(127);
}

}  // namespace

Outcome run(const std::string& command, const std::string& log, double limit) {
  using Clock = std::chrono::steady_clock;
  const std::string replacing = "exec " + command;  // so that the shell is gone, and its pid ours
  const auto start = Clock::now();
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("mutants: fork failed");
  if (child == 0) become(replacing.c_str(), log.c_str());
  setpgid(child, child);
  Outcome outcome;
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  int status = 0;
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (elapsed() > limit && !outcome.timed_out) {
      outcome.timed_out = true;
      kill(-child, SIGKILL);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  outcome.seconds = elapsed();
  outcome.ok = !outcome.timed_out && WIFEXITED(status) && WEXITSTATUS(status) == 0;
  return outcome;
}

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("mutants: cannot read " + path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  if (!out.flush()) throw std::runtime_error("mutants: cannot write " + path);
}

}  // namespace graft::mutants
