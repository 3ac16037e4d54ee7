// The safetensors format: 8 bytes of header length, a JSON header {name: {dtype, shape,
// data_offsets}}, and the bytes of the tensors. Files are mapped and tensors used in place; what a
// file says about itself is checked in full before any of it is believed.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tensor/mapped_file.h"
#include "tensor/tensor.h"

namespace graft {

// One tensor as the header describes it. The dtype is the header's spelling: a file may hold types
// (I64, F8_E4M3) that graft names but does not compute with.
struct SafetensorsEntry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;  // bytes from the end of the header
};

class SafetensorsFile {
 public:
  // Throws Error, one line with the path, for a file that is missing, truncated or does not hold
  // together: header longer than the file or not JSON, doubled names, unknown dtypes, offsets that
  // overlap, leave holes, lie outside the file or disagree with shape and dtype.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_->path(); }
  // In the order of their bytes in the file.
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }
  const SafetensorsEntry* find(const std::string& name) const;  // nullptr: not there
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // The bytes of an entry of this file, as they are: entry.end - entry.begin of them.
  const char* bytes(const SafetensorsEntry& entry) const {
    return file_->data() + data_start_ + entry.begin;
  }

  // The tensor in place: its bytes are the file's, and the mapping lives as long as the tensor. One
  // that does not lie on a multiple of its element size is copied. Throws Error for a missing name,
  // for a rank above 4 and for dtypes other than F32, F16, BF16, F64, I32 and U8.
  Tensor tensor(const std::string& name) const;
  void forget(const std::string& name) const;  // MappedFile::forget on its bytes

 private:
  void parse_header(const char* text, int64_t length);
  void check_layout(int64_t data_bytes);

  std::shared_ptr<const MappedFile> file_;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, size_t> by_name_;
  std::map<std::string, std::string> metadata_;
  int64_t data_start_ = 0;
};

struct NamedTensor {
  std::string name;
  Tensor tensor;
};

// Writes the tensors, each converted to `dtype` (unset: as it is) on the way, so that no second
// copy of all exists. Widest dtype first, then by name: the same tensors give the same bytes.
// Written aside, synchronised and renamed: when anything fails (disk full) there is an Error, the
// file that was there before is as it was, and nothing is left beside it.
void write_safetensors(const std::string& path, std::vector<NamedTensor> tensors,
                       std::optional<DType> dtype = {},
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

// The same for tensors that are made one at a time, while the file is written: make() gives a
// tensor of this shape, in any dtype, and is called once, in the order of the file.
struct TensorToMake {
  std::string name;
  Shape shape;
  DType dtype;  // in the file
  std::function<Tensor()> make;
};
void write_safetensors(const std::string& path, std::vector<TensorToMake> tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

// The file discipline alone: `content` to `path`, aside, synchronised and renamed.
void write_file_atomically(const std::string& path, std::string_view content);

}  // namespace graft
