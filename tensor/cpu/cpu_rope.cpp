// How what queries and keys go through before attention, rotation with or without a norm, is cut
// into pieces: some tokens with all their heads.
#include <algorithm>

#include "tensor/cpu/cpu_backend.h"
#include "tensor/cpu/kernels/table.h"
#include "tensor/heads.h"
#include "tensor/thread_pool.h"

namespace graft {
namespace {

constexpr int64_t kTokens = 32;  // of one piece

int64_t pieces_of(int64_t tokens) { return (tokens + kTokens - 1) / kTokens; }

// body(token, piece) for all tokens.
template <class Body>
void for_each_token(int64_t tokens, const Body& body) {
  thread_pool().run(pieces_of(tokens), [&](int64_t piece, int) {
    for (int64_t t = piece * kTokens; t < std::min(tokens, (piece + 1) * kTokens); ++t)
      body(t, piece);
  });
}

// The rows of the table that belong to the tokens.
class Angles {
 public:
  Angles(const char* op, const Tensor& positions, const Tensor& cos_sin)
      : positions_(positions.data<int32_t>()),
        table_(cos_sin.data<float>()),
        stride_(cos_sin.row_stride()) {
    CHECK(cos_sin.cols() % 2 == 0, op, ": head_dim is ", cos_sin.cols(), ", wanted an even number");
    for (int64_t t = 0; t < positions.num_elements(); ++t)
      CHECK(positions_[t] >= 0 && positions_[t] < cos_sin.num_rows(), op, ": position ",
            positions_[t], " is not in the table of ", cos_sin.num_rows());
  }
  const float* of(int64_t token) const { return table_ + positions_[token] * stride_; }

 private:
  const int32_t* positions_;
  const float* table_;
  int64_t stride_;
};

// The heads of a token; undefined tensors have none.
class Heads {
 public:
  Heads(const Tensor& x, int64_t head_dim) {
    if (!x.defined()) return;
    data_ = static_cast<char*>(x.raw());
    layout = head_layout(x, head_dim);
    token_bytes_ = layout.token_stride * dtype_size(x.dtype());
  }
  char* of(int64_t token) const { return data_ ? data_ + token * token_bytes_ : nullptr; }

  HeadLayout layout;

 private:
  char* data_ = nullptr;
  int64_t token_bytes_ = 0;
};

void check_activation(const char* op, const Tensor& t) {
  CHECK(t.dtype() == DType::F32 || t.dtype() == DType::BF16, op,
        ": the CPU kernel takes F32 or BF16, got ", dtype_name(t.dtype()));
}

}  // namespace

void CpuBackend::rope(Tensor& y, const Tensor& x, const Tensor& positions, const Tensor& cos_sin,
                      int direction) {
  check_activation("rope", x);
  const Angles angles("rope", positions, cos_sin);
  const Heads from(x, cos_sin.cols()), to(y, cos_sin.cols());
  for_each_token(from.layout.tokens, [&](int64_t t, int64_t) {
    kernels_.rope(to.of(t), to.layout.head_stride, from.of(t), from.layout.head_stride, x.dtype(),
                  angles.of(t), from.layout.heads, from.layout.head_dim, direction);
  });
}

void CpuBackend::qk_norm_rope_forward(Tensor& y, Tensor& rstd, const Tensor& x,
                                      const Tensor& weight, double eps, const Tensor& positions,
                                      const Tensor& cos_sin) {
  if (!weight.defined()) return rope(y, x, positions, cos_sin, +1);
  check_activation("qk_norm_rope", x);
  const Angles angles("qk_norm_rope", positions, cos_sin);
  const Heads from(x, cos_sin.cols()), to(y, cos_sin.cols());
  const Tensor wide = weight_as_f32(weight);
  const int64_t heads = from.layout.heads;
  for_each_token(from.layout.tokens, [&](int64_t t, int64_t) {
    kernels_.qk_norm_rope_forward(to.of(t), to.layout.head_stride, rstd.data<float>() + t * heads,
                                  from.of(t), from.layout.head_stride, x.dtype(),
                                  wide.data<float>(), angles.of(t), heads, from.layout.head_dim,
                                  float(eps));
  });
}

void CpuBackend::qk_norm_rope_backward(Tensor& dx, Tensor& dweight, const Tensor& dy,
                                       const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                       const Tensor& positions, const Tensor& cos_sin) {
  if (!weight.defined()) {
    if (dx.defined()) rope(dx, dy, positions, cos_sin, -1);
    return;
  }
  check_activation("qk_norm_rope_backward", x);
  const int64_t head_dim = cos_sin.cols();
  const Angles angles("qk_norm_rope_backward", positions, cos_sin);
  const Heads from(x, head_dim), grad(dy, head_dim), to(dx, head_dim);
  const Tensor wide = weight_as_f32(weight);
  const int64_t heads = from.layout.heads;
  Tensor partial;  // (pieces, head_dim): the sum of each piece of tokens
  if (dweight.defined()) {
    partial = Tensor::empty({pieces_of(from.layout.tokens), head_dim}, DType::F32, Device::CPU,
                            Scope::Scratch);
    fill(partial, 0);
  }
  for_each_token(from.layout.tokens, [&](int64_t t, int64_t piece) {
    kernels_.qk_norm_rope_backward(
        to.of(t), to.layout.head_stride,
        partial.defined() ? partial.data<float>() + piece * head_dim : nullptr, grad.of(t),
        grad.layout.head_stride, from.of(t), from.layout.head_stride, x.dtype(), wide.data<float>(),
        rstd.data<float>() + t * heads, angles.of(t), heads, head_dim);
  });
  if (dweight.defined()) sum_rows(dweight, partial, true);
}

}  // namespace graft
