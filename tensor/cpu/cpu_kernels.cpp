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
namespace wide16 {
CpuKernels make_table(const char* name);
}

const CpuKernels& cpu_kernels(CpuPath path) {
  static const CpuKernels portable_table = portable::make_table("portable");
  static const CpuKernels avx2_table = avx2::make_table("avx2");
  static const CpuKernels avx512_table = avx512::make_table("avx512");
  switch (path) {
    case CpuPath::Avx512:
      return avx512_table;
    case CpuPath::Avx2:
      return avx2_table;
    case CpuPath::Portable:
      break;
  }
  return portable_table;
}

const CpuKernels& cpu_kernels_wide16() {
  static const CpuKernels table = wide16::make_table("wide16");
  return table;
}

const CpuKernels& cpu_kernels() { return cpu_kernels(cpu_choice().path); }

}  // namespace graft
