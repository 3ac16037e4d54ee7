#include "train/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tensor/backend.h"
#include "tensor/mapped_file.h"
#include "tensor/safetensors.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
constexpr const char* kPrefix = "checkpoint-";
constexpr const char* kState = "trainer_state.json";
constexpr const char* kOptimizer = "optimizer.safetensors";

std::string hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", (unsigned long long)value);
  return text;
}

void sync_folder(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY);
  CHECK(fd >= 0, path, ": cannot be opened: ", std::strerror(errno));
  const int result = fsync(fd);
  close(fd);
  CHECK(result == 0, path, ": cannot be synchronised: ", std::strerror(errno));
}

// The number of a folder called checkpoint-N; nothing for any other name.
std::optional<int64_t> checkpoint_number(const fs::path& path) {
  const std::string name = path.filename();
  const size_t prefix = std::strlen(kPrefix);
  if (name.rfind(kPrefix, 0) != 0) return {};
  int64_t number;
  const char* end = name.data() + name.size();
  const auto [parsed, error] = std::from_chars(name.data() + prefix, end, number);
  if (error != std::errc() || parsed != end) return {};
  return number;
}

// Numbers and folders, newest first.
std::vector<std::pair<int64_t, std::string>> list_checkpoints(const std::string& output_dir) {
  std::vector<std::pair<int64_t, std::string>> found;
  for (const auto& entry : fs::directory_iterator(output_dir))
    if (const auto number = checkpoint_number(entry.path()); number && entry.is_directory())
      found.emplace_back(*number, entry.path());
  std::sort(found.rbegin(), found.rend());
  return found;
}

Json to_json(const TrainerState& state) {
  Json keys = Json::object();
  for (const auto& [name, value] : state.result_keys) keys[name] = value;
  const auto loss = [](const std::optional<double>& value) {
    return value ? Json(*value) : Json();
  };
  return {{"step", state.step},
          {"epoch", state.epoch},
          {"position", state.position},
          {"num_tokens", state.num_tokens},
          {"num_label_tokens", state.num_label_tokens},
          {"unlogged_loss", state.unlogged_loss},
          {"unlogged_label_tokens", state.unlogged_label_tokens},
          {"first_eval_loss", loss(state.first_eval_loss)},
          {"last_eval_loss", loss(state.last_eval_loss)},
          {"last_eval_step", state.last_eval_step},
          {"result_keys", keys}};
}

Json read_state(const std::string& checkpoint) {
  const std::string path = checkpoint + "/" + kState;
  std::ifstream file(path, std::ios::binary);
  CHECK(file, path, ": is missing");
  Json object = Json::parse(file, nullptr, /*allow_exceptions=*/false);
  CHECK(object.is_object(), path, ": is not JSON");
  return object;
}

// Throws Error with what is wrong when the files are not those that were written. Without contents:
// sizes alone, at no cost.
void check_whole(const std::string& checkpoint, bool contents) {
  const Json state = read_state(checkpoint);
  try {
    CHECK(!state.at("files").empty(), kState, " lists no files");
    for (const auto& [name, file] : state.at("files").items()) {
      const std::string path = checkpoint + "/" + name;
      const auto bytes = file.at("bytes").get<uint64_t>();
      CHECK(fs::exists(path), name, " is missing");
      CHECK(fs::file_size(path) == bytes, name, " has ", fs::file_size(path), " of ", bytes,
            " bytes");
      CHECK(!contents || hex(hash_file(path)) == file.at("hash").get<std::string>(), name,
            " is damaged");
    }
  } catch (const nlohmann::json::exception&) {
    fail(kState, " is not whole");
  }
  load_trainer_state(checkpoint);
}

bool looks_whole(const std::string& checkpoint) {
  try {
    check_whole(checkpoint, /*contents=*/false);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

void write_checkpoint(const std::string& folder, const TrainerState& state,
                      ParameterBuffer& parameters,
                      const std::function<void(const std::string&)>& save_model) {
  fs::create_directories(folder);
  save_model(folder);
  std::vector<NamedTensor> optimizer;
  for (const auto& [name, tensor] : parameters.state()) optimizer.push_back({name, tensor});
  write_safetensors(folder + "/" + kOptimizer, std::move(optimizer));
  Json object = to_json(state);
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  for (const std::string& name : names) {
    const std::string path = folder + "/" + name;
    object["files"][name] = {{"bytes", fs::file_size(path)}, {"hash", hex(hash_file(path))}};
  }
  write_file_atomically(folder + "/" + kState, object.dump(2) + "\n");
  sync_folder(folder);
}

}  // namespace

uint64_t hash_file(const std::string& path) {
  const MappedFile file(path);
  uint64_t hash = 0xcbf29ce484222325u ^ uint64_t(file.size());  // FNV-1a, eight bytes at a time
  for (int64_t i = 0; i < file.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, file.data() + i, size_t(std::min<int64_t>(8, file.size() - i)));
    hash = (hash ^ word) * 0x100000001b3u;
    hash ^= hash >> 32;  // so that the upper bytes of a word reach the lower bits
  }
  return hash;
}

std::string save_checkpoint(const std::string& output_dir, const TrainerState& state,
                            ParameterBuffer& parameters, int64_t save_total_limit,
                            const std::function<void(const std::string& folder)>& save_model) {
  const std::string final_path = output_dir + "/" + kPrefix + std::to_string(state.step);
  const std::string aside = final_path + ".tmp";
  fs::remove_all(aside);
  try {
    write_checkpoint(aside, state, parameters, save_model);
  } catch (const std::exception& error) {
    std::error_code ignored;
    fs::remove_all(aside, ignored);
    fail("checkpoint: ", error.what());
  }
  fs::remove_all(final_path);  // a torn one from before
  fs::rename(aside, final_path);
  sync_folder(output_dir);

  if (save_total_limit > 0) {
    // Torn ones don't count: they must not take the place of one that can be resumed from.
    int64_t kept = 0;
    for (const auto& [number, folder] : list_checkpoints(output_dir))
      if (looks_whole(folder) && ++kept > save_total_limit) fs::remove_all(folder);
  }
  return final_path;
}

std::optional<std::string> newest_checkpoint(const std::string& output_dir,
                                             const std::function<void(const std::string&)>& say) {
  if (!fs::is_directory(output_dir)) return {};
  for (const auto& entry : fs::directory_iterator(output_dir)) {
    const std::string name = entry.path().filename();
    if (name.rfind(kPrefix, 0) == 0 && entry.path().extension() == ".tmp")
      say("resume: passing over " + name + ": it was never finished");
  }
  for (const auto& [number, folder] : list_checkpoints(output_dir)) {
    try {
      check_whole(folder, /*contents=*/true);
      return folder;
    } catch (const std::exception& error) {
      say(concat("resume: passing over ", kPrefix, number, ": ", error.what()));
    }
  }
  return {};
}

TrainerState load_trainer_state(const std::string& checkpoint) {
  const Json object = read_state(checkpoint);
  TrainerState state;
  try {
    const auto loss = [&](const char* key) -> std::optional<double> {
      if (object.at(key).is_null()) return {};
      return object.at(key).get<double>();
    };
    state.step = object.at("step");
    state.epoch = object.at("epoch");
    state.position = object.at("position");
    state.num_tokens = object.at("num_tokens");
    state.num_label_tokens = object.at("num_label_tokens");
    state.unlogged_loss = object.at("unlogged_loss");
    state.unlogged_label_tokens = object.at("unlogged_label_tokens");
    state.first_eval_loss = loss("first_eval_loss");
    state.last_eval_loss = loss("last_eval_loss");
    state.last_eval_step = object.at("last_eval_step");
    for (const auto& [name, value] : object.at("result_keys").items())
      state.result_keys.emplace_back(name, value.get<std::string>());
  } catch (const nlohmann::json::exception&) {
    fail(checkpoint, "/", kState, ": is not whole");
  }
  return state;
}

void load_optimizer(ParameterBuffer& parameters, const std::string& checkpoint) {
  const SafetensorsFile file(checkpoint + "/" + kOptimizer);
  for (auto& [name, destination] : parameters.state()) {
    const Tensor saved = file.tensor(name);
    CHECK(saved.shape() == destination.shape(), file.path(), ": ", name, " has ",
          saved.num_elements(), " elements, but ", destination.num_elements(), " are trained here");
    backend_of(destination).copy(destination, saved);
  }
  parameters.publish();
}

void check_same_run(const TrainerState& saved,
                    const std::vector<std::pair<std::string, std::string>>& result_keys,
                    const std::string& checkpoint) {
  const std::map<std::string, std::string> before(saved.result_keys.begin(),
                                                  saved.result_keys.end());
  std::string differences;
  for (const auto& [name, value] : result_keys) {
    const auto found = before.find(name);
    const std::string old = found == before.end() ? "unset" : found->second;
    if (old == value) continue;
    differences +=
        (differences.empty() ? "" : ", ") + name + " (was " + old + ", now " + value + ")";
  }
  CHECK(differences.empty(), "resume: ", checkpoint, " belongs to another run: ", differences,
        "; set them back, or train into another output_dir");
}

}  // namespace graft
