// embedding.
#include "autograd/op_check.h"
#include "autograd/ops.h"
#include "autograd/tape.h"

namespace graft::ops {

Variable embedding(const Tensor& ids, const Variable& weight, DType dtype) {
  CHECK(weight.defined() && weight.value().rank() == 2, "embedding: weight must be (V, H)");
  const Tensor& w = weight.value();
  check_indices("embedding", "ids", ids, w);
  Tensor y = Tensor::empty({ids.size(0), w.size(1)}, dtype, w.device());
  backend_of(y).embedding_forward(y, ids, w);
  return record("embedding", std::move(y), {weight}, [ids, w](const Tensor& dy, const Needs&) {
    Tensor dweight = zeros_like(w, wide(dy.dtype()));
    backend_of(dy).embedding_backward(dweight, ids, dy);
    return std::vector<Tensor>{dweight};
  });
}

}  // namespace graft::ops
