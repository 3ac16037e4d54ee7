// A file seen as memory, read-only. Pages come from the page cache as they are touched, so a model
// is neither read at once nor held twice, and runs at the same time share one copy.
#pragma once

#include <cstdint>
#include <string>

namespace graft {

class MappedFile {
 public:
  // Throws Error when the file is missing, not a regular file, or cannot be mapped. An empty file
  // has size 0 and data nullptr.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Takes [begin, begin + bytes) out of the process's memory, whole pages of it; who reads there
  // again gets them back from the page cache.
  void forget(const char* begin, int64_t bytes) const;

  const char* data() const { return data_; }
  int64_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  char* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace graft
