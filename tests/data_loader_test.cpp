// Which rows a step sees.
#include "train/data_loader.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace graft {
namespace {

Dataset rows(int count) {
  Dataset dataset;
  for (int i = 0; i < count; ++i) dataset.rows.push_back({{i, i}, {i, i}});
  return dataset;
}

std::vector<int64_t> flat(const std::vector<std::vector<int64_t>>& micro_batches) {
  std::vector<int64_t> all;
  for (const auto& batch : micro_batches) all.insert(all.end(), batch.begin(), batch.end());
  return all;
}

TEST(DataLoader, AnIncompleteLastAccumulationIsAStepOfItsOwn) {
  const Dataset data = rows(11);
  DataLoader loader(data, {.batch_size = 2, .accumulation_steps = 2, .shuffle = false});
  EXPECT_EQ(loader.steps_per_epoch(), 3);
  using Batches = std::vector<std::vector<int64_t>>;
  EXPECT_EQ(loader.step(1), (Batches{{0, 1}, {2, 3}}));
  EXPECT_EQ(loader.step(2), (Batches{{4, 5}, {6, 7}}));
  EXPECT_EQ(loader.step(3), (Batches{{8, 9}, {10}}));
  EXPECT_EQ(loader.step(4), (Batches{{0, 1}, {2, 3}}));
  EXPECT_EQ(loader.position_after(2), 8);
  EXPECT_EQ(loader.position_after(3), 11);
  EXPECT_EQ(loader.position_after(4), 4);
  EXPECT_DOUBLE_EQ(loader.epochs_after(3), 1.0);
  EXPECT_DOUBLE_EQ(loader.epochs_after(4), 1.0 + 4.0 / 11);
  EXPECT_EQ(loader.epochs_after(0), 0);
}

TEST(DataLoader, EveryEpochSeesEveryRowOnceInAnotherOrder) {
  const Dataset data = rows(10);
  DataLoader loader(data, {.batch_size = 1, .accumulation_steps = 4});
  std::vector<std::vector<int64_t>> epochs(2);
  for (int epoch = 0; epoch < 2; ++epoch)
    for (int step = 1; step <= 3; ++step) {
      const auto seen = flat(loader.step(3 * epoch + step));
      epochs[epoch].insert(epochs[epoch].end(), seen.begin(), seen.end());
    }
  EXPECT_NE(epochs[0], epochs[1]);
  for (auto& epoch : epochs) {
    std::sort(epoch.begin(), epoch.end());
    for (int i = 0; i < 10; ++i) EXPECT_EQ(epoch[i], i);
  }
}

TEST(DataLoader, OrderDependsOnTheSeedAndNotOnHowRowsAreBatched) {
  const Dataset data = rows(32);
  DataLoader a(data, {.batch_size = 8, .accumulation_steps = 1, .seed = 3});
  DataLoader b(data, {.batch_size = 2, .accumulation_steps = 4, .seed = 3});
  DataLoader c(data, {.batch_size = 8, .accumulation_steps = 1, .seed = 4});
  EXPECT_EQ(flat(a.step(6)), flat(b.step(6)));
  EXPECT_NE(flat(a.step(6)), flat(c.step(6)));
}

// What a resumed run does: it asks for step n without having asked for those before.
TEST(DataLoader, AnyStepCanBeAskedForFirst) {
  const Dataset data = rows(9);
  DataLoader whole(data, {.batch_size = 1, .accumulation_steps = 2});
  for (int step = 1; step < 13; ++step) whole.step(step);
  DataLoader resumed(data, {.batch_size = 1, .accumulation_steps = 2});
  EXPECT_EQ(resumed.step(13), whole.step(13));
}

}  // namespace
}  // namespace graft
