// embedding.
#include "autograd/lora_parts.h"
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

Variable add_embedding_low_rank(const Variable& base, const Tensor& ids,
                                const LoraArguments& lora) {
  const char* op = "add_embedding_low_rank";
  check_activation(op, "base", base, 2);
  const Tensor &a = lora.a.value(), &b = lora.b.value();
  check_weight(op, "A", lora.a, Shape{a.size(0), base.shape()[1]}, base);
  check_weight(op, "B", lora.b, Shape{b.size(0), a.size(0)}, base);
  check_indices(op, "ids", ids, b);
  CHECK(ids.size(0) == base.shape()[0], op, ": base is ", base.shape(), " but ids is ",
        ids.shape());
  const Tensor& in = base.value();
  Tensor u = Tensor::empty({ids.size(0), a.size(0)}, low_rank_dtype(in), in.device());
  backend_of(in).embedding_forward(u, ids, b);
  Tensor y = empty_like(in);
  product(y, {.a = u, .b = a, .alpha = lora.scaling}, in);
  const auto backward = [ids, u, a, b, scaling = lora.scaling](const Tensor& dy,
                                                               const Needs& needs) {
    Tensor da, db;
    if (needs[1]) {
      da = Tensor::empty(a.shape(), wide(dy.dtype()), dy.device());
      product(da, {.a = u, .b = dy, .transpose_a = true, .alpha = scaling});
    }
    if (needs[2]) {
      Tensor du = empty_like(u, Scope::Scratch);
      product(du, {.a = dy, .b = a, .transpose_b = true, .alpha = scaling});
      db = zeros_like(b, wide(dy.dtype()));
      backend_of(dy).embedding_backward(db, ids, du);
    }
    return std::vector<Tensor>{needs[0] ? dy : Tensor(), da, db};
  };
  return record(op, std::move(y), {base, lora.a, lora.b}, backward);
}

}  // namespace graft::ops
