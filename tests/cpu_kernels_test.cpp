// The fast CPU kernels against the reference backend's plain loops, for every instruction set that
// this machine runs, in F32 and BF16, at sizes that are not multiples of anything; and the same
// bytes with any number of threads. The reference rounds once, so F32 may differ by the order of
// sums (1e-5 of the largest element) and BF16 by one unit in the last place (2^-7).
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "tensor/backend.h"
#include "tensor/cpu/cpu_backend.h"
#include "tensor/cpu/cpu_kernels.h"
#include "tensor/cpu/kernels/table.h"
#include "tensor/random.h"
#include "tensor/thread_pool.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

using Tensors = std::vector<Tensor>;

std::vector<const CpuKernels*> runnable_tables() {
  std::vector<const CpuKernels*> tables = {&cpu_kernels(CpuPath::Portable)};
  if (last_cpu_path(cpu_features()) >= CpuPath::Avx2) {
    tables.push_back(&cpu_kernels(CpuPath::Avx2));
    tables.push_back(&cpu_kernels_wide16());  // 16 lanes by AVX2 instructions
  }
  for (const CpuPath path : {CpuPath::Avx512, CpuPath::Avx512Bf16})
    if (last_cpu_path(cpu_features()) >= path) tables.push_back(&cpu_kernels(path));
  return tables;
}

// Normal numbers. `gap` elements lie between the rows.
Tensor random_tensor(Random& random, Shape shape, DType dtype, double scale = 1, int64_t gap = 0) {
  if (gap > 0) {
    const int64_t cols = shape[-1];
    return random_tensor(random, {shape[0], cols + gap}, dtype, scale).slice_cols(0, cols);
  }
  std::vector<double> values(size_t(shape.num_elements()));
  for (double& value : values) value = scale * random.normal();
  return Tensor::from_floats(shape, values, dtype);
}

double tight_tolerance(DType dtype) { return dtype == DType::BF16 ? 1.0 / 128 : 1e-5; }

// Runs `op` (which makes its own inputs from a fixed seed, and returns every output) on the
// reference backend and on each table of kernels, in F32 and BF16.
void compare(const std::string& what, const std::function<Tensors(Backend&, DType, Random&)>& op) {
  for (DType dtype : {DType::F32, DType::BF16}) {
    Random random(7);
    const Tensors expected = op(reference_backend(), dtype, random);
    for (const CpuKernels* table : runnable_tables()) {
      CpuBackend fast(*table);
      Random same(7);
      const Tensors actual = op(fast, dtype, same);
      ASSERT_EQ(actual.size(), expected.size());
      for (size_t i = 0; i < actual.size(); ++i)
        expect_close(actual[i], expected[i], tight_tolerance(dtype),
                     concat(what, " output ", i, " ", dtype_name(dtype), " ", table->name));
    }
  }
}

// `op` gives the same bytes with 1, 2, 3 and 8 threads.
void expect_thread_independence(const std::string& what,
                                const std::function<Tensors(Backend&, DType, Random&)>& op) {
  const int threads_before = thread_pool().num_threads();
  for (DType dtype : {DType::F32, DType::BF16}) {
    Tensors first;
    for (int threads : {1, 2, 3, 8}) {
      set_num_threads(threads);
      CpuBackend fast;
      Random random(11);
      const Tensors outputs = op(fast, dtype, random);
      if (first.empty()) {
        first = outputs;
        continue;
      }
      for (size_t i = 0; i < outputs.size(); ++i)
        expect_same_bytes(outputs[i], first[i],
                          concat(what, " output ", i, " with ", threads, " threads"));
    }
  }
  set_num_threads(threads_before);
}

TEST(CpuKernels, CopyConvertsBetweenAllFloatTypesWithStrides) {
  for (DType to : {DType::F32, DType::BF16, DType::F16, DType::F64})
    for (DType from : {DType::F32, DType::BF16, DType::F16, DType::F64})
      for (const CpuKernels* table : runnable_tables()) {
        CpuBackend fast(*table);
        Random random(3);
        const Tensor src = random_tensor(random, {5, 37}, from, 3, 6);
        Tensor dst = Tensor::zeros({5, 40}, to), expected = Tensor::zeros({5, 40}, to);
        Tensor part = dst.slice_cols(1, 38), expected_part = expected.slice_cols(1, 38);
        fast.copy(part, src);
        reference_backend().copy(expected_part, src);
        expect_same_bytes(dst, expected,
                          concat(dtype_name(from), " to ", dtype_name(to), " ", table->name));
      }
}

TEST(CpuKernels, RoundingToSixteenBitsAgreesWithScalarConversionOnEdges) {
  std::vector<double> values = {0.0,    -0.0,       1.0,        65504,  65519.99, 65520,
                                1e9,    -1e9,       6e-8,       2.9e-8, 3.1e-8,   5.97e-5,
                                6.1e-5, 1.00390625, 1.01171875, 3.4e38, 1e-40};
  values.push_back(std::numeric_limits<double>::infinity());
  for (int i = 0; i < 2000; ++i) values.push_back(std::ldexp(1.0 + i / 2000.0, i % 60 - 30));
  const Tensor src = Tensor::from_floats({int64_t(values.size())}, values, DType::F32);
  for (const CpuKernels* table : runnable_tables()) {
    CpuBackend fast(*table);
    for (DType dtype : {DType::BF16, DType::F16}) {
      Tensor narrow = Tensor::empty(src.shape(), dtype),
             wide = Tensor::empty(src.shape(), DType::F32);
      fast.copy(narrow, src);
      fast.copy(wide, narrow);
      for (size_t i = 0; i < values.size(); ++i) {
        const float x = float(values[i]);
        const float expected =
            dtype == DType::F16 ? to_float(to_float16(x)) : to_float(to_bfloat16(x));
        EXPECT_EQ(wide.data<float>()[i], expected) << x << " " << table->name;
      }
    }
  }
}

TEST(CpuKernels, NotANumberSurvivesRounding) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const Tensor src = Tensor::from_floats({19}, std::vector<double>(19, nan), DType::F32);
  for (const CpuKernels* table : runnable_tables())
    for (DType dtype : {DType::BF16, DType::F16}) {
      Tensor narrow = Tensor::empty({19}, dtype);
      CpuBackend(*table).copy(narrow, src);
      for (double value : narrow.to_doubles()) EXPECT_TRUE(std::isnan(value)) << table->name;
    }
}

TEST(CpuKernels, ElementwiseKernelsAgreeWithReference) {
  compare("elementwise", [](Backend& backend, DType dtype, Random& random) {
    const Tensor a = random_tensor(random, {7, 61}, dtype, 1, 5);
    const Tensor b = random_tensor(random, {7, 61}, dtype);
    Tensor sum = Tensor::empty({7, 61}, dtype), scaled = Tensor::empty({7, 61}, dtype);
    Tensor mixed = random_tensor(random, {7, 61}, DType::F32), same = b.clone();
    Tensor filled = Tensor::empty({7, 61}, dtype);
    backend.add(sum, a, b);
    backend.scale(scaled, a, -0.375);
    backend.axpy(mixed, a, 0.7);
    backend.axpy(same, a, 0.7);
    backend.fill(filled, 1.7);
    return Tensors{sum, scaled, mixed, same, filled};
  });
}

TEST(CpuKernels, LongArraysAreCutIntoPiecesWithoutGaps) {
  compare("add", [](Backend& backend, DType dtype, Random& random) {
    const Tensor a = random_tensor(random, {100003}, dtype),
                 b = random_tensor(random, {100003}, dtype);
    Tensor y = Tensor::empty({100003}, dtype);
    backend.add(y, a, b);
    return Tensors{y};
  });
}

TEST(CpuKernels, SumRowsAgreesWithReference) {
  compare("sum_rows", [](Backend& backend, DType dtype, Random& random) {
    const Tensor dy = random_tensor(random, {101, 133}, dtype, 1, 3);
    Tensor fresh = Tensor::empty({133}, DType::F32),
           added = random_tensor(random, {133}, DType::F32);
    backend.sum_rows(fresh, dy, false);
    backend.sum_rows(added, dy, true);
    return Tensors{fresh, added};
  });
}

TEST(CpuKernels, EmbeddingAndRowKernelsAgreeWithReference) {
  for (DType weight_dtype : {DType::F32, DType::BF16, DType::F16})
    compare("rows", [=](Backend& backend, DType dtype, Random& random) {
      const Tensor weight = random_tensor(random, {11, 147}, weight_dtype);
      const Tensor ids = Tensor::from_ints({6}, {3, 10, 0, 3, 3, 7});
      Tensor y = Tensor::empty({6, 147}, dtype),
             dweight = random_tensor(random, {11, 147}, DType::F32);
      backend.embedding_forward(y, ids, weight);
      backend.embedding_backward(dweight, ids, y);
      const Tensor src = random_tensor(random, {11, 147}, dtype, 1, 9);
      const Tensor once = Tensor::from_ints({4}, {9, 2, 0, 5});
      Tensor gathered = Tensor::empty({4, 147}, dtype), scattered = src.clone();
      backend.gather_rows(gathered, src, once);
      backend.scatter_add_rows(scattered, gathered, once);
      return Tensors{y, dweight, gathered, scattered};
    });
}

TEST(CpuKernels, RowNumbersOutOfRangeAreRefused) {
  CpuBackend fast;
  Tensor weight = Tensor::zeros({4, 8}, DType::F32), y = Tensor::zeros({1, 8}, DType::F32);
  EXPECT_THROW(fast.embedding_forward(y, Tensor::from_ints({1}, {4}), weight), Error);
  EXPECT_THROW(fast.scatter_add_rows(weight, y, Tensor::from_ints({1}, {-1})), Error);
}

TEST(CpuKernels, RmsNormAgreesWithReference) {
  for (int64_t hidden : {3, 8, 33, 200})  // of 1, dx is 0 but for rounding
    for (DType weight_dtype : {DType::F32, DType::BF16, DType::F16})
      compare(concat("rms_norm ", hidden), [=](Backend& backend, DType dtype, Random& random) {
        const Tensor x = random_tensor(random, {67, hidden}, dtype, 2, 7);
        const Tensor weight = random_tensor(random, {hidden}, weight_dtype);
        const Tensor dy = random_tensor(random, {67, hidden}, dtype);
        Tensor y = Tensor::empty({67, hidden}, dtype), rstd = Tensor::empty({67}, DType::F32);
        Tensor dx = Tensor::empty({67, hidden}, dtype), none;
        Tensor dweight = random_tensor(random, {hidden}, DType::F32);
        backend.rms_norm_forward(y, rstd, x, weight, 1e-6);
        backend.rms_norm_backward(dx, dweight, dy, x, weight, rstd);
        Tensor only_dx = Tensor::empty({67, hidden}, dtype);
        backend.rms_norm_backward(only_dx, none, dy, x, weight, rstd);
        Tensor only_dweight = Tensor::zeros({hidden}, DType::F32);
        backend.rms_norm_backward(none, only_dweight, dy, x, weight, rstd);
        return Tensors{y, rstd, dx, dweight, only_dx, only_dweight};
      });
}

TEST(CpuKernels, RopeAgreesWithReferenceInPlaceToo) {
  for (int64_t head_dim : {2, 8, 20, 64, 128})
    compare(concat("rope ", head_dim), [=](Backend& backend, DType dtype, Random& random) {
      const Tensor x = random_tensor(random, {35, 3, head_dim}, dtype);
      const Tensor cos_sin = random_tensor(random, {50, head_dim}, DType::F32);
      std::vector<int32_t> positions;
      for (int t = 0; t < 35; ++t) positions.push_back(int32_t(random.below(50)));
      const Tensor at = Tensor::from_ints({35}, positions);
      Tensor y = Tensor::empty({35, 3, head_dim}, dtype), back = x.clone();
      backend.rope(y, x, at, cos_sin, 1);
      backend.rope(back, back, at, cos_sin, -1);
      return Tensors{y, back};
    });
}

TEST(CpuKernels, SwigluAgreesWithReferenceOnStridedColumnsAndInPlace) {
  compare("swiglu", [](Backend& backend, DType dtype, Random& random) {
    const Tensor both = random_tensor(random, {9, 150}, dtype, 8);
    const Tensor gate = both.slice_cols(0, 75), up = both.slice_cols(75, 150);
    const Tensor dy = random_tensor(random, {9, 75}, dtype);
    Tensor y = Tensor::empty({9, 75}, dtype), none;
    Tensor dgate = Tensor::empty({9, 75}, dtype), dup = Tensor::empty({9, 75}, dtype);
    backend.swiglu_forward(y, gate, up);
    backend.swiglu_backward(dgate, none, dy, gate, up);
    backend.swiglu_backward(none, dup, dy, gate, up);
    Tensor own_gate = gate.clone(), own_up = up.clone();
    backend.swiglu_backward(own_gate, own_up, dy, own_gate, own_up);
    return Tensors{y, dgate, dup, own_gate, own_up};
  });
}

TEST(CpuKernels, SwigluOfExtremeGatesIsFiniteAndSaturates) {
  for (const CpuKernels* table : runnable_tables()) {
    CpuBackend fast(*table);
    const Tensor gate = Tensor::from_floats({4}, {-1000, -90, 90, 1000}, DType::F32);
    const Tensor up = Tensor::from_floats({4}, {1, 1, 1, 1}, DType::F32);
    Tensor y = Tensor::empty({4}, DType::F32);
    fast.swiglu_forward(y, gate, up);
    EXPECT_NEAR(y.data<float>()[0], 0, 1e-30);
    EXPECT_NEAR(y.data<float>()[1], 0, 1e-30);
    EXPECT_EQ(y.data<float>()[2], 90);
    EXPECT_EQ(y.data<float>()[3], 1000);
  }
}

TEST(CpuKernels, CrossEntropyAgreesWithReferenceForOddVocabularies) {
  for (int64_t vocabulary : {1, 5, 259, 9001})
    compare(concat("cross_entropy ", vocabulary), [=](Backend& backend, DType, Random& random) {
      Tensor logits = random_tensor(random, {6, vocabulary}, DType::F32, 10);
      Tensor unchanged = logits.clone();
      std::vector<int32_t> labels;
      for (int r = 0; r < 6; ++r) labels.push_back(int32_t(random.below(uint64_t(vocabulary))));
      const Tensor label = Tensor::from_ints({6}, labels);
      Tensor losses = Tensor::empty({6}, DType::F32), alone = Tensor::empty({6}, DType::F32);
      backend.cross_entropy(alone, unchanged, label, 0.25, false);
      backend.cross_entropy(losses, logits, label, 0.25, true);
      return Tensors{losses, logits, alone, unchanged};
    });
}

TEST(CpuKernels, CrossEntropyOfEqualLogitsIsTheLogOfTheirNumber) {
  for (const CpuKernels* table : runnable_tables()) {
    CpuBackend fast(*table);
    for (double value : {0.0, 1e4, -1e4}) {
      Tensor logits = Tensor::empty({1, 5001}, DType::F32), losses = Tensor::empty({1}, DType::F32);
      fast.fill(logits, value);
      fast.cross_entropy(losses, logits, Tensor::from_ints({1}, {17}), 1, true);
      EXPECT_NEAR(losses.item(), std::log(5001.0), 2e-3) << value << " " << table->name;
      EXPECT_NEAR(logits.data<float>()[3], 1 / 5001.0, 1e-9);
      EXPECT_NEAR(logits.data<float>()[17], 1 / 5001.0 - 1, 1e-6);
    }
  }
}

TEST(CpuKernels, CrossEntropyReportsNotANumber) {
  for (const CpuKernels* table : runnable_tables()) {
    Tensor logits = Tensor::zeros({1, 100}, DType::F32), losses = Tensor::empty({1}, DType::F32);
    logits.data<float>()[50] = std::numeric_limits<float>::quiet_NaN();
    CpuBackend(*table).cross_entropy(losses, logits, Tensor::from_ints({1}, {3}), 1, false);
    EXPECT_TRUE(std::isnan(losses.item())) << table->name;
  }
}

TEST(CpuKernels, DropoutMasksAreThoseOfTheReferenceBitForBit) {
  for (int64_t cols : {1, 6, 64, 203})
    for (double p : {0.0, 0.1, 0.5})
      for (const CpuKernels* table : runnable_tables()) {
        CpuBackend fast(*table);
        const DropoutKey key{0x123456789abcdefull, 77, 5, (int64_t(1) << 32) - 20};
        const Tensor x = Tensor::from_floats(
            {41, cols}, std::vector<double>(size_t(41 * cols), 1.0), DType::F32);
        Tensor y = Tensor::empty({41, cols}, DType::F32),
               expected = Tensor::empty({41, cols}, DType::F32);
        fast.dropout(y, x, p, key, false);
        reference_backend().dropout(expected, x, p, key, false);
        for (int64_t i = 0; i < y.num_elements(); ++i)
          ASSERT_EQ(y.data<float>()[i] == 0, expected.data<float>()[i] == 0)
              << i << " " << cols << " " << p << " " << table->name;
        expect_close(y, expected, 1e-6, table->name);
      }
}

TEST(CpuKernels, DropoutAccumulatesAndTakesStrides) {
  compare("dropout", [](Backend& backend, DType dtype, Random& random) {
    const DropoutKey key{99, 1, 2, 3};
    const Tensor x = random_tensor(random, {33, 45}, dtype, 1, 4);
    Tensor y = Tensor::empty({33, 45}, dtype), sum = random_tensor(random, {33, 45}, dtype);
    backend.dropout(y, x, 0.3, key, false);
    backend.dropout(sum, x, 0.3, key, true);
    return Tensors{y, sum};
  });
}

TEST(CpuKernels, AdamWFollowsTheReferenceForTenSteps) {
  compare("adamw", [](Backend& backend, DType, Random& random) {
    Tensor p = random_tensor(random, {40001}, DType::F32), m = Tensor::zeros({40001}, DType::F32);
    Tensor v = Tensor::zeros({40001}, DType::F32);
    for (int step = 1; step <= 10; ++step) {
      const Tensor g = random_tensor(random, {40001}, DType::F32, 0.01);
      backend.adamw(p, m, v, g, Tensor::from_floats({}, {0.5}, DType::F64),
                    {1e-3, 0.9, 0.999, 1e-8, 0.1, step, 2, step % 2 == 0});
    }
    return Tensors{p, m, v};
  });
}

TEST(CpuKernels, SumOfSquaresIsExactToDoublePrecision) {
  Random random(5);
  const Tensor x = random_tensor(random, {70001}, DType::F32);
  Tensor expected = Tensor::zeros({}, DType::F64), total = expected.clone();
  reference_backend().sum_of_squares(expected, x);
  for (const CpuKernels* table : runnable_tables()) {
    CpuBackend(*table).sum_of_squares(total, x);
    EXPECT_NEAR(total.item(), expected.item(), 1e-11 * expected.item()) << table->name;
  }
}

// Attention at one shape; lengths of documents, queries of each being its last ones.
struct Case {
  int64_t heads, kv_heads, head_dim;
  std::vector<int32_t> queries, keys;
  double magnitude = 1;
};

Tensor cumulative(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> sums = {0};
  for (int32_t length : lengths) sums.push_back(sums.back() + length);
  return Tensor::from_ints({int64_t(sums.size())}, sums);
}

Tensors run_attention(const Case& c, Backend& backend, DType dtype, Random& random) {
  const Tensor cu_q = cumulative(c.queries), cu_k = cumulative(c.keys);
  const int64_t tokens_q = cu_q.data<int32_t>()[c.queries.size()];
  const int64_t tokens_k = cu_k.data<int32_t>()[c.keys.size()];
  const Shape q_shape{tokens_q, c.heads, c.head_dim}, k_shape{tokens_k, c.kv_heads, c.head_dim};
  const Tensor q = random_tensor(random, q_shape, dtype, c.magnitude);
  const Tensor k = random_tensor(random, k_shape, dtype, c.magnitude);
  const Tensor v = random_tensor(random, k_shape, dtype);
  const Tensor dout = random_tensor(random, q_shape, dtype);
  const double scale = 1 / std::sqrt(double(c.head_dim));
  Tensor out = Tensor::empty(q_shape, dtype), lse = Tensor::empty({c.heads, tokens_q}, DType::F32);
  backend.attention_forward(out, lse, q, k, v, cu_q, cu_k, scale);
  if (c.queries != c.keys) return {out, lse};
  Tensor dq = Tensor::empty(q_shape, dtype), dk = Tensor::empty(k_shape, dtype);
  Tensor dv = Tensor::empty(k_shape, dtype);
  // The same saved outputs for every backend: their difference is measured above.
  Tensor saved = Tensor::empty(q_shape, dtype), saved_lse = Tensor::empty(lse.shape(), DType::F32);
  reference_backend().attention_forward(saved, saved_lse, q, k, v, cu_q, cu_k, scale);
  backend.attention_backward(dq, dk, dv, dout, q, k, v, saved, saved_lse, cu_q, scale);
  return {out, lse, dq, dk, dv};
}

void compare_attention(const std::string& what, const Case& c) {
  compare(what, [&](Backend& backend, DType dtype, Random& random) {
    return run_attention(c, backend, dtype, random);
  });
}

TEST(CpuAttention, AgreesWithReferenceForEveryHeadSize) {
  for (int64_t head_dim : {8, 16, 20, 64, 80, 128, 256})
    compare_attention(concat("head_dim ", head_dim), {2, 1, head_dim, {131}, {131}});
}

TEST(CpuAttention, AgreesWithReferenceOnPackedDocumentsOfAllLengths) {
  compare_attention("documents",
                    {6, 3, 16, {1, 5, 96, 97, 2, 192, 33}, {1, 5, 96, 97, 2, 192, 33}});
}

// So few heads that the backward cuts their queries into segments.
TEST(CpuAttention, AgreesWithReferenceForOneHeadOfALongDocument) {
  compare_attention("one head", {1, 1, 32, {900}, {900}});
  compare_attention("two heads", {2, 1, 16, {500, 20}, {500, 20}});
}

TEST(CpuAttention, AgreesWithReferenceForGroupsOfSeven) {
  compare_attention("groups", {14, 2, 64, {150, 60}, {150, 60}});
}

TEST(CpuAttention, AgreesWithReferenceWhenQueriesFollowACache) {
  compare_attention("prefill after a cache", {4, 2, 32, {7, 100}, {300, 131}});
}

TEST(CpuAttention, AgreesWithReferenceWhenDecoding) {
  compare_attention("one query", {14, 2, 64, {1}, {1500}});
  compare_attention("few queries, several documents", {9, 1, 20, {1, 3, 2}, {700, 3, 513}});
  compare_attention("one key", {4, 2, 16, {1}, {1}});
}

TEST(CpuAttention, LargeScoresDoNotOverflow) {
  compare_attention("large scores", {2, 2, 16, {120}, {120}, 6});
  Case c{2, 2, 16, {120}, {120}, 100};  // scores of some 10^4: softmax picks one key
  for (const CpuKernels* table : runnable_tables()) {
    CpuBackend fast(*table);
    Random random(1);
    for (const Tensor& t : run_attention(c, fast, DType::F32, random))
      for (double value : t.to_doubles()) ASSERT_TRUE(std::isfinite(value)) << table->name;
  }
}

TEST(CpuAttention, EqualKeysAverageTheValues) {
  for (const CpuKernels* table : runnable_tables()) {
    CpuBackend fast(*table);
    Random random(2);
    const Tensor q = random_tensor(random, {130, 1, 8}, DType::F32),
                 v = random_tensor(random, {130, 1, 8}, DType::F32);
    const Tensor k = Tensor::zeros({130, 1, 8}, DType::F32), cu = Tensor::from_ints({2}, {0, 130});
    Tensor out = Tensor::empty({130, 1, 8}, DType::F32), lse = Tensor::empty({1, 130}, DType::F32);
    fast.attention_forward(out, lse, q, k, v, cu, cu, 1);
    double mean = 0;
    for (int t = 0; t < 130; ++t) {
      mean += (v.data<float>()[8 * t] - mean) / (t + 1);
      EXPECT_NEAR(out.data<float>()[8 * t], mean, 1e-6) << table->name;
      EXPECT_NEAR(lse.data<float>()[t], std::log(t + 1.0), 1e-6) << table->name;
    }
  }
}

TEST(CpuAttention, RefusesHeadsLargerThanItsTiles) {
  CpuBackend fast;
  Random random(2);
  const Case c{1, 1, kMaxHeadDim + 8, {5}, {5}};
  EXPECT_THROW(run_attention(c, fast, DType::F32, random), Error);
}

TEST(CpuKernels, ThreadsDoNotChangeABitOfAttention) {
  expect_thread_independence("attention", [](Backend& backend, DType dtype, Random& random) {
    return run_attention({6, 2, 32, {300, 40}, {300, 40}}, backend, dtype, random);
  });
  expect_thread_independence("decoding", [](Backend& backend, DType dtype, Random& random) {
    return run_attention({6, 2, 32, {1}, {2000}}, backend, dtype, random);
  });
}

TEST(CpuKernels, ThreadsDoNotChangeABitOfReductions) {
  expect_thread_independence("reductions", [](Backend& backend, DType dtype, Random& random) {
    const Tensor x = random_tensor(random, {517, 200}, dtype),
                 dy = random_tensor(random, {517, 200}, dtype);
    const Tensor weight = random_tensor(random, {200}, DType::F32);
    Tensor y = Tensor::empty({517, 200}, dtype), rstd = Tensor::empty({517}, DType::F32);
    Tensor dx = Tensor::empty({517, 200}, dtype), dweight = Tensor::zeros({200}, DType::F32);
    backend.rms_norm_forward(y, rstd, x, weight, 1e-5);
    backend.rms_norm_backward(dx, dweight, dy, x, weight, rstd);
    Tensor bias = Tensor::zeros({200}, DType::F32), table = Tensor::zeros({9, 200}, DType::F32);
    backend.sum_rows(bias, dy, false);
    std::vector<int32_t> ids;
    for (int i = 0; i < 517; ++i) ids.push_back(int32_t(random.below(9)));
    backend.embedding_backward(table, Tensor::from_ints({517}, ids), dy);
    const Tensor flat = random_tensor(random, {300007}, DType::F32);
    Tensor squares = Tensor::zeros({}, DType::F64);
    backend.sum_of_squares(squares, flat);
    return Tensors{y, rstd, dx, dweight, bias, table, squares};
  });
}

}  // namespace
}  // namespace graft
