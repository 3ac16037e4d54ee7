#include "tensor/system_memory.h"

#include <algorithm>
#include <fstream>

#include "tensor/check.h"

namespace graft {
namespace {

// The process's path below the root of a hierarchy: "0::/path" for version 2, "7:memory:/path" for
// version 1. A container sees its own group at the root, whatever the path says.
std::string group_path(const std::string& controllers) {
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string names = "," + line.substr(first + 1, second - first - 1) + ",";
    if (names == "," + controllers + "," ||
        (!controllers.empty() && names.find("," + controllers + ",") != std::string::npos))
      return line.substr(second + 1);
  }
  return "/";
}

// What the limit of a group leaves; INT64_MAX without one. Pages of files count as used there,
// though the kernel gives them back: those that nobody has touched of late are free.
int64_t left_in_group(const std::string& folder, const char* limit_file, const char* used_file) {
  int64_t limit = 0, used = 0, reclaimable = 0;
  if (!(std::ifstream(folder + limit_file) >> limit) ||
      !(std::ifstream(folder + used_file) >> used))
    return INT64_MAX;
  std::ifstream stat(folder + "memory.stat");
  int64_t value = 0;
  for (std::string key; stat >> key >> value;)
    if (key == "inactive_file" || key == "active_file") reclaimable += value;
  return std::max<int64_t>(limit - used + reclaimable, 0);
}

}  // namespace

int64_t bytes_available() {
  int64_t available = INT64_MAX;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key; meminfo >> key;) {
    int64_t kilobytes = 0;
    if (key == "MemAvailable:" && meminfo >> kilobytes) available = kilobytes * 1024;
  }
  const std::string root = "/sys/fs/cgroup";
  for (const std::string& path : {std::string("/"), group_path("") + "/"}) {
    const std::string folder = root + path;
    available = std::min(available, left_in_group(folder, "memory.max", "memory.current"));
  }
  for (const std::string& path : {std::string("/"), group_path("memory") + "/"}) {
    const std::string folder = root + "/memory" + path;
    available = std::min(available,
                         left_in_group(folder, "memory.limit_in_bytes", "memory.usage_in_bytes"));
  }
  return available;
}

void check_memory(int64_t bytes, const std::string& what, const std::string& advice) {
  const int64_t available = bytes_available();
  CHECK(bytes <= available, what, ": not enough memory: it takes ", bytes >> 20, " MiB and ",
        available >> 20, " MiB are free; ", advice);
}

}  // namespace graft
