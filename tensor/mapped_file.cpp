#include "tensor/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "tensor/check.h"

namespace graft {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  CHECK(fd >= 0, path, ": cannot be opened: ", std::strerror(errno));
  struct stat status {};
  const bool regular = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  size_ = regular ? int64_t(status.st_size) : 0;
  void* mapped = nullptr;
  if (size_ > 0) mapped = mmap(nullptr, size_t(size_), PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  close(fd);  // the mapping holds the file
  CHECK(regular, path, ": not a regular file");
  CHECK(mapped != MAP_FAILED, path, ": cannot be mapped: ", std::strerror(error));
  data_ = static_cast<char*>(mapped);
}

void MappedFile::forget(const char* begin, int64_t bytes) const {
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t from = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(begin) + uintptr_t(bytes)) / page * page;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
}

MappedFile::~MappedFile() {
  if (data_) munmap(data_, size_t(size_));
}

}  // namespace graft
