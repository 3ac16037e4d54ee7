// Few queries over many keys, split over the keys, against the reference backend: caches of ragged
// lengths, groups of heads that fill a block's rows or do not, several documents.
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
  double scale = 0.2;

  std::string name() const {
    return concat("keys ", keys[0], ", queries ", queries[0], ", heads ", heads, "/", kv_heads,
                  ", head_dim ", head_dim, ", ", dtype_name(dtype));
  }
};

Tensor cumulative(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> ends = {0};
  for (int32_t length : lengths) ends.push_back(ends.back() + length);
  return Tensor::from_ints({int64_t(ends.size())}, ends);
}

Tensor random_tensor(Random& random, Shape shape, DType dtype) {
  std::vector<double> values(size_t(shape.num_elements()));
  for (double& value : values) value = random.normal();
  return Tensor::from_floats(shape, values, dtype);
}

struct Inputs {
  Tensor q, k, v, cu_q, cu_k;
  double scale;
  explicit Inputs(const Case& c)
      : cu_q(cumulative(c.queries)), cu_k(cumulative(c.keys)), scale(c.scale) {
    Random random(5);
    const int64_t tq = cu_q.data<int32_t>()[c.queries.size()];
    const int64_t tk = cu_k.data<int32_t>()[c.keys.size()];
    q = random_tensor(random, {tq, c.heads, c.head_dim}, c.dtype);
    k = random_tensor(random, {tk, c.kv_heads, c.head_dim}, c.dtype);
    v = random_tensor(random, {tk, c.kv_heads, c.head_dim}, c.dtype);
  }
};

struct Result {
  Tensor out, lse;  // on the CPU
};

Result expected_of(const Inputs& in) {
  Result r{Tensor::empty(in.q.shape(), in.q.dtype()),
           Tensor::empty({in.q.size(1), in.q.size(0)}, DType::F32)};
  reference_backend().attention_forward(r.out, r.lse, in.q, in.k, in.v, in.cu_q, in.cu_k, in.scale);
  return r;
}

AttentionForward on_gpu(const Inputs& in) {
  return {Tensor::empty(in.q.shape(), in.q.dtype(), Device::CUDA),
          Tensor::empty({in.q.size(1), in.q.size(0)}, DType::F32, Device::CUDA),
          in.q.to(Device::CUDA),
          in.k.to(Device::CUDA),
          in.v.to(Device::CUDA),
          in.cu_q,
          in.cu_k,
          in.scale};
}

class AttentionDecode : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
  Result run(const AttentionForward& args) {
    EXPECT_TRUE(attention_is_decoding(args));
    attention_decode(args, static_cast<CudaBackend&>(cuda_backend()).stream());
    return {args.out.to(Device::CPU), args.lse.to(Device::CPU)};
  }
  Result run(const Inputs& in) { return run(on_gpu(in)); }
  void check(const Case& c) {
    const Inputs in(c);
    const Result expected = expected_of(in), actual = run(in);
    expect_close(actual.out, expected.out, tolerance_of(c.dtype), c.name() + ": out");
    expect_close(actual.lse, expected.lse, 1e-4, c.name() + ": lse");
  }
};

TEST_F(AttentionDecode, IsTheReferencesAtRaggedCacheLengths) {
  for (int32_t keys : {1, 31, 257, 1000})
    for (DType dtype : {DType::F32, DType::BF16})
      for (int head_dim : {64, 128}) check({{1}, {keys}, 4, 2, head_dim, dtype});
}

// Rows of a block are filled, or not, by the heads of a group and the queries of a document.
TEST_F(AttentionDecode, TakesEveryGroupAndNumberOfQueries) {
  for (DType dtype : {DType::F32, DType::BF16})
    for (int32_t queries : {1, 3, 8}) {
      check({{queries}, {40}, 3, 3, 32, dtype});
      check({{queries}, {40}, 14, 2, 32, dtype});
      check({{queries}, {70}, 17, 1, 16, dtype});
    }
}

TEST_F(AttentionDecode, TakesEveryHeadDim) {
  for (DType dtype : {DType::F32, DType::BF16})
    for (int head_dim : {1, 4, 10, 72, 96, 130, 200, 256})
      check({{2}, {90}, 4, 2, head_dim, dtype});
}

TEST_F(AttentionDecode, GoesOnWhereSlicesAreTheMost) {
  for (int32_t keys : {4096, 4097, 9000}) check({{2}, {keys}, 1, 1, 8, DType::F32});
}

TEST_F(AttentionDecode, ReadsRowsThatAreNotAlignedForVectors) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    const Inputs in({{1}, {50}, 4, 2, 64, dtype});
    AttentionForward args = on_gpu(in);
    Random random(9);
    const Tensor flat = random_tensor(random, {50 * 2 * 64 + 1}, dtype).to(Device::CUDA);
    args.k = flat.slice_rows(1, flat.size(0)).reshape(args.k.shape());
    Inputs same = in;
    same.k = args.k.to(Device::CPU);
    const Result expected = expected_of(same), actual = run(args);
    expect_close(actual.out, expected.out, tolerance_of(dtype), "out");
    expect_close(actual.lse, expected.lse, 1e-4, "lse");
  }
}

TEST_F(AttentionDecode, TakesMoreDocumentsThanOneLaunchDoes) {
  Case c{{}, {}, 2, 1, 16, DType::BF16};
  for (int32_t d = 0; d < 70; ++d) {
    c.queries.push_back(d % 4);
    c.keys.push_back(d % 4 + d * 3 % 100);
  }
  check(c);
}

// The number of slices, and with it the order of sums, follows from a document's own keys.
TEST_F(AttentionDecode, ADocumentsBytesAreItsOwn) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    const Inputs in({{2, 1, 8}, {130, 700, 8}, 6, 2, 64, dtype});
    const Result packed = run(in);
    Inputs alone = in;
    alone.q = in.q.slice_rows(2, 3);
    alone.k = in.k.slice_rows(130, 830);
    alone.v = in.v.slice_rows(130, 830);
    alone.cu_q = cumulative({1});
    alone.cu_k = cumulative({700});
    expect_same_bytes(packed.out.slice_rows(2, 3), run(alone).out, "out");
  }
}

TEST_F(AttentionDecode, GivesTheSameBytesEachTime) {
  const Inputs in({{1, 3}, {257, 1000}, 8, 2, 64, DType::BF16});
  const Result first = run(in);
  for (int i = 0; i < 2; ++i) {
#if defined(CUDA_EMU)
    ++emu::options().seed;  // threads and blocks take turns in another order
#endif
    const Result again = run(in);
    expect_same_bytes(again.out, first.out, "out");
    expect_same_bytes(again.lse, first.lse, "lse");
  }
}

// A document with fewer keys than queries: its first queries see nothing. One without keys.
TEST_F(AttentionDecode, RowsWithoutKeysAreZero) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    const Inputs in({{5, 2}, {2, 0}, 4, 2, 64, dtype});
    const Result expected = expected_of(in), actual = run(in);
    const std::vector<double> want = expected.lse.to_doubles(), got = actual.lse.to_doubles();
    for (size_t i = 0; i < want.size(); ++i) {
      const int64_t token = int64_t(i) % 7;  // of 7, per head
      if (token < 3 || token >= 5)
        EXPECT_TRUE(std::isinf(got[i]) && got[i] < 0) << "lse " << i << " is " << got[i];
      else
        EXPECT_NEAR(got[i], want[i], 1e-3) << "lse " << i;
    }
    expect_close(actual.out.slice_rows(3, 5), expected.out.slice_rows(3, 5), tolerance_of(dtype),
                 "out");
    for (auto [begin, end] : {std::pair{0, 3}, {5, 7}})
      for (double value : actual.out.slice_rows(begin, end).to_doubles()) EXPECT_EQ(value, 0);
  }
}

TEST_F(AttentionDecode, LargeScoresStayFinite) {
  Case c{{1}, {300}, 2, 1, 64, DType::BF16};
  c.scale = 30;  // scores of several hundreds
  check(c);
}

TEST_F(AttentionDecode, TheBackendTakesItForFewQueriesAlone) {
  const Inputs few({{1, 8}, {257, 90}, 4, 2, 64, DType::BF16});
  const Inputs many({{1, 9}, {257, 90}, 4, 2, 64, DType::BF16});
  EXPECT_TRUE(attention_is_decoding(on_gpu(few)));
  EXPECT_FALSE(attention_is_decoding(on_gpu(many)));
  const Result expected = run(few);
  AttentionForward args = on_gpu(few);
  cuda_backend().attention_forward(args.out, args.lse, args.q, args.k, args.v, args.cu_q, args.cu_k,
                                   args.scale);
  expect_same_bytes(args.out.to(Device::CPU), expected.out, "out");
  expect_same_bytes(args.lse.to(Device::CPU), expected.lse, "lse");
}

TEST_F(AttentionDecode, NoQueriesLaunchNothing) {
  const Inputs in({{0, 0}, {0, 5}, 2, 1, 64, DType::F32});
  EXPECT_EQ(run(in).out.num_elements(), 0);
}

}  // namespace
}  // namespace graft
