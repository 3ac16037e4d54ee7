// What changes from one optimizer step to the next although no shape does. A captured step reads it
// from the device; a step that is not gets the same numbers as parameters of its kernels.
#pragma once

#include <cstdint>

#include "tensor/backend.h"

namespace graft {

// What a step of AdamW needs, worked out once on the host in F64.
struct AdamWConstants {
  float decay;            // 1 - lr wd
  float one_minus_beta1;  // exact to F32, where 1 - float(beta) would lose digits
  float beta2;
  float one_minus_beta2;
  float step_size;         // lr / (1 - beta1^t)
  float root_correction2;  // sqrt(1 - beta2^t)
  float epsilon;
};
AdamWConstants adamw_constants(const AdamWStep& step);

struct StepScalars {
  AdamWConstants adamw[2];  // [AdamWStep::for_b]
  uint32_t dropout_step;
};

}  // namespace graft
