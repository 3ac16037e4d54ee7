// Attention's variants against the reference backend: packed documents of ragged lengths, grouped
// heads, decoding with more keys than queries; each variant by itself, wherever it can run.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "tensor/random.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

struct Case {
  std::vector<int32_t> queries, keys;  // lengths of the documents
  int heads, kv_heads, head_dim;
  DType dtype;

  std::string name(int rung) const {
    return "variant " + std::to_string(rung) + ", heads " + std::to_string(heads) + "/" +
           std::to_string(kv_heads) + ", head_dim " + std::to_string(head_dim) + ", " +
           std::string(dtype_name(dtype));
  }
};

Tensor cumulative(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> ends = {0};
  for (int32_t length : lengths) ends.push_back(ends.back() + length);
  return Tensor::from_ints({int64_t(ends.size())}, ends);
}

Tensor random_tensor(Random& random, Shape shape, DType dtype, double scale = 1) {
  std::vector<double> values(size_t(shape.num_elements()));
  for (double& value : values) value = scale * random.normal();
  return Tensor::from_floats(shape, values, dtype);
}

// The inputs, and what the reference makes of them.
struct Expected {
  Tensor q, k, v, dout, cu_q, cu_k;
  Tensor out, lse, dq, dk, dv;
  double scale;

  explicit Expected(const Case& c, bool backward) : scale(1 / std::sqrt(double(c.head_dim))) {
    Random random(5);
    cu_q = cumulative(c.queries), cu_k = cumulative(c.keys);
    const int64_t tq = cu_q.data<int32_t>()[c.queries.size()];
    const int64_t tk = cu_k.data<int32_t>()[c.keys.size()];
    q = random_tensor(random, {tq, c.heads, c.head_dim}, c.dtype, 1.5);
    k = random_tensor(random, {tk, c.kv_heads, c.head_dim}, c.dtype, 1.5);
    v = random_tensor(random, {tk, c.kv_heads, c.head_dim}, c.dtype);
    dout = random_tensor(random, {tq, c.heads, c.head_dim}, c.dtype);
    out = Tensor::empty(q.shape(), c.dtype);
    lse = Tensor::empty({c.heads, tq}, DType::F32);
    reference_backend().attention_forward(out, lse, q, k, v, cu_q, cu_k, scale);
    if (!backward) return;
    dq = Tensor::empty(q.shape(), c.dtype);
    dk = Tensor::empty(k.shape(), c.dtype);
    dv = Tensor::empty(v.shape(), c.dtype);
    reference_backend().attention_backward(dq, dk, dv, dout, q, k, v, out, lse, cu_q, scale);
  }
};

Tensor on_gpu(const Tensor& t) { return t.to(Device::CUDA); }
Tensor like(const Tensor& t) { return Tensor::empty(t.shape(), t.dtype(), Device::CUDA); }

class Attention : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
  cudaStream_t stream() { return static_cast<CudaBackend&>(cuda_backend()).stream(); }

  AttentionForward forward_args(const Expected& e) {
    return {like(e.out), like(e.lse), on_gpu(e.q), on_gpu(e.k),
            on_gpu(e.v), e.cu_q,      e.cu_k,      e.scale};
  }
  AttentionBackward backward_args(const Expected& e) {
    AttentionBackward b{like(e.dq),  like(e.dk),  like(e.dv),  on_gpu(e.dout),
                        on_gpu(e.q), on_gpu(e.k), on_gpu(e.v), on_gpu(e.lse),
                        like(e.lse), e.cu_q,      e.scale};
    attention_delta(b.delta, b.dout, on_gpu(e.out), stream());
    return b;
  }

  void check_forward(int rung, const Case& c) {
    const Expected e(c, false);
    if (!attention_rung_supports(rung, e.q)) return;
    const AttentionForward f = forward_args(e);
    attention_forward_rung(rung, f, stream());
    expect_close(f.out, e.out, tolerance_of(c.dtype), c.name(rung) + ": out");
    expect_close(f.lse, e.lse, 1e-4, c.name(rung) + ": lse");
  }
  void check_backward(int rung, const Case& c) {
    const Expected e(c, true);
    if (!attention_rung_supports(rung, e.q)) return;
    const AttentionBackward b = backward_args(e);
    attention_backward_rung(rung, b, stream());
    expect_close(b.dq, e.dq, tolerance_of(c.dtype), c.name(rung) + ": dq");
    expect_close(b.dk, e.dk, tolerance_of(c.dtype), c.name(rung) + ": dk");
    expect_close(b.dv, e.dv, tolerance_of(c.dtype), c.name(rung) + ": dv");
  }
};

// Short documents for variant 1, whose shuffles are slow to emulate.
Case self_attention(int rung, int heads, int kv_heads, int head_dim, DType dtype) {
  const std::vector<int32_t> lengths =
      rung == 1 ? std::vector<int32_t>{1, 7, 0, 33} : std::vector<int32_t>{1, 7, 33, 0, 70, 130};
  return {lengths, lengths, heads, kv_heads, head_dim, dtype};
}

std::vector<Case> self_attention_cases(int rung) {
  std::vector<Case> cases;
  for (DType dtype : {DType::F32, DType::BF16}) {
    cases.push_back(self_attention(rung, 6, 3, 10, dtype));
    cases.push_back(self_attention(rung, 4, 1, 64, dtype));
    cases.push_back(self_attention(rung, 2, 1, 128, dtype));
  }
  cases.push_back(self_attention(rung, 4, 4, 4, DType::F32));
  return cases;
}

TEST_F(Attention, ForwardIsTheReferencesInEveryVariant) {
  for (int rung : {1, 2, 3})
    for (const Case& c : self_attention_cases(rung)) check_forward(rung, c);
}

TEST_F(Attention, BackwardIsTheReferencesInEveryVariant) {
  for (int rung : {1, 2, 3})
    for (const Case& c : self_attention_cases(rung)) check_backward(rung, c);
}

TEST_F(Attention, HeadDimOf256FitsVariants1And2) {
  for (int rung : {1, 2}) {
    const Case c = {{1, 35}, {1, 35}, 2, 1, 256, DType::F32};
    check_forward(rung, c);
    check_backward(rung, c);
  }
}

TEST_F(Attention, DecodesWithMoreKeysThanQueries) {
  for (int rung : {1, 2, 3})
    for (DType dtype : {DType::F32, DType::BF16}) {
      check_forward(rung, {{1, 3, 1, 20}, {1, 40, 67, 90}, 4, 2, 64, dtype});
      check_forward(rung, {{1, 2}, {65, 64}, 2, 2, 128, dtype});
    }
}

// A document with fewer keys than queries: its first queries see nothing.
TEST_F(Attention, RowsWithoutKeysAreZero) {
  for (int rung : {1, 2, 3}) {
    const Case c = {{5, 70}, {2, 1}, 2, 1, 64, DType::BF16};
    const Expected e(c, false);
    const AttentionForward f = forward_args(e);
    attention_forward_rung(rung, f, stream());
    expect_close(f.out, e.out, tolerance_of(c.dtype), c.name(rung) + ": out");
    const std::vector<double> lse = f.lse.to_doubles(), expected = e.lse.to_doubles();
    for (size_t i = 0; i < lse.size(); ++i) {
      if (std::isinf(expected[i]))
        EXPECT_EQ(lse[i], expected[i]) << c.name(rung) << ": lse " << i;
      else
        EXPECT_NEAR(lse[i], expected[i], 1e-3) << c.name(rung) << ": lse " << i;
    }
  }
}

// What is not a number stays that, in the rows that see it and in no other.
TEST_F(Attention, NotANumberIsNotLost) {
  for (int rung : {1, 2, 3})
    for (DType dtype : {DType::F32, DType::BF16}) {
      const Case c = {{70}, {70}, 2, 1, 64, dtype};
      Expected e(c, false);
      Tensor key = e.k.slice_rows(40, 41);
      reference_backend().fill(key, NAN);
      reference_backend().attention_forward(e.out, e.lse, e.q, e.k, e.v, e.cu_q, e.cu_k, e.scale);
      if (!attention_rung_supports(rung, e.q)) continue;
      const AttentionForward f = forward_args(e);
      attention_forward_rung(rung, f, stream());
      for (const auto& [actual, expected] : {std::pair{f.out, e.out}, {f.lse, e.lse}}) {
        const std::vector<double> a = actual.to_doubles(), b = expected.to_doubles();
        for (size_t i = 0; i < b.size(); ++i)
          ASSERT_EQ(std::isnan(a[i]), std::isnan(b[i])) << c.name(rung) << ", element " << i;
      }
    }
}

TEST_F(Attention, LargeScoresStayFinite) {
  for (int rung : {1, 2, 3}) {
    const Case c = {{40}, {40}, 2, 1, 64, DType::BF16};
    Expected e(c, false);
    e.scale = 30;  // scores of several thousands
    reference_backend().attention_forward(e.out, e.lse, e.q, e.k, e.v, e.cu_q, e.cu_k, e.scale);
    const AttentionForward f = forward_args(e);
    attention_forward_rung(rung, f, stream());
    expect_close(f.out, e.out, tolerance_of(c.dtype), c.name(rung) + ": out");
    expect_close(f.lse, e.lse, 1e-4, c.name(rung) + ": lse");
  }
}

TEST_F(Attention, GradientsAreTheSameBytesEachTime) {
  for (int rung : {1, 2, 3}) {
    const Case c = {{1, 7, 33}, {1, 7, 33}, 4, 2, 64, DType::BF16};
    const Expected e(c, true);
    const AttentionBackward first = backward_args(e), second = backward_args(e);
    attention_backward_rung(rung, first, stream());
#if defined(CUDA_EMU)
    ++emu::options().seed;  // threads and blocks take turns in another order
#endif
    attention_backward_rung(rung, second, stream());
    expect_same_bytes(second.dq.to(Device::CPU), first.dq.to(Device::CPU), c.name(rung) + ": dq");
    expect_same_bytes(second.dk.to(Device::CPU), first.dk.to(Device::CPU), c.name(rung) + ": dk");
    expect_same_bytes(second.dv.to(Device::CPU), first.dv.to(Device::CPU), c.name(rung) + ": dv");
  }
}

TEST_F(Attention, BackendTakesTheBestVariant) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    const Case c = self_attention(1, 4, 2, 64, dtype);
    const Expected e(c, true);
    EXPECT_EQ(attention_rung(e.q), dtype == DType::BF16 ? 3 : 2);
    const Tensor q = on_gpu(e.q), k = on_gpu(e.k), v = on_gpu(e.v);
    Tensor out = like(e.out), lse = like(e.lse), dq = like(e.dq), dk = like(e.dk), dv = like(e.dv);
    cuda_backend().attention_forward(out, lse, q, k, v, e.cu_q, e.cu_k, e.scale);
    cuda_backend().attention_backward(dq, dk, dv, on_gpu(e.dout), q, k, v, out, lse, e.cu_q,
                                      e.scale);
    expect_close(out, e.out, tolerance_of(dtype), "out");
    expect_close(dq, e.dq, tolerance_of(dtype), "dq");
    expect_close(dk, e.dk, tolerance_of(dtype), "dk");
    expect_close(dv, e.dv, tolerance_of(dtype), "dv");
  }
}

TEST_F(Attention, NoDocumentsAndEmptyDocumentsLaunchNothing) {
  for (int rung : {1, 2, 3}) {
    const Case c = {{0, 0}, {0, 0}, 2, 1, 64, DType::BF16};
    check_forward(rung, c);
    check_backward(rung, c);
  }
}

TEST_F(Attention, TilesStayInTheirDocumentsHeaviestFirst) {
  const Tensor cu = cumulative({3, 0, 130});
  const Tensor tiles = attention_tiles(cu, cu, 64, false).to(Device::CPU);
  const std::vector<int32_t> expected = {128, 3, 130, 3, 130, 64, 3, 130, 3, 130,
                                         0,   3, 130, 3, 130, 0,  0, 3,   0, 3};
  ASSERT_EQ(tiles.num_elements(), int64_t(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_EQ(tiles.data<int32_t>()[i], expected[i]) << "element " << i;
}

#if defined(CUDA_EMU)
TEST_F(Attention, TensorCoreVariantHasNoBankConflicts) {
  for (int head_dim : {64, 128}) {
    const Case c = {{130}, {130}, 2, 1, head_dim, DType::BF16};
    const Expected e(c, true);
    const AttentionForward f = forward_args(e);
    const AttentionBackward b = backward_args(e);
    emu::stats() = {};
    attention_forward_rung(3, f, stream());
    attention_backward_rung(3, b, stream());
    EXPECT_GT(emu::stats().ldmatrix_tiles, 0u);
    EXPECT_EQ(emu::stats().ldmatrix_wavefronts, emu::stats().ldmatrix_tiles);
  }
}
#endif

}  // namespace
}  // namespace graft
