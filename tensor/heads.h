// Where the heads of a tensor lie. It is (T, heads, D), with heads row_stride apart and tokens
// right behind one another; or (T, heads * D), with heads dense and tokens row_stride apart: so is
// q, or k, as a slice of the columns of one merged q/k/v product.
#pragma once

#include "tensor/tensor.h"

namespace graft {

struct HeadLayout {
  int64_t tokens = 0, heads = 0, head_dim = 0;
  int64_t token_stride = 0, head_stride = 0;  // elements
};

inline HeadLayout head_layout(const Tensor& x, int64_t head_dim) {
  if (x.rank() == 3) {
    CHECK(x.size(2) == head_dim, "heads: head_dim of ", x.shape(), " is not the table's ",
          head_dim);
    return {x.size(0), x.size(1), head_dim, x.size(1) * x.row_stride(), x.row_stride()};
  }
  CHECK(x.rank() == 2 && x.size(1) % head_dim == 0, "heads: ", x.shape(), " has no heads of ",
        head_dim);
  return {x.size(0), x.size(1) / head_dim, head_dim, x.row_stride(), head_dim};
}

}  // namespace graft
