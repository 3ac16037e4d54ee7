// Hub ids that lie in the local Hugging Face cache. Nothing is ever downloaded.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "models/weights.h"

namespace graft {
namespace {

namespace fs = std::filesystem;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

fs::path hub_cache() {
  if (const std::string cache = environment("HF_HUB_CACHE"); !cache.empty()) return cache;
  if (const std::string home = environment("HF_HOME"); !home.empty()) return fs::path(home) / "hub";
  std::string cache = environment("XDG_CACHE_HOME");
  if (cache.empty()) cache = environment("HOME") + "/.cache";
  return fs::path(cache) / "huggingface" / "hub";
}

// "name" or "owner/name" of letters, digits, '-', '_' and '.', neither part starting with a dot.
bool is_hub_id(const std::string& model) {
  int slashes = 0;
  char previous = '/';
  for (const char c : model) {
    if (c == '/' && (++slashes > 1 || previous == '/')) return false;
    if (c == '.' && previous == '/') return false;
    if (c != '/' && !std::isalnum(uint8_t(c)) && c != '-' && c != '_' && c != '.') return false;
    previous = c;
  }
  return previous != '/';
}

}  // namespace

std::string resolve_model(const std::string& model) {
  CHECK(!model.empty(), "model: the name is empty");
  if (fs::is_directory(model)) return model;
  CHECK(!fs::exists(model), model, ": not a directory; wanted the directory of a model");
  CHECK(is_hub_id(model), model, ": no such directory");

  std::string folder = "models--" + model;
  if (const size_t slash = folder.find('/'); slash != std::string::npos)
    folder.replace(slash, 1, "--");
  const fs::path cached = hub_cache() / folder;
  CHECK(fs::is_directory(cached), model, ": no such directory, and not in the Hugging Face cache ",
        hub_cache().string(), "; download it there first (hf download ", model, ")");
  std::string revision;
  std::ifstream(cached / "refs" / "main") >> revision;
  const bool plain =
      !revision.empty() && revision.find('/') == std::string::npos && revision[0] != '.';
  const fs::path snapshot = cached / "snapshots" / revision;
  CHECK(plain && fs::is_directory(snapshot), model, ": ", cached.string(),
        " has no snapshot for refs/main; download it again (hf download ", model, ")");
  return snapshot.string();
}

}  // namespace graft
