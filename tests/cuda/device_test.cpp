// Whether a device can be used at all, and what is said where it cannot.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda/cuda_backend.h"

namespace graft {
namespace {

#if defined(CUDA_EMU)
// A process of its own: the answer is kept for the life of one.
TEST(CudaDevice, ACardThatTheBinaryHasNoCodeForIsNamed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  setenv("EMU_NO_CODE", "1", 1);
  EXPECT_EXIT(
      {
        std::string reason;
        const bool available = cuda_available(&reason);
        std::fprintf(stderr, "%s", reason.c_str());
        std::exit(available);
      },
      testing::ExitedWithCode(0),
      "^this binary has no code for the emulated \\(compute capability 8.0\\); build it there, or "
      "with CUDA_ARCH=80$");
  unsetenv("EMU_NO_CODE");
}
#endif

}  // namespace
}  // namespace graft
