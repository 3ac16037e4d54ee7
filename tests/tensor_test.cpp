// Tensor, dtype conversion, allocator and random numbers: the ground floor.
#include "tensor/tensor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "tensor/random.h"

namespace graft {
namespace {

TEST(Shape, PrintsAsPeopleWriteIt) {
  EXPECT_EQ(concat(Shape{4, 512, 2048}), "(4, 512, 2048)");
  EXPECT_EQ(Shape({2, 3})[-1], 3);
  EXPECT_EQ(Shape{}.num_elements(), 1);
  EXPECT_THROW((Shape{1, 1, 1, 1, 1}), Error);
  EXPECT_THROW((Shape{2, -1}), Error);
}

TEST(BFloat16, RoundsToNearestEven) {
  // 1 + 2^-8 lies half way between 1 and 1 + 2^-7: the even one is 1. 1 + 3 * 2^-8 goes up.
  EXPECT_EQ(to_float(to_bfloat16(1.0f + 0x1p-8f)), 1.0f);
  EXPECT_EQ(to_float(to_bfloat16(1.0f + 0x3p-8f)), 1.0f + 0x2p-7f);
  EXPECT_EQ(to_float(to_bfloat16(1.0f + 0x1.1p-8f)), 1.0f + 0x1p-7f);
  EXPECT_TRUE(std::isnan(to_float(to_bfloat16(std::nanf("")))));
  EXPECT_TRUE(std::isinf(to_float(to_bfloat16(std::numeric_limits<float>::max()))));
}

TEST(Float16, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float f = to_float(Float16{uint16_t(bits)});
    if (std::isnan(f)) continue;
    ASSERT_EQ(to_float16(f).bits, bits) << f;
  }
}

// The compiler's own conversion (_Float16, IEEE round to nearest even) is the oracle.
TEST(Float16, AgreesWithTheCompilersConversion) {
  Random random(1);
  for (int i = 0; i < 200000; ++i) {
    const uint32_t bits = random.next_u32();
    float f;
    std::memcpy(&f, &bits, 4);
    if (i % 2) f = float(std::ldexp(random.normal(), int(random.below(40)) - 28));
    if (std::isnan(f)) continue;
    const _Float16 expected = static_cast<_Float16>(f);
    uint16_t expected_bits;
    std::memcpy(&expected_bits, &expected, 2);
    ASSERT_EQ(to_float16(f).bits, expected_bits) << f;
    ASSERT_EQ(to_float(Float16{expected_bits}), static_cast<float>(expected));
  }
}

TEST(Tensor, ViewsShareTheBytes) {
  Tensor t = Tensor::from_floats({3, 4}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, DType::F32);
  Tensor columns = t.slice_cols(1, 3);
  EXPECT_EQ(columns.to_doubles(), (std::vector<double>{1, 2, 5, 6, 9, 10}));
  EXPECT_FALSE(columns.is_contiguous());
  EXPECT_THROW(columns.reshape({6}), Error);
  t.data<float>()[5] = 50;
  EXPECT_EQ(columns.slice_rows(1, 2).to_doubles(), (std::vector<double>{50, 6}));
  EXPECT_EQ(columns.clone().reshape({2, 3}).to_doubles(),
            (std::vector<double>{1, 2, 50, 6, 9, 10}));
  const Tensor cube = t.reshape({3, 2, 2}).slice_rows(1, 3);
  EXPECT_EQ(cube.to_doubles(), (std::vector<double>{4, 50, 6, 7, 8, 9, 10, 11}));
  EXPECT_EQ(t.reshape({12}).slice_rows(10, 12).to_doubles(), (std::vector<double>{10, 11}));
}

TEST(Tensor, KeepsTheOwnerOfBorrowedBytesAlive) {
  auto owner = std::make_shared<std::vector<float>>(std::vector<float>{1, 2});
  std::weak_ptr<std::vector<float>> watch = owner;
  Tensor t = Tensor::borrow(owner->data(), {2}, DType::F32, owner);
  owner.reset();
  EXPECT_EQ(t.to_doubles(), (std::vector<double>{1, 2}));
  t = Tensor();
  EXPECT_TRUE(watch.expired());
}

TEST(Allocator, ReusesWhatWasGivenBack) {
  Allocator& allocator = allocator_of(Device::CPU);
  { Tensor warm = Tensor::empty({1 << 20}, DType::F32); }
  const MemoryStats before = allocator.stats();
  for (int i = 0; i < 10; ++i) {
    Tensor t = Tensor::empty({(1 << 20) - i * 100}, DType::F32, Device::CPU, Scope::Scratch);
    EXPECT_EQ(allocator.stats().live_total, before.live_total + int64_t(4) * (1 << 20));
  }
  EXPECT_EQ(allocator.stats().system_calls, before.system_calls);
  EXPECT_EQ(allocator.stats().live_total, before.live_total);
}

TEST(Allocator, CountsByScope) {
  Allocator& allocator = allocator_of(Device::CPU);
  const MemoryStats before = allocator.stats();
  const Tensor t = Tensor::empty({1024}, DType::F32, Device::CPU, Scope::Adapters);
  const int i = int(Scope::Adapters);
  EXPECT_EQ(allocator.stats().live[i], before.live[i] + 4096);
  EXPECT_NE(allocator.table().find("adapters"), std::string::npos);
}

TEST(Allocator, KeepsBlocksOfThePoolFromOthers) {
  Allocator& allocator = allocator_of(Device::CPU);
  const auto place = [](int64_t bytes) { return Tensor::empty({bytes}, DType::U8).raw(); };
  constexpr int64_t kBytes = 5 << 20;
  allocator.release_cached();
  const void* pooled = nullptr;
  {
    const SetPooled on(allocator, true);
    const Tensor live = Tensor::empty({kBytes}, DType::U8);
    pooled = live.raw();
    EXPECT_EQ(allocator.pooled_live(), 5 << 20);
  }
  EXPECT_EQ(allocator.pooled_live(), 0);
  EXPECT_NE(place(kBytes), pooled);
  const int64_t reserved = allocator.stats().reserved;
  allocator.release_cached();
  EXPECT_EQ(allocator.stats().reserved, reserved - (5 << 20));  // not the pool's
  {
    const SetPooled on(allocator, true);
    EXPECT_EQ(place(kBytes), pooled);
    const SetPooled off(allocator, false);
    EXPECT_NE(place(kBytes), pooled);
  }
  allocator.release_cached();
  allocator.release_pool();
  EXPECT_EQ(place(kBytes), pooled);
}

TEST(Allocator, ListsTheTotalsWhenMemoryIsOut) {
  try {
    Tensor::empty({int64_t(1) << 46}, DType::F32);
    FAIL() << "256 TiB were handed out";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("out of memory"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("gradient_checkpointing"), std::string::npos);
  }
}

TEST(Allocator, MetaCountsWithoutMemory) {
  // 16 TiB: nobody has that; Meta reserves addresses alone.
  const int64_t before = allocator_of(Device::Meta).stats().live_total;
  const Tensor t = Tensor::empty({int64_t(1) << 42}, DType::F32, Device::Meta);
  EXPECT_EQ(allocator_of(Device::Meta).stats().live_total, before + (int64_t(1) << 44));
}

// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
TEST(Philox, GivesThePublishedAnswers) {
  using Block = std::array<uint32_t, 4>;
  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr uint32_t f = 0xffffffff;
  EXPECT_EQ(philox({f, f, f, f}, {f, f}), (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, HasTheMomentsOfItsDistributions) {
  Random random(7, 3);
  double sum = 0, squares = 0, uniform = 0;
  const int n = 200000;
  for (int i = 0; i < n; ++i) {
    const double x = random.normal();
    sum += x;
    squares += x * x;
    uniform += random.uniform();
  }
  // Five standard errors of each mean.
  EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(double(n)));
  EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(uniform / n, 0.5, 5 * std::sqrt(1.0 / 12 / n));
  std::set<uint64_t> seen;
  for (int i = 0; i < 1000; ++i) seen.insert(random.below(7));
  EXPECT_EQ(seen, (std::set<uint64_t>{0, 1, 2, 3, 4, 5, 6}));
}

TEST(Random, StreamsDiffer) {
  EXPECT_NE(Random(1, 0).next_u32(), Random(1, 1).next_u32());
  EXPECT_NE(Random(1, 0).next_u32(), Random(2, 0).next_u32());
  EXPECT_EQ(Random(1, 5).next_u32(), Random(1, 5).next_u32());
}

}  // namespace
}  // namespace graft
