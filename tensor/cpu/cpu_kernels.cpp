// Which table of inner loops runs.
#include "tensor/cpu/cpu_kernels.h"

#include "tensor/cpu/kernels/table.h"

namespace graft {

namespace portable {
CpuKernels make_table(const char* name);
}
namespace avx2 {
CpuKernels make_table(const char* name);
}
namespace avx512 {
CpuKernels make_table(const char* name);
}
namespace avx512_bf16 {
CpuKernels make_table(const char* name);
}
namespace wide16 {
CpuKernels make_table(const char* name);
}

// A table is filled by code of its own instruction set: only the one that was asked for may run.
const CpuKernels& cpu_kernels(CpuPath path) {
  switch (path) {
    case CpuPath::Amx: {  // has instructions for the matrix product alone
      static const CpuKernels table = avx512_bf16::make_table("amx");
      return table;
    }
    case CpuPath::Avx512Bf16: {
      static const CpuKernels table = avx512_bf16::make_table("avx512_bf16");
      return table;
    }
    case CpuPath::Avx512: {
      static const CpuKernels table = avx512::make_table("avx512");
      return table;
    }
    case CpuPath::Avx2: {
      static const CpuKernels table = avx2::make_table("avx2");
      return table;
    }
    case CpuPath::Portable:
      break;
  }
  static const CpuKernels table = portable::make_table("portable");
  return table;
}

const CpuKernels& cpu_kernels_wide16() {
  static const CpuKernels table = wide16::make_table("wide16");
  return table;
}

const CpuKernels& cpu_kernels() { return cpu_kernels(cpu_choice().path); }

}  // namespace graft
