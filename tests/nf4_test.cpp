// NF4 weights against bitsandbytes: codes and scales bit for bit (tests/golden/make_nf4.py), and
// products with them against products with the same weight widened.
#include "tensor/nf4.h"

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tensor/backend.h"
#include "tensor/blockwise8.h"
#include "tensor/cpu/gemm.h"
#include "tensor/cpu/kernels/gemm_kernels.h"
#include "tests/nf4_values.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

nlohmann::json golden(const std::string& name) {
  std::ifstream file("tests/golden/" + name);
  EXPECT_TRUE(file) << name << "; run from the root of the tree";
  return nlohmann::json::parse(file);
}

std::string hex(const void* data, int64_t bytes) {
  static const char* digits = "0123456789abcdef";
  std::string text;
  for (int64_t i = 0; i < bytes; ++i) {
    const uint8_t byte = static_cast<const uint8_t*>(data)[i];
    text += {digits[byte >> 4], digits[byte & 15]};
  }
  return text;
}

std::string fnv(const void* data, int64_t bytes) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int64_t i = 0; i < bytes; ++i)
    hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", (unsigned long long)hash);
  return text;
}

DType dtype_named(const std::string& name) {
  return name == "F32" ? DType::F32 : name == "BF16" ? DType::BF16 : DType::F16;
}

Tensor dense_of(const nlohmann::json& one) {
  const Shape shape{one["shape"][0], one["shape"][1]};
  return nf4_test_values(shape.num_elements(), one["seed"])
      .to(dtype_named(one["dtype"]))
      .reshape(shape);
}

TEST(Nf4, MapsAreThoseOfBitsandbytes) {
  const auto file = golden("nf4.json");
  EXPECT_EQ(hex(dynamic_map(true), 1024), file["signed_map"]);
  EXPECT_EQ(hex(dynamic_map(false), 1024), file["unsigned_map"]);
}

TEST(Nf4, CodesAndScalesAreThoseOfBitsandbytes) {
  const auto file = golden("nf4.json");
  for (const auto& one : file["cases"]) {
    SCOPED_TRACE(one["shape"].dump() + one["dtype"].dump());
    const Tensor dense = dense_of(one);
    const Tensor tensor = nf4_quantise(dense, true), single = nf4_quantise(dense, false);
    const Nf4View view = nf4_view(tensor), single_view = nf4_view(single);
    const int64_t code_bytes = (view.elements + 1) / 2;
    if (!one["codes"].is_null()) {
      EXPECT_EQ(hex(view.codes, code_bytes), one["codes"]);
    }
    EXPECT_EQ(fnv(view.codes, code_bytes), one["codes_fnv"]);
    EXPECT_EQ(hex(view.absmax_codes, view.blocks), one["absmax_codes"]);
    EXPECT_EQ(hex(view.scales, view.groups * 4), one["scales"]);
    EXPECT_EQ(hex(view.map + 256, 4), one["offset"]);
    EXPECT_EQ(hex(view.map, 1024), hex(dynamic_map(true), 1024));
    EXPECT_EQ(fnv(single_view.codes, code_bytes), one["codes_fnv"]);
    EXPECT_EQ(fnv(single_view.absmax, view.blocks * 4), one["absmax_fnv"]);
  }
}

TEST(Nf4, WidensToWhatBitsandbytesComputesWith) {
  const auto file = golden("nf4.json");
  for (const auto& one : file["cases"]) {
    SCOPED_TRACE(one["shape"].dump() + one["dtype"].dump());
    const Tensor tensor = nf4_quantise(dense_of(one), true);
    for (Backend* backend : {&cpu_backend(), &reference_backend()}) {
      Tensor wide = Tensor::empty(tensor.shape(), DType::F32);
      Tensor narrow = Tensor::empty(tensor.shape(), DType::BF16);
      backend->copy(wide, tensor);
      backend->copy(narrow, tensor);
      EXPECT_EQ(fnv(wide.raw(), wide.num_bytes()), one["dense_f32_fnv"]);
      EXPECT_EQ(fnv(narrow.raw(), narrow.num_bytes()), one["dense_bf16_fnv"]);
    }
  }
}

TEST(Nf4, TakesHalfAByteAndAnEighthOfAByteASixtyFourth) {
  const Tensor tensor = Tensor::empty({4864, 896}, DType::NF4, Device::Meta);
  EXPECT_NEAR(double(tensor.num_bytes()) * 8 / double(tensor.num_elements()), 4.127, 0.004);
  EXPECT_THROW(tensor.slice_rows(0, 1), Error);
  EXPECT_THROW(tensor.slice_cols(0, 1), Error);
  EXPECT_EQ(tensor.reshape({896, 4864}).num_bytes(), tensor.num_bytes());
}

// The product with an NF4 weight has the bytes of the product with the weight widened to the dtype
// that it computes in: on every instruction set, for whole and for ragged blocks, for one row as
// for many, forward and backward.
struct Instructions {
  const char* name;
  const GemmKernels* kernels;
};
std::vector<Instructions> instruction_sets() {
  std::vector<Instructions> all;
  for (const CpuPath path :
       {CpuPath::Portable, CpuPath::Avx2, CpuPath::Avx512, CpuPath::Avx512Bf16, CpuPath::Amx})
    if (path <= cpu_choice().path) all.push_back({cpu_path_name(path).data(), &gemm_kernels(path)});
  if (cpu_choice().path != CpuPath::Portable) {
    all.push_back({"wide16", &gemm_kernels_wide16()});
    all.push_back({"wide16_amx", &gemm_kernels_wide16_amx()});
  }
  return all;
}

TEST(Nf4Gemm, HasTheBytesOfTheWidenedWeight) {
  struct Sizes {
    int64_t M, N, K;
  };
  ThreadPool pool(2);
  for (const Sizes s : {Sizes{1, 70, 192},
                        {3, 64, 1000},
                        {4, 300, 37},
                        {5, 64, 64},
                        {70, 40, 128},
                        {37, 130, 1100},
                        {130, 65, 2500},

                        {9, 3, 1}})
    for (const DType dtype : {DType::F32, DType::BF16})
      for (const bool double_quant : {true, false})
        for (const bool backward : {false, true})
          for (const Instructions& isa : instruction_sets()) {
            const Tensor weight =
                nf4_quantise(random_tensor({s.N, s.K}, DType::F32, 5, 0.1), double_quant);
            const Tensor wide = weight.to(dtype);
            const Tensor a = random_tensor({s.M, backward ? s.N : s.K}, dtype, 6);
            const int64_t columns = backward ? s.K : s.N;
            Tensor c = Tensor::empty({s.M, columns}, dtype), expected = c.clone();
            const GemmTerm term{.a = a, .b = weight, .transpose_b = !backward};
            const GemmTerm same{.a = a, .b = wide, .transpose_b = !backward};
            cpu_gemm(*isa.kernels, pool, c, {&term, 1}, {}, {});
            cpu_gemm(*isa.kernels, pool, expected, {&same, 1}, {}, {});
            expect_same_bytes(c, expected,
                              concat(isa.name, " ", s.M, " x ", s.N, " x ", s.K, " ",
                                     dtype_name(dtype), backward ? " backward" : " forward"));
          }
}

// Rows longer than what a thread widens at once take another path than dense ones.
TEST(Nf4Gemm, TakesVeryLongRows) {
  const Tensor weight = nf4_quantise(random_tensor({5, 40000}, DType::F32, 5, 0.1), true);
  const Tensor a = random_tensor({2, 40000}, DType::F32, 6);
  Tensor c = Tensor::empty({2, 5}, DType::F32), expected = c.clone();
  const GemmTerm term{.a = a, .b = weight, .transpose_b = true};
  cpu_backend().gemm(c, {&term, 1});
  reference_backend().gemm(expected, {&term, 1});
  expect_close(c, expected, tolerance_of(DType::F32), "c");
}

TEST(Nf4Gemm, RefusesNf4OnTheLeft) {
  const Tensor weight = nf4_quantise(random_tensor({8, 8}, DType::F32, 1), true);
  Tensor c = Tensor::empty({8, 8}, DType::F32);
  const GemmTerm term{.a = weight, .b = random_tensor({8, 8}, DType::F32, 2)};
  EXPECT_THROW(cpu_backend().gemm(c, {&term, 1}), Error);
}

}  // namespace
}  // namespace graft
