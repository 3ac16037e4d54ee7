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

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

struct Frame {
  std::string function, place;  // "sum_kernel<4>", "/path/sum.cu:17"
};
using Frames = std::vector<Frame>;  // innermost (inlined) first

// One process for all addresses.
std::vector<Frames> ask_addr2line(const std::vector<const void*>& addresses) {
  std::vector<Frames> all;
  char exe[4096];
  const ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
  std::string command = "addr2line -aiCfe '" + std::string(exe, n > 0 ? size_t(n) : 0) + "'";
  for (const void* p : addresses) {
    char offset[32];
    std::snprintf(offset, sizeof offset, " 0x%zx",
                  static_cast<size_t>(static_cast<const char*>(p) - &__executable_start));
    command += offset;
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  std::string function;
  for (char line[4096]; pipe && std::fgets(line, sizeof line, pipe);) {
    std::string text(line);
    if (text.starts_with("0x")) {
      all.emplace_back();
    } else if (function.empty()) {  // a function, then file:line
      function = short_name(text.substr(0, text.find_last_not_of('\n') + 1));
    } else if (!all.empty()) {  // without "(discriminator 3)"
      all.back().push_back({function, text.substr(0, text.find_first_of(" \n"))});
      function.clear();
    }
  }
  if (pipe) pclose(pipe);
  all.resize(addresses.size());
  return all;
}

std::vector<Frames> frames_at(const std::vector<const void*>& addresses) {
  static auto& known = *new std::map<const void*, Frames>;
  std::vector<const void*> unknown;
  for (const void* p : addresses)
    if (!known.count(p)) unknown.push_back(p);
  if (!unknown.empty()) {
    const std::vector<Frames> found = ask_addr2line(unknown);
    for (size_t i = 0; i < unknown.size(); ++i) known[unknown[i]] = found[i];
  }
  std::vector<Frames> all;
  for (const void* p : addresses) all.push_back(known[p]);
  return all;
}

}  // namespace

std::string describe(const Where& where) {
  return base_name(where.file) + ":" + std::to_string(where.line);
}

std::string kernel_name(const void* kernel) {
  const Frames frames = frames_at({kernel})[0];
  if (frames.empty()) return "?";
  return frames.back().function + " (" + base_name(frames.back().place) + ")";
}

std::string place_in_kernel(const std::vector<void*>& return_addresses, const void* kernel) {
  std::vector<const void*> calls;  // a return address may belong to the next line
  for (void* p : return_addresses) calls.push_back(static_cast<const char*>(p) - 1);
  const Frames outermost = kernel ? frames_at({kernel})[0] : Frames{};
  std::string text;
  for (const Frames& frames : frames_at(calls))
    for (const Frame& f : frames) {
      if (f.place.find("cuda/emulator/") != std::string::npos || f.place.starts_with("/usr/") ||
          f.place.starts_with("?"))
        continue;
      text += (text.empty() ? "" : ", called at ") + base_name(f.place);
      if (!outermost.empty() && f.function == outermost.back().function) return text;
    }
  return text;
}

}  // namespace emu
