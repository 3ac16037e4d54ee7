// From addresses of code to names and lines, by addr2line: a report is worth a quarter of a second,
// a launch that goes well is not.
#include <unistd.h>

#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "cuda/emulator/internal.h"

extern "C" char __executable_start;

namespace emu {
namespace {

// "void graft::(anonymous namespace)::sum_kernel<float, 4>(float*, int)" -> "sum_kernel<float, 4>"
std::string short_name(std::string name) {
  for (const char* noise : {"(anonymous namespace)::", "graft::"})
    for (size_t at; (at = name.find(noise)) != std::string::npos;)
      name.erase(at, std::string(noise).size());
  int depth = 0;  // the parameters begin at the first '(' outside of <>
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (depth == 0 && name[i] == '(') name.resize(i);
  }
  return name.starts_with("void ") ? name.substr(5) : name;
}

std::vector<Frame> ask_addr2line(const void* pc) {
  char exe[4096];
  const ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
  exe[n > 0 ? n : 0] = 0;
  const size_t offset = static_cast<size_t>(static_cast<const char*>(pc) - &__executable_start);
  char command[4300], line[4096];
  std::snprintf(command, sizeof command, "addr2line -iCfe '%s' 0x%zx 2>/dev/null", exe, offset);
  std::vector<Frame> frames;
  FILE* pipe = popen(command, "r");
  if (!pipe) return frames;
  while (std::fgets(line, sizeof line, pipe)) {  // function, then file:line, innermost first
    std::string function(line);
    if (!std::fgets(line, sizeof line, pipe)) break;
    std::string place(line);
    function.resize(function.find_last_not_of('\n') + 1);
    place.resize(std::min(place.find_first_of(" \n"), place.size()));  // drops (discriminator 3)
    frames.push_back({short_name(function), place});
  }
  pclose(pipe);
  return frames;
}

}  // namespace

const std::vector<Frame>& frames_at(const void* pc) {
  static auto& known = *new std::map<const void*, std::vector<Frame>>;
  auto it = known.find(pc);
  return it != known.end() ? it->second : known[pc] = ask_addr2line(pc);
}

std::string kernel_name(const void* kernel) {
  const std::vector<Frame>& frames = frames_at(kernel);
  return frames.empty() ? "?" : frames.back().function;
}

}  // namespace emu
