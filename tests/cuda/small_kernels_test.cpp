// RMSNorm, RoPE, SwiGLU, row gathers, dropout and AdamW on the device against the reference
// backend's plain loops: ragged sizes, F32 and BF16, strided rows, in place, no rows at all. The
// tolerances are those of cpu_kernels_test.cpp.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"
#include "cuda/philox.cuh"
#include "cuda/rms_norm.h"
#include "tensor/random.h"
#include "tests/tolerance.h"

namespace graft {

namespace {

constexpr int64_t kRows[] = {0, 1, 3, 37};
constexpr int64_t kCols[] = {1, 6, 51, 64, 520};

Tensor scalar(double value) { return Tensor::from_floats({}, {value}, DType::F64); }

class SmallKernels : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    if (!cuda_available(&reason)) GTEST_SKIP() << reason;
  }
};

double tight_tolerance(DType dtype) { return dtype == DType::BF16 ? 1.0 / 128 : 1e-5; }

// Inputs drawn from a fixed seed and put where the backend under test wants them. With a gap, rows
// are that many elements apart; 8 keeps 16-byte loads possible and 3 does not.
class Inputs {
 public:
  Inputs(Device device, DType dtype, int64_t gap) : device_(device), dtype_(dtype), gap_(gap) {}
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }

  Tensor dense(Shape shape, DType dtype, double scale = 1) {
    std::vector<double> values(size_t(shape.num_elements()));
    for (double& value : values) value = scale * random_.normal();
    return Tensor::from_floats(shape, values, dtype).to(device_);
  }
  Tensor matrix(int64_t rows, int64_t cols, double scale = 1) {
    return matrix_of(rows, cols, dtype_, scale);
  }
  Tensor matrix_of(int64_t rows, int64_t cols, DType dtype, double scale = 1) {
    return dense({rows, cols + gap_}, dtype, scale).slice_cols(0, cols);
  }
  // Ids that repeat. They stay on the CPU unless asked for elsewhere.
  Tensor ids(int64_t n, int64_t below, bool on_device) {
    std::vector<int32_t> values(static_cast<size_t>(n));
    for (int32_t& value : values) value = int32_t(random_.below(uint64_t(below)));
    const Tensor t = Tensor::from_ints({n}, values);
    return on_device ? t.to(device_) : t;
  }

 private:
  Device device_;
  DType dtype_;
  int64_t gap_;
  Random random_{7};
};

using Op = std::function<std::vector<Tensor>(Backend&, Inputs&)>;

std::vector<Tensor> run(const Op& op, Device device, DType dtype, int64_t gap) {
  Inputs inputs(device, dtype, gap);
  std::vector<Tensor> outputs =
      op(device == Device::CUDA ? cuda_backend() : reference_backend(), inputs);
  for (Tensor& output : outputs) output = output.to(Device::CPU);
  return outputs;
}

// `op` on the device and on the reference backend, dense and strided; and twice on the device with
// the same bytes.
void compare(const std::string& what, const Op& op) {
  for (DType dtype : {DType::F32, DType::BF16})
    for (int64_t gap : {0, 3, 8}) {
      const auto expected = run(op, Device::CPU, dtype, gap);
      const auto actual = run(op, Device::CUDA, dtype, gap);
      const auto again = run(op, Device::CUDA, dtype, gap);
      ASSERT_EQ(actual.size(), expected.size());
      for (size_t i = 0; i < actual.size(); ++i) {
        const std::string name =
            concat(what, " output ", i, " ", dtype_name(dtype), ", rows ", gap, " apart");
        expect_close(actual[i], expected[i], tight_tolerance(dtype), name);
        expect_same_bytes(again[i], actual[i], name);
      }
    }
}

void for_sizes(const std::function<void(int64_t rows, int64_t cols, const std::string&)>& f) {
  for (int64_t rows : kRows)
    for (int64_t cols : kCols) f(rows, cols, concat("(", rows, ", ", cols, ")"));
}

TEST_F(SmallKernels, RmsNormForwardAgreesInBothVariants) {
  for_sizes([](int64_t rows, int64_t cols, const std::string& size) {
    for (DType weight_dtype : {DType::F32, DType::BF16, DType::F16})
      for (int variant : {1, 2})
        compare(
            concat("rms_norm_forward ", variant, " ", size, " weight ", dtype_name(weight_dtype)),
            [&](Backend& backend, Inputs& in) -> std::vector<Tensor> {
              const Tensor x = in.matrix(rows, cols), weight = in.dense({cols}, weight_dtype);
              Tensor y = in.matrix(rows, cols), rstd = in.dense({rows}, DType::F32);
              if (in.device() == Device::CUDA)
                launch_rms_norm_forward(variant, y, rstd, x, weight, 1e-5,
                                        static_cast<CudaBackend&>(backend).stream());
              else
                backend.rms_norm_forward(y, rstd, x, weight, 1e-5);
              return {y, rstd};
            });
  });
}

// The backward of rows with the rstd that the forward gives. Rows of one column take a large eps:
// there n is 1 but for eps, and a small one leaves nothing in dx but the rounding of rstd.
std::vector<Tensor> rms_norm_gradients(Backend& backend, Inputs& in, int64_t rows, int64_t cols,
                                       int variant, bool in_place) {
  const Tensor x = in.matrix(rows, cols), weight = in.dense({cols}, in.dtype());
  Tensor dy = in.matrix(rows, cols), y = in.matrix(rows, cols);
  Tensor rstd = in.dense({rows}, DType::F32), dweight = in.dense({cols}, DType::F32);
  Tensor dx = in_place ? dy : in.matrix(rows, cols), none;
  backend.rms_norm_forward(y, rstd, x, weight, cols == 1 ? 0.5 : 1e-5);
  if (variant == 2 || in.device() == Device::CPU) {
    const Tensor same_dy = in_place && in.device() == Device::CPU ? dy.clone() : dy;
    backend.rms_norm_backward(dx, dweight, same_dy, x, weight, rstd);
    return {dx, dweight};
  }
  backend.rms_norm_backward(none, dweight, dy, x, weight, rstd);
  launch_rms_norm_dx(variant, dx, dy, x, weight, rstd, static_cast<CudaBackend&>(backend).stream());
  return {dx, dweight};
}

TEST_F(SmallKernels, RmsNormBackwardAgreesInBothVariants) {
  for_sizes([](int64_t rows, int64_t cols, const std::string& size) {
    for (int variant : {1, 2})
      for (bool in_place : {false, true})
        compare(concat("rms_norm_backward ", variant, " ", size, in_place ? " in place" : ""),
                [&](Backend& backend, Inputs& in) {
                  return rms_norm_gradients(backend, in, rows, cols, variant, in_place);
                });
  });
}

TEST_F(SmallKernels, RmsNormSumsTheWeightGradientOfManyChunks) {
  compare("rms_norm_backward (700, 12)", [](Backend& backend, Inputs& in) {
    return rms_norm_gradients(backend, in, 700, 12, 2, false);
  });
}

TEST_F(SmallKernels, RopeAgreesInPlaceAndBackward) {
  for (int64_t tokens : kRows)
    for (int64_t head_dim : {2, 6, 64, 128})
      for (int direction : {+1, -1})
        for (bool on_device : {false, true})
          compare(concat("rope (", tokens, ", 3, ", head_dim, ") ", direction),
                  [&](Backend& backend, Inputs& in) -> std::vector<Tensor> {
                    const Tensor x = in.dense({tokens, 3, head_dim}, in.dtype());
                    const Tensor table = in.matrix_of(19, head_dim, DType::F32);
                    const Tensor positions = in.ids(tokens, 19, on_device);
                    Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
                    Tensor over = x.clone();
                    backend.rope(y, x, positions, table, direction);
                    backend.rope(over, over, positions, table, direction);
                    return {y, over};
                  });
}

// 9 heads of 64 dimensions have 288 pairs, and rows 3 apart give each to a thread of its own.
TEST_F(SmallKernels, RopeTurnsMorePairsThanABlockHasThreads) {
  compare("rope (2, 9, 64)", [](Backend& backend, Inputs& in) -> std::vector<Tensor> {
    const Tensor x = in.dense({2, 9, 64}, in.dtype()), table = in.matrix_of(19, 64, DType::F32);
    Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
    backend.rope(y, x, in.ids(2, 19, false), table, 1);
    return {y};
  });
}

TEST_F(SmallKernels, RopeRefusesAPositionOutsideTheTable) {
  Inputs in(Device::CUDA, DType::F32, 0);
  Tensor x = in.dense({1, 1, 8}, DType::F32);
  const Tensor table = in.dense({4, 8}, DType::F32), positions = Tensor::from_ints({1}, {4});
  EXPECT_THROW(cuda_backend().rope(x, x, positions, table, 1), Error);
  cuda_backend().rope(x, x, positions.to(Device::CUDA), table, 1);  // the device answers with NaN
  for (double value : x.to_doubles()) EXPECT_TRUE(std::isnan(value));
}

TEST_F(SmallKernels, ElementwiseOpsAgreeBetweenDTypes) {
  for_sizes([](int64_t rows, int64_t cols, const std::string& size) {
    for (DType other : {DType::F32, DType::BF16, DType::F16})
      compare(concat("elementwise ", size, " and ", dtype_name(other)),
              [&](Backend& backend, Inputs& in) -> std::vector<Tensor> {
                const Tensor x = in.matrix_of(rows, cols, other), a = in.matrix(rows, cols);
                const Tensor factor = in.dense({1}, DType::F32);
                std::vector<Tensor> out;
                for (int i = 0; i < 7; ++i) out.push_back(in.matrix(rows, cols));
                backend.fill(out[0], 0);
                backend.fill(out[1], 0.3);
                backend.copy(out[2], x);
                backend.scale(out[3], x, -1.7);
                backend.scale_by(out[4], x, factor);
                backend.add(out[5], a, x);
                backend.axpy(out[6], x, 0.7);
                return out;
              });
  });
}

// Eight F32 are two loads of 16 bytes, and need be aligned to no more than one of them.
TEST_F(SmallKernels, EightFloatsNeedTheAlignmentOfFour) {
  for (const auto& [to, from] : {std::pair{DType::BF16, DType::F32}, {DType::F32, DType::BF16}}) {
    Inputs in(Device::CUDA, DType::F32, 0);
    const auto part = [](const Tensor& whole, bool f32) {
      return f32 ? whole.slice_cols(4, 20) : whole.slice_cols(0, 16);
    };
    const Tensor x = part(in.dense({5, 24}, from), from == DType::F32);
    Tensor y = part(in.dense({5, 24}, to), to == DType::F32);
    cuda_backend().copy(y, x);
    Tensor expected = Tensor::empty({5, 16}, to, Device::CPU);
    reference_backend().copy(expected, x.to(Device::CPU));
    expect_same_bytes(y.to(Device::CPU), expected,
                      concat(dtype_name(from), " to ", dtype_name(to)));
  }
}

TEST_F(SmallKernels, SumsOverRowsAndOverEverythingAgree) {
  for_sizes([](int64_t rows, int64_t cols, const std::string& size) {
    compare("sums " + size, [&](Backend& backend, Inputs& in) -> std::vector<Tensor> {
      const Tensor x = in.matrix(rows, cols), flat = in.dense({rows * cols}, DType::F32);
      Tensor sum = in.dense({cols}, DType::F32), more = in.dense({cols}, DType::F32);
      Tensor total = in.dense({1}, DType::F64), narrow = in.dense({1}, DType::F32);
      backend.sum_rows(sum, x, false);
      backend.sum_rows(more, x, true);
      backend.add_sum(total, flat, 0.25);
      backend.copy(narrow, total);
      return {sum, more, total, narrow};
    });
  });
}

TEST_F(SmallKernels, SwigluAgreesForwardAndBackward) {
  for_sizes([](int64_t rows, int64_t cols, const std::string& size) {
    compare("swiglu " + size, [&](Backend& backend, Inputs& in) -> std::vector<Tensor> {
      const Tensor gate = in.matrix(rows, cols, 3), up = in.matrix(rows, cols);
      const Tensor dy = in.matrix(rows, cols);
      Tensor y = in.matrix(rows, cols), dgate = in.matrix(rows, cols), dup = in.matrix(rows, cols);
      Tensor only_gate = in.matrix(rows, cols), only_up = in.matrix(rows, cols), none;
      backend.swiglu_forward(y, gate, up);
      backend.swiglu_backward(dgate, dup, dy, gate, up);
      backend.swiglu_backward(only_gate, none, dy, gate, up);
      backend.swiglu_backward(none, only_up, dy, gate, up);
      Tensor over_gate = gate.clone(), over_up = up.clone();
      backend.swiglu_backward(over_gate, over_up, dy, over_gate, over_up);
      return {y, dgate, dup, only_gate, only_up, over_gate, over_up};
    });
  });
}

TEST_F(SmallKernels, RowsArePickedFromWeightsOfEveryDType) {
  for_sizes([](int64_t rows, int64_t cols, const std::string& size) {
    for (DType weight_dtype : {DType::F32, DType::BF16, DType::F16})
      compare(concat("embedding_forward ", size, " ", dtype_name(weight_dtype)),
              [&](Backend& backend, Inputs& in) -> std::vector<Tensor> {
                const Tensor weight = in.matrix_of(11, cols, weight_dtype);
                const Tensor ids = in.ids(rows, 11, false), there = in.ids(rows, 11, true);
                Tensor y = in.matrix(rows, cols), gathered = in.matrix(rows, cols);
                backend.embedding_forward(y, ids, weight);
                backend.gather_rows(gathered, weight, there);
                return {y, gathered};
              });
  });
}

TEST_F(SmallKernels, RowsAreAddedInTokenOrder) {
  for_sizes([](int64_t rows, int64_t cols, const std::string& size) {
    for (int64_t vocabulary : {1, 5, 90})
      compare(concat("embedding_backward ", size, " of ", vocabulary),
              [&](Backend& backend, Inputs& in) -> std::vector<Tensor> {
                const Tensor ids = in.ids(rows, vocabulary, false);
                const Tensor dy = in.matrix(rows, cols);
                Tensor dweight = in.matrix_of(vocabulary, cols, DType::F32);
                backend.embedding_backward(dweight, ids, dy);
                return {dweight};
              });
  });
}

// F32 sums in token order have one right answer, to the bit.
TEST_F(SmallKernels, AddedRowsHaveTheBitsOfASequentialSum) {
  for (int64_t tokens : {37, 100, 300}) {
    Inputs in(Device::CPU, DType::F32, 0);
    const Tensor ids = in.ids(tokens, 7, false), dy = in.dense({tokens, 12}, DType::F32);
    Tensor expected = in.dense({7, 12}, DType::F32);
    Tensor actual = expected.to(Device::CUDA);
    cuda_backend().embedding_backward(actual, ids, dy.to(Device::CUDA));
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < 12; ++c)
        expected.data<float>()[ids.data<int32_t>()[t] * 12 + c] += dy.data<float>()[t * 12 + c];
    expect_same_bytes(actual.to(Device::CPU), expected, concat(tokens, " tokens"));
  }
}

TEST_F(SmallKernels, RowsScatterIntoTheirOwnDType) {
  for_sizes([](int64_t rows, int64_t cols, const std::string& size) {
    compare("scatter_add_rows " + size, [&](Backend& backend, Inputs& in) -> std::vector<Tensor> {
      std::vector<int32_t> order(static_cast<size_t>(rows));  // each row once, from the last
      for (int64_t i = 0; i < rows; ++i) order[size_t(i)] = int32_t(2 * (rows - 1 - i));
      const Tensor ids = Tensor::from_ints({rows}, order).to(in.device());
      const Tensor src = in.matrix(rows, cols);
      Tensor dst = in.matrix(2 * rows + 1, cols);
      backend.scatter_add_rows(dst, src, ids);
      return {dst};
    });
  });
}

TEST_F(SmallKernels, ArgmaxFindsTheFirstLargest) {
  for (int64_t rows : kRows)
    for (int64_t cols : {1, 6, 31, 33, 1023, 1025, 5000}) {
      Inputs in(Device::CPU, DType::F32, 0);
      Tensor x = in.matrix(rows, cols + 3).slice_cols(0, cols);
      for (int64_t r = 0; r < rows; ++r) {  // equal ones: the first counts, also if it is -inf
        float* row = x.data<float>() + r * x.row_stride();
        if (r == 1) row[cols / 2] = row[cols - 1] = 100;
        if (r == 2) std::fill_n(row, cols, -INFINITY);
      }
      Tensor expected = Tensor::empty({rows}, DType::I32), cpu = Tensor::empty({rows}, DType::I32);
      Tensor actual = Tensor::empty({rows}, DType::I32, Device::CUDA);
      reference_backend().argmax_rows(expected, x);
      cpu_backend().argmax_rows(cpu, x);
      cuda_backend().argmax_rows(actual, x.to(Device::CUDA));
      const std::string what = concat("argmax (", rows, ", ", cols, ")");
      expect_same_bytes(cpu, expected, what + " on the CPU");
      expect_same_bytes(actual.to(Device::CPU), expected, what);
      if (rows <= 2) continue;
      EXPECT_EQ(expected.data<int32_t>()[1], cols / 2);
      EXPECT_EQ(expected.data<int32_t>()[2], 0);
    }
}

TEST_F(SmallKernels, RowsOutOfRangeAreRefused) {
  Inputs in(Device::CUDA, DType::F32, 0);
  const Tensor weight = in.dense({4, 8}, DType::F32);
  Tensor y = in.dense({2, 8}, DType::F32), dweight = weight.clone();
  for (int32_t bad : {-1, 4}) {
    const Tensor ids = Tensor::from_ints({2}, {1, bad});
    EXPECT_THROW(cuda_backend().embedding_forward(y, ids, weight), Error);
    EXPECT_THROW(cuda_backend().gather_rows(y, weight, ids), Error);
    EXPECT_THROW(cuda_backend().embedding_backward(dweight, ids, y), Error);
    EXPECT_THROW(cuda_backend().scatter_add_rows(dweight, y, ids), Error);
    // On the device nothing throws: such a row is NaN, and is not added.
    cuda_backend().gather_rows(y, weight, ids.to(Device::CUDA));
    EXPECT_TRUE(std::isnan(y.to_doubles()[8]));
    Tensor ones =
        Tensor::from_floats({2, 8}, std::vector<double>(16, 1), DType::F32).to(Device::CUDA);
    Tensor sums = weight.clone();
    cuda_backend().scatter_add_rows(sums, ones, ids.to(Device::CUDA));
    const auto before = weight.to_doubles(), after = sums.to_doubles();
    for (size_t i = 0; i < before.size(); ++i)
      EXPECT_EQ(after[i], i / 8 == 1 ? float(before[i]) + 1.0f : before[i]) << i;
  }
}

TEST(Philox, GivesTheHostsWordsOnTheDevice) {
  Random random(3);
  for (int i = 0; i < 1000; ++i) {
    uint32_t in[6];
    for (uint32_t& word : in) word = random.next_u32();
    const auto host = philox({in[0], in[1], in[2], in[3]}, {in[4], in[5]});
    const PhiloxWords device = philox_words({{in[0], in[1], in[2], in[3]}}, in[4], in[5]);
    for (size_t word = 0; word < 4; ++word) ASSERT_EQ(device.word[word], host[word]) << i;
  }
}

TEST_F(SmallKernels, DropoutDrawsTheReferencesMask) {
  // Rows past 2^32 reach the high half of the key.
  for (int64_t first_row : {int64_t(0), int64_t(1234567), (int64_t(1) << 32) - 2})
    for (double p : {0.0, 0.1, 0.75, 1 - 1e-12})
      for_sizes([&](int64_t rows, int64_t cols, const std::string& size) {
        const DropoutKey key{
            .seed = 0x123456789abcdef0u, .step = 5, .module = 9, .first_row = first_row};
        if (rows == 37 && cols == 520 && p != 0.1) return;  // enough of those
        compare(concat("dropout ", size, " p ", p),
                [&](Backend& backend, Inputs& in) -> std::vector<Tensor> {
                  const Tensor x = in.matrix(rows, cols);
                  Tensor y = in.matrix(rows, cols), sum = in.matrix(rows, cols);
                  backend.dropout(y, x, p, key, false);
                  backend.dropout(sum, x, p, key, true);
                  return {y, sum};
                });
      });
}

TEST_F(SmallKernels, DropoutKeepsExactlyWhatTheReferenceKeeps) {
  const DropoutKey key{.seed = 77, .step = 1, .module = 2, .first_row = 3};
  for (int64_t cols : kCols) {
    const Tensor ones =
        Tensor::from_floats({37, cols}, std::vector<double>(size_t(37 * cols), 1), DType::F32);
    Tensor expected = Tensor::empty(ones.shape(), DType::F32);
    Tensor actual = Tensor::empty(ones.shape(), DType::F32, Device::CUDA);
    reference_backend().dropout(expected, ones, 0.5, key, false);
    cuda_backend().dropout(actual, ones.to(Device::CUDA), 0.5, key, false);
    expect_same_bytes(actual.to(Device::CPU), expected, concat(cols, " columns"));
  }
}

// p is the very draw of one element, and "kept when the draw is at least p" keeps that one.
TEST_F(SmallKernels, DropoutKeepsADrawThatIsTheThreshold) {
  const DropoutKey key{.seed = 0x123456789abcdef0u, .step = 5, .module = 9, .first_row = 3};
  const int64_t cols = 16;
  for (Device where : {Device::CPU, Device::CUDA})
    for (bool accumulate : {false, true})
      for (int64_t col = 0; col < cols; ++col) {
        const uint32_t draw =
            philox({uint32_t(col / 4), 3, 9, 5},
                   {uint32_t(key.seed), uint32_t(key.seed >> 32)})[size_t(col % 4)];
        const double p = draw * 0x1p-32;
        const Tensor ones =
            Tensor::from_floats({1, cols}, std::vector<double>(size_t(cols), 1), DType::F32)
                .to(where);
        Tensor y = Tensor::from_floats({1, cols}, std::vector<double>(size_t(cols), 0), DType::F32)
                       .to(where);
        backend_of(where).dropout(y, ones, p, key, accumulate);
        EXPECT_FLOAT_EQ(float(y.to_doubles()[size_t(col)]), float(1 / (1 - p)))
            << device_name(where) << ", column " << col;
      }
}

TEST_F(SmallKernels, DropoutRefusesToDropEverything) {
  Inputs in(Device::CUDA, DType::F32, 0);
  Tensor x = in.dense({1, 8}, DType::F32);
  EXPECT_THROW(cuda_backend().dropout(x, x, 1, {}, false), Error);
}

TEST_F(SmallKernels, AdamWTakesTheReferencesSteps) {
  for (int64_t n : {0, 1, 6, 51, 64, 520, 1500})
    for (int64_t offset : {0, 1}) {  // a parameter need not begin at a multiple of 16 bytes
      std::vector<std::vector<Tensor>> results;
      for (Device device : {Device::CPU, Device::CUDA}) {
        Backend& backend = device == Device::CUDA ? cuda_backend() : reference_backend();
        Inputs in(device, DType::F32, 0);
        const auto flat = [&] { return in.dense({n + offset}, DType::F32); };
        Tensor whole = flat(), whole_m = flat();
        Tensor w = whole.slice_rows(offset, n + offset), m = whole_m.slice_rows(offset, n + offset);
        Tensor v = Tensor::zeros({n}, DType::F32, device);
        for (int64_t step : {1, 2, 3}) {
          const Tensor gradient = flat().slice_rows(offset, n + offset);
          backend.adamw(w, m, v, gradient, scalar(0.7).to(device),
                        {.learning_rate = 1e-2,
                         .beta1 = 0.9,
                         .beta2 = 0.999,
                         .epsilon = 1e-8,
                         .weight_decay = 0.1,
                         .step = step,
                         .lr_ratio = 3,
                         .for_b = offset == 1});
        }
        results.push_back({whole.to(Device::CPU), whole_m.to(Device::CPU), v.to(Device::CPU)});
      }
      for (size_t i = 0; i < 3; ++i)
        expect_close(results[1][i], results[0][i], 1e-5,
                     concat("adamw ", n, " from ", offset, " output ", i));
    }
}

TEST_F(SmallKernels, SumOfSquaresIsF64AndHasOneOrder) {
  // The last has more blocks of 4096 than stage 2 has threads.
  for (int64_t n : {0, 1, 6, 51, 64, 520, 4097, 20000, 260 * 4096 + 1}) {
    Inputs in(Device::CUDA, DType::F32, 0);
    const Tensor x = in.dense({n}, DType::F32);
    Tensor expected = scalar(0), actual = scalar(1).to(Device::CUDA), again = actual.clone();
    reference_backend().sum_of_squares(expected, x.to(Device::CPU));
    cuda_backend().sum_of_squares(actual, x);
    // Two sums of n terms, added in two orders.
    const double tolerance = n > 20000 ? 1e-12 : 1e-13;
    EXPECT_NEAR(actual.item(), expected.item(), tolerance * expected.item()) << n;
    cuda_backend().sum_of_squares(again, x);
    EXPECT_EQ(again.item(), actual.item()) << n;
  }
}

// {loss, sum of squares, most} and what torch.nn.utils.clip_grad_norm_ multiplies by.
TEST_F(SmallKernels, ClippingFollowsTorchAndRefusesWhatIsNotFinite) {
  const double inf = INFINITY, nan = NAN;
  const struct {
    double loss, squares, most, norm, factor;
  } cases[] = {{1, 4, 1, 2, 1 / (2 + 1e-6)},
               {1, 0.25, 1, 0.5, 1},
               {1, 4, 0, 2, 1},
               {1, 0, 1, 0, 1},
               {nan, 4, 1, 2, nan},
               {inf, 4, 0, 2, nan},
               {1, inf, 1, inf, nan},
               {1, nan, 0, nan, nan}};
  for (const auto& c : cases)
    for (Device device : {Device::CPU, Device::CUDA}) {
      Tensor outcome = Tensor::from_floats({3}, {c.loss, c.squares, 7}, DType::F64).to(device);
      backend_of(outcome).clip_factor(outcome, c.most);
      const std::vector<double> got = outcome.to_doubles(), wanted{c.loss, c.norm, c.factor};
      for (size_t i = 0; i < 3; ++i)
        EXPECT_TRUE(got[i] == wanted[i] || (std::isnan(got[i]) && std::isnan(wanted[i])))
            << got[i] << ", wanted " << wanted[i];
    }
}

TEST_F(SmallKernels, AdamWDoesNothingWhereTheFactorIsNotANumber) {
  for (Device device : {Device::CPU, Device::CUDA}) {
    Inputs in(device, DType::F32, 0);
    Tensor w = in.dense({70}, DType::F32), m = in.dense({70}, DType::F32);
    Tensor v = Tensor::zeros({70}, DType::F32, device);
    const Tensor before[] = {w.clone(), m.clone(), v.clone()};
    backend_of(w).adamw(w, m, v, in.dense({70}, DType::F32), scalar(NAN).to(device),
                        {1e-2, 0.9, 0.999, 1e-8, 0.1, 1});
    const Tensor after[] = {w, m, v};
    for (int i = 0; i < 3; ++i)
      expect_same_bytes(after[i].to(Device::CPU), before[i].to(Device::CPU), "state");
  }
}

}  // namespace
}  // namespace graft
