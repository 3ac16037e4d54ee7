#include "cuda/blas.h"

#include <dlfcn.h>
#include <glob.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "tensor/check.h"

namespace graft {
namespace {

#if defined(CUDA_EMU)

bool open_cublas(CublasFunctions& functions, std::string&) {
  functions = {cublasCreate,       cublasDestroy, cublasSetStream,
               cublasSetWorkspace, cublasGemmEx,  "the emulator's"};
  return true;
}

bool open_cublas_lt(CublasLtFunctions& f, const std::string&) {
  f = {cublasLtCreate,
       cublasLtGetVersion,
       cublasLtMatmulDescCreate,
       cublasLtMatmulDescDestroy,
       cublasLtMatmulDescSetAttribute,
       cublasLtMatrixLayoutCreate,
       cublasLtMatrixLayoutDestroy,
       cublasLtMatmulPreferenceCreate,
       cublasLtMatmulPreferenceDestroy,
       cublasLtMatmulPreferenceSetAttribute,
       cublasLtMatmulAlgoGetHeuristic,
       cublasLtMatmul};
  return true;
}

#else

template <class Function>
bool find(Function& function, void* library, const char* symbol) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  return function != nullptr;
}

// The names that cublas_v2.h gives are macros of some of these symbols.
bool bind(CublasFunctions& functions, void* library) {
  return find(functions.create, library, "cublasCreate_v2") &&
         find(functions.destroy, library, "cublasDestroy_v2") &&
         find(functions.set_stream, library, "cublasSetStream_v2") &&
         find(functions.set_workspace, library, "cublasSetWorkspace_v2") &&
         find(functions.gemm_ex, library, "cublasGemmEx");
}

bool bind(CublasLtFunctions& f, void* library) {
  return find(f.create, library, "cublasLtCreate") &&
         find(f.version, library, "cublasLtGetVersion") &&
         find(f.create_desc, library, "cublasLtMatmulDescCreate") &&
         find(f.destroy_desc, library, "cublasLtMatmulDescDestroy") &&
         find(f.set_desc, library, "cublasLtMatmulDescSetAttribute") &&
         find(f.create_layout, library, "cublasLtMatrixLayoutCreate") &&
         find(f.destroy_layout, library, "cublasLtMatrixLayoutDestroy") &&
         find(f.create_preference, library, "cublasLtMatmulPreferenceCreate") &&
         find(f.destroy_preference, library, "cublasLtMatmulPreferenceDestroy") &&
         find(f.set_preference, library, "cublasLtMatmulPreferenceSetAttribute") &&
         find(f.find_algorithms, library, "cublasLtMatmulAlgoGetHeuristic") &&
         find(f.matmul, library, "cublasLtMatmul");
}

void add_matches(std::vector<std::string>& files, const std::string& pattern) {
  glob_t found{};
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0)
    for (size_t i = 0; i < found.gl_pathc; ++i) files.emplace_back(found.gl_pathv[i]);
  globfree(&found);
}

// Files of the library in the order of preference: this toolkit's major version first.
std::vector<std::string> candidates() {
  std::vector<std::string> files;
  if (const char* chosen = std::getenv("GRAFT_CUBLAS"); chosen && *chosen) return {chosen};
  const auto environment = [](const char* name) -> std::string {
    const char* value = std::getenv(name);
    return value ? value : "";
  };
  for (const char* version : {"13", "12"}) {
    const std::string file = concat("libcublas.so.", version);
    for (const char* home : {"CUDA_HOME", "CUDA_PATH"})
      if (!environment(home).empty()) files.push_back(environment(home) + "/lib64/" + file);
    files.push_back("/usr/local/cuda/lib64/" + file);
    add_matches(files, concat("/usr/local/cuda-", version, "*/lib64/", file));
    files.push_back(file);  // wherever the loader looks
    // PyTorch's packages: nvidia/cublas/lib (CUDA 12), nvidia/cu13/lib (CUDA 13).
    std::vector<std::string> packages;
    for (const char* home : {"VIRTUAL_ENV", "CONDA_PREFIX"})
      if (!environment(home).empty())
        packages.push_back(environment(home) + "/lib/python3*/site-packages");
    if (!environment("HOME").empty())
      packages.push_back(environment("HOME") + "/.local/lib/python3*/site-packages");
    for (const char* folder :
         {"/usr/local/lib/python3*/dist-packages", "/usr/local/lib/python3*/site-packages",
          "/usr/lib/python3*/site-packages", "/usr/lib/python3/dist-packages",
          "/opt/conda/lib/python3*/site-packages", "/opt/venv/lib/python3*/site-packages"})
      packages.emplace_back(folder);
    for (const std::string& folder : packages) add_matches(files, folder + "/nvidia/*/lib/" + file);
  }
  return files;
}

bool open_cublas(CublasFunctions& functions, std::string& reason) {
  const std::vector<std::string> files = candidates();
  for (const std::string& file : files) {
    // cublasLt lies beside it and is found by its own run path.
    void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) continue;
    if (bind(functions, library)) {
      functions.path = file;
      return true;
    }
    dlclose(library);
  }
  const char* chosen = std::getenv("GRAFT_CUBLAS");
  reason = chosen && *chosen
               ? concat("GRAFT_CUBLAS names ", files[0], ", which cannot be opened")
               : concat("libcublas.so.13 or .12 was not found in ", files.size(),
                        " places (install the CUDA toolkit's, or PyTorch's package nvidia-cublas, "
                        "or name the file in GRAFT_CUBLAS)");
  return false;
}

// cuBLAS has loaded it by now, so that this finds the same one: libcublas.so.13 ->
// libcublasLt.so.13.
bool open_cublas_lt(CublasLtFunctions& functions, const std::string& cublas_path) {
  std::string path = cublas_path;
  const std::string stem = "libcublas.";
  const size_t at = path.rfind(stem);
  if (at == std::string::npos) return false;
  path.replace(at, stem.size(), "libcublasLt.");
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  return library && bind(functions, library);
}

#endif

}  // namespace

const CublasFunctions* cublas_functions(std::string* reason) {
  static std::string failure;
  static const CublasFunctions* opened = []() -> const CublasFunctions* {
    static CublasFunctions functions;
    if (const char* chosen = std::getenv("GRAFT_CUBLAS"); chosen && !std::strcmp(chosen, "none")) {
      failure = "GRAFT_CUBLAS is none";
      return nullptr;
    }
    return open_cublas(functions, failure) ? &functions : nullptr;
  }();
  if (!opened && reason) *reason = failure;
  return opened;
}

const CublasLtFunctions* cublas_lt_functions() {
  static const CublasLtFunctions* opened = []() -> const CublasLtFunctions* {
    static CublasLtFunctions functions;
    const CublasFunctions* cublas = cublas_functions(nullptr);
    return cublas && open_cublas_lt(functions, cublas->path) ? &functions : nullptr;
  }();
  return opened;
}

std::string cublas_error(const char* call, cublasStatus_t status) {
  const char* text = "unknown";
  switch (int(status)) {  // cublas_api.h
    case 1:
      text = "not initialised";
      break;
    case 3:
      text = "allocation failed";
      break;
    case 7:
      text = "invalid value";
      break;
    case 8:
      text = "architecture mismatch";
      break;
    case 13:
      text = "execution failed";
      break;
    case 14:
      text = "internal error";
      break;
    case 15:
      text = "not supported";
      break;
  }
  return concat(call, ": ", text, " (", int(status), ")");
}

}  // namespace graft
