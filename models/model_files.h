// The files of a model directory beside its weights.
#pragma once

#include <string>

#include "tensor/dtype.h"

namespace graft {

// Copies what belongs to the weights of model_dir into `folder`: tokenizer, generation_config, and
// config.json saying the dtype of the weights that lie beside it and whether embeddings are tied.
// A quantization_config stays behind: what is written is dense.
void copy_model_files(const std::string& model_dir, const std::string& folder, DType dtype,
                      bool tied);

// The topmost directory on the way to `path`, itself included, that is not there; "" if all are.
std::string first_missing(const std::string& path);

// A directory that is filled aside and takes its place in finish(), or vanishes, with all that was
// made on the way to it. An empty one that is there already stays, and gets the files.
class DirectoryAside {
 public:
  // Throws Error if `path` is there and is no empty directory.
  explicit DirectoryAside(const std::string& path);
  ~DirectoryAside();
  DirectoryAside(const DirectoryAside&) = delete;
  const std::string& aside() const { return aside_; }
  void finish();

 private:
  std::string path_, aside_;
  std::string made_;  // the topmost directory that was not there; empty if only path is new
  bool was_there_, finished_ = false;
};

}  // namespace graft
