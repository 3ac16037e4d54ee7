// Runs every test, prints why a test was skipped (--gtest_brief hides that), and closes with the
// one line that any reader of logs understands.
#include <gtest/gtest.h>

#include <cstdio>

namespace {

class PrintSkips : public testing::EmptyTestEventListener {
  // Asked for here: UnitTest's lock is held while a part result is told.
  void OnTestStart(const testing::TestInfo& test) override { test_ = &test; }
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.skipped() || !test_) return;
    std::printf("skipped %s.%s: %s\n", test_->test_suite_name(), test_->name(), result.message());
  }
  const testing::TestInfo* test_ = nullptr;
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  testing::UnitTest::GetInstance()->listeners().Append(new PrintSkips);
  const int result = RUN_ALL_TESTS();
  const auto& unit = *testing::UnitTest::GetInstance();
  std::printf("%d passed, %d failed, %d skipped\n", unit.successful_test_count(),
              unit.failed_test_count(), unit.skipped_test_count());
  return result;
}
