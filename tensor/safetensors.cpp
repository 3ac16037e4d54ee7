#include "tensor/safetensors.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "tensor/check.h"

namespace graft {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation

// Bits of an element of every dtype that the format knows; 0 for a name it does not.
int64_t bits_of(std::string_view dtype) {
  static const std::map<std::string_view, int64_t> bits = {
      {"BOOL", 8},        {"U8", 8},         {"I8", 8},      {"F8_E5M2", 8}, {"F8_E4M3", 8},
      {"F8_E8M0", 8},     {"F4", 4},         {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"I16", 16},
      {"U16", 16},        {"F16", 16},       {"I32", 32},    {"BF16", 16},   {"U32", 32},
      {"F32", 32},        {"I64", 64},       {"U64", 64},    {"F64", 64},    {"C64", 64},
      {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}};
  const auto found = bits.find(dtype);
  return found == bits.end() ? 0 : found->second;
}

// A size or an offset: a JSON integer, not negative. `ok` is cleared otherwise.
int64_t natural(const Json& value, bool& ok) {
  if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<uint64_t>() >> 62) ||
      value.get<int64_t>() < 0) {
    ok = false;
    return 0;
  }
  return value.get<int64_t>();
}

// One entry of the header, its members checked one by one; offsets are checked later, all together.
SafetensorsEntry read_entry(const std::string& path, const std::string& name, const Json& json) {
  SafetensorsEntry entry;
  entry.name = name;
  bool ok = json.is_object() && json.contains("dtype") && json["dtype"].is_string() &&
            json.contains("shape") && json["shape"].is_array() && json.contains("data_offsets") &&
            json["data_offsets"].is_array() && json["data_offsets"].size() == 2;
  CHECK(ok, path, ": tensor '", name, "' has no dtype, shape and two data_offsets in the header");
  entry.dtype = json["dtype"].get<std::string>();
  for (const Json& size : json["shape"]) entry.shape.push_back(natural(size, ok));
  CHECK(ok, path, ": tensor '", name, "' has the shape ", json["shape"].dump(),
        ", wanted whole numbers from 0");
  entry.begin = natural(json["data_offsets"][0], ok);
  entry.end = natural(json["data_offsets"][1], ok);
  CHECK(ok && entry.begin <= entry.end, path, ": tensor '", name, "' has the data_offsets ",
        json["data_offsets"].dump(), ", wanted begin <= end, both from 0");

  const int64_t bits = bits_of(entry.dtype);
  CHECK(bits > 0, path, ": tensor '", name, "' has the unknown dtype '", entry.dtype, "'");
  int64_t total = bits;
  bool empty = false, overflow = false;
  for (const int64_t size : entry.shape) {
    empty |= size == 0;
    overflow |= __builtin_mul_overflow(total, size, &total);
  }
  if (empty) total = 0;
  CHECK(empty || !overflow, path, ": tensor '", name, "' has the shape ", json["shape"].dump(),
        ", more elements than can be counted");
  CHECK(total % 8 == 0 && total / 8 == entry.end - entry.begin, path, ": tensor '", name,
        "' of shape ", json["shape"].dump(), " and dtype ", entry.dtype, " has ",
        entry.end - entry.begin, " bytes, wanted ", total / 8);
  return entry;
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path)
    : file_(std::make_shared<MappedFile>(path)) {
  CHECK(file_->size() >= 8, path, ": truncated: ", file_->size(),
        " bytes, a safetensors file starts with 8 bytes of header length");
  uint64_t length = 0;
  for (int i = 0; i < 8; ++i) length |= uint64_t(uint8_t(file_->data()[i])) << (8 * i);
  CHECK(length <= uint64_t(file_->size() - 8), path, ": the header should have ", length,
        " bytes but the file has ", file_->size(),
        "; it is truncated or not a safetensors file, download it again");
  CHECK(length <= uint64_t(kMaxHeaderBytes), path, ": the header has ", length,
        " bytes, more than ", kMaxHeaderBytes, "; this is not a safetensors file");
  data_start_ = 8 + int64_t(length);
  parse_header(file_->data() + 8, int64_t(length));
  check_layout(file_->size() - data_start_);
}

void SafetensorsFile::parse_header(const char* text, int64_t length) {
  // The JSON library keeps the last of two equal names; a doubled tensor is an error here.
  std::set<std::string> seen;
  std::string doubled;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth == 1 && event == Json::parse_event_t::key) {
      std::string name = parsed.get<std::string>();
      if (!seen.insert(name).second) doubled = std::move(name);
    }
    return depth <= 3;  // nothing in a header is deeper
  };
  Json header;
  try {
    header = Json::parse(text, text + length, watch);
  } catch (const Json::exception& error) {
    fail(path(), ": the header is not JSON (byte ",
         dynamic_cast<const Json::parse_error*>(&error)
             ? dynamic_cast<const Json::parse_error&>(error).byte
             : 0,
         " of ", length, "); the file is damaged or not a safetensors file");
  }
  CHECK(header.is_object(), path(), ": the header is not a JSON object");
  CHECK(doubled.empty(), path(), ": tensor '", doubled, "' is in the header twice");
  for (const auto& [name, value] : header.items()) {
    if (name != "__metadata__") {
      entries_.push_back(read_entry(path(), name, value));
      continue;
    }
    if (value.is_null()) continue;  // as mlx writes it
    CHECK(value.is_object(), path(), ": __metadata__ is not an object of strings");
    for (const auto& [key, text_value] : value.items()) {
      CHECK(text_value.is_string(), path(), ": __metadata__ entry '", key, "' is not a string");
      metadata_[key] = text_value.get<std::string>();
    }
  }
}

// Every byte belongs to exactly one tensor.
void SafetensorsFile::check_layout(int64_t data_bytes) {
  std::sort(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  int64_t at = 0;
  const std::string* previous = nullptr;
  for (const SafetensorsEntry& entry : entries_) {
    CHECK(entry.end <= data_bytes, path(), ": tensor '", entry.name, "' ends at byte ", entry.end,
          " but the file has ", data_bytes, " bytes of data; it is truncated, download it again");
    CHECK(entry.begin >= at, path(), ": tensors '", *previous, "' and '", entry.name,
          "' overlap: the second begins at byte ", entry.begin, ", the first ends at ", at);
    CHECK(entry.begin == at, path(), ": ", entry.begin - at, " bytes before tensor '", entry.name,
          "' belong to no tensor");
    at = entry.end;
    previous = &entry.name;
  }
  CHECK(at == data_bytes, path(), ": the tensors end at byte ", at, " but the file has ",
        data_bytes, " bytes of data");
  for (size_t i = 0; i < entries_.size(); ++i) by_name_[entries_[i].name] = i;
}

const SafetensorsEntry* SafetensorsFile::find(const std::string& name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &entries_[found->second];
}

Tensor SafetensorsFile::tensor(const std::string& name) const {
  const SafetensorsEntry* entry = find(name);
  CHECK(entry, path(), ": tensor '", name, "' is missing (the file has ", entries_.size(), ")");
  CHECK(entry->shape.size() <= size_t(Shape::kMaxRank), path(), ": tensor '", name, "' has rank ",
        entry->shape.size(), ", graft reads up to ", Shape::kMaxRank);
  Shape shape;
  for (const int64_t size : entry->shape) shape.push_back(size);
  for (const DType dtype :
       {DType::F32, DType::BF16, DType::F16, DType::F64, DType::I32, DType::U8}) {
    if (dtype_name(dtype) != entry->dtype) continue;
    const char* data = file_->data() + data_start_ + entry->begin;
    if (reinterpret_cast<uintptr_t>(data) % uintptr_t(dtype_size(dtype)) == 0)
      return Tensor::borrow(data, shape, dtype, file_);
    Tensor copy = Tensor::empty(shape, dtype, Device::CPU, Scope::Weights);
    if (entry->end > entry->begin) std::memcpy(copy.raw(), data, size_t(copy.num_bytes()));
    return copy;
  }
  fail(path(), ": tensor '", name, "' has the dtype ", entry->dtype,
       ", graft reads F32, BF16 and F16");
}

void SafetensorsFile::forget(const std::string& name) const {
  const SafetensorsEntry* entry = find(name);
  if (entry) file_->forget(file_->data() + data_start_ + entry->begin, entry->end - entry->begin);
}

namespace {

// A file that is written beside `path` and takes its place in finish(), or vanishes.
class FileAside {
 public:
  explicit FileAside(const std::string& path) : path_(path), aside_(path + ".tmp") {
    replaces_ = access(path_.c_str(), F_OK) == 0;
    fd_ = open(aside_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    CHECK(fd_ >= 0, path_, ": cannot be written: ", std::strerror(errno));
  }
  ~FileAside() {
    if (fd_ >= 0) close(fd_);
    if (!finished_) unlink(aside_.c_str());
  }
  void write(const void* data, int64_t bytes) {
    const char* at = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = ::write(fd_, at, size_t(std::min<int64_t>(bytes, 1 << 30)));
      if (written < 0 && errno == EINTR) continue;
      CHECK(written > 0, path_, ": cannot be written: ", std::strerror(errno), unchanged());
      at += written;
      bytes -= written;
    }
  }
  void finish() {
    bool ok = fsync(fd_) == 0;
    ok = (close(fd_) == 0) && ok;
    fd_ = -1;
    ok = ok && rename(aside_.c_str(), path_.c_str()) == 0;
    CHECK(ok, path_, ": cannot be written: ", std::strerror(errno), unchanged());
    finished_ = true;
    // The rename itself lasts only once the directory is on the disk too.
    const size_t slash = path_.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
    const int directory = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory >= 0) {
      fsync(directory);
      close(directory);
    }
  }

 private:
  const char* unchanged() const {
    return replaces_ ? "; the file that was there before is unchanged" : "";
  }
  std::string path_, aside_;
  bool replaces_ = false;
  int fd_ = -1;
  bool finished_ = false;
};

}  // namespace

void write_safetensors(const std::string& path, std::vector<TensorToMake> tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorToMake& a, const TensorToMake& b) {
    const int64_t a_size = dtype_size(a.dtype), b_size = dtype_size(b.dtype);
    return a_size != b_size ? a_size > b_size : a.name < b.name;
  });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t at = 0;
  for (const TensorToMake& tensor : tensors) {
    CHECK(!header.contains(tensor.name), path, ": two tensors named '", tensor.name, "'");
    nlohmann::ordered_json shape = nlohmann::ordered_json::array();
    for (int i = 0; i < tensor.shape.rank(); ++i) shape.push_back(tensor.shape[i]);
    const int64_t end = at + tensor.shape.num_elements() * dtype_size(tensor.dtype);
    header[tensor.name] = {{"dtype", std::string(dtype_name(tensor.dtype))},
                           {"shape", std::move(shape)},
                           {"data_offsets", {at, end}}};
    at = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the data starts on a multiple of 8

  FileAside file(path);
  uint8_t length[8];
  for (int i = 0; i < 8; ++i) length[i] = uint8_t(uint64_t(text.size()) >> (8 * i));
  file.write(length, 8);
  file.write(text.data(), int64_t(text.size()));
  for (const TensorToMake& tensor : tensors) {
    const Tensor made = tensor.make();
    CHECK(made.shape() == tensor.shape, path, ": tensor '", tensor.name, "' was made ",
          made.shape(), ", wanted ", tensor.shape);
    Tensor dense = made.to(tensor.dtype, Scope::Scratch).to(Device::CPU, Scope::Scratch);
    if (!dense.is_contiguous()) dense = dense.clone(Scope::Scratch);
    if (dense.num_bytes() > 0) file.write(dense.raw(), dense.num_bytes());
  }
  file.finish();
}

void write_safetensors(const std::string& path, std::vector<NamedTensor> tensors,
                       std::optional<DType> dtype,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorToMake> given;
  for (const auto& [name, tensor] : tensors)
    given.push_back({name, tensor.shape(), dtype.value_or(tensor.dtype()),
                     [tensor = tensor] { return tensor; }});
  write_safetensors(path, std::move(given), metadata);
}

void write_file_atomically(const std::string& path, std::string_view content) {
  FileAside file(path);
  file.write(content.data(), int64_t(content.size()));
  file.finish();
}

}  // namespace graft
