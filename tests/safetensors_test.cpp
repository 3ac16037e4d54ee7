// The file format against its fixtures and against files that lie. The layout rules are those of
// the reference implementation (huggingface/safetensors, tensor.rs).
#include "tensor/safetensors.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

namespace graft {
namespace {

namespace fs = std::filesystem;

class Safetensors : public testing::Test {
 protected:
  Safetensors() {
    directory_ = fs::temp_directory_path() / ("graft_safetensors_" + std::to_string(getpid()));
    fs::create_directories(directory_);
  }
  ~Safetensors() override { fs::remove_all(directory_); }

  std::string path(const std::string& name = "a.safetensors") const {
    return (directory_ / name).string();
  }
  // A file of this header text and `bytes` bytes of data, 0, 1, 2, ...
  std::string file(const std::string& header, int bytes,
                   std::optional<uint64_t> header_length = {}) {
    std::string content;
    const uint64_t length = header_length.value_or(header.size());
    for (int i = 0; i < 8; ++i) content += char(length >> (8 * i));
    content += header;
    for (int i = 0; i < bytes; ++i) content += char(i);
    return raw(content);
  }
  std::string raw(const std::string& content) {
    std::ofstream(path(), std::ios::binary) << content;
    return path();
  }
  static std::string read(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  // The one line with which opening the file is refused; it names the file.
  static std::string refusal(const std::string& path) {
    try {
      SafetensorsFile opened(path);
    } catch (const Error& error) {
      const std::string what = error.what();
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      EXPECT_EQ(what.rfind(path, 0), 0u) << what;
      return what;
    }
    return "accepted";
  }
  static void expect_refused(const std::string& path, const std::string& part) {
    const std::string got = refusal(path);
    EXPECT_NE(got.find(part), std::string::npos) << "got: " << got << "\nwanted: " << part;
  }

  fs::path directory_;
};

TEST_F(Safetensors, ReadsTensorsInPlaceWithShapeAndMetadata) {
  const std::string path = file(
      R"({"__metadata__":{"format":"pt","x":"y"},"b":{"dtype":"U8","shape":[2,3],"data_offsets":[4,10]},)"
      R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})",
      10);
  Tensor b;
  {
    const SafetensorsFile opened(path);
    ASSERT_EQ(opened.entries().size(), 2u);
    EXPECT_EQ(opened.entries()[0].name, "a");
    EXPECT_EQ(opened.metadata().at("x"), "y");
    EXPECT_EQ(opened.find("c"), nullptr);
    b = opened.tensor("b");
  }
  EXPECT_TRUE(b.storage()->is_borrowed());  // and outlives the file that it came from
  EXPECT_EQ(b.shape(), (Shape{2, 3}));
  EXPECT_EQ(b.data<uint8_t>()[5], 9);
}

TEST_F(Safetensors, CopiesATensorThatLiesOffItsAlignment) {
  const std::string header =
      R"({"p":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"f":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})";
  const std::string path = file(header, 9);
  const Tensor f = SafetensorsFile(path).tensor("f");
  EXPECT_FALSE(f.storage()->is_borrowed());
  uint32_t bits;
  std::memcpy(&bits, f.raw(), 4);
  EXPECT_EQ(bits, 0x04030201u);
}

TEST_F(Safetensors, AcceptsAnEmptyTensorAndAnEmptyFile) {
  EXPECT_EQ(SafetensorsFile(file("{}", 0)).entries().size(), 0u);
  const SafetensorsFile opened(
      file(R"({"e":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}})", 0));
  EXPECT_EQ(opened.tensor("e").num_elements(), 0);
}

TEST_F(Safetensors, AcceptsAHeaderPaddedWithSpaces) {
  EXPECT_EQ(refusal(file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}    )", 1)),
            "accepted");
}

TEST_F(Safetensors, RefusesMissingAndTruncatedFiles) {
  expect_refused(path("missing.safetensors"), "cannot be opened");
  expect_refused(directory_.string(), "not a regular file");
  expect_refused(raw(""), "truncated");
  expect_refused(raw("1234567"), "truncated");
  expect_refused(file(R"({"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}})", 8), "truncated");
}

TEST_F(Safetensors, RefusesAHeaderLongerThanTheFile) {
  expect_refused(file("{}", 0, 3), "header should have 3 bytes");
  expect_refused(file("{}", 0, ~uint64_t(0)), "header should have 18446744073709551615 bytes");
}

TEST_F(Safetensors, RefusesAHeaderThatIsNotAJsonObjectOfTensors) {
  expect_refused(file("{]", 0), "not JSON");
  expect_refused(file("\xff\xfe", 0), "not JSON");
  expect_refused(file("[]", 0), "not a JSON object");
  expect_refused(file(std::string(100000, '['), 0), "not JSON");
  expect_refused(file(R"({"a":7})", 0), "tensor 'a'");
  expect_refused(file(R"({"a":{"dtype":"U8","shape":[1]}})", 1), "tensor 'a'");
  expect_refused(file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1), "tensor 'a'");
  expect_refused(file(R"({"__metadata__":{"a":7}})", 0), "__metadata__");
}

TEST_F(Safetensors, RefusesDoubledNames) {
  expect_refused(file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                      R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                      2),
                 "'a' is in the header twice");
}

TEST_F(Safetensors, RefusesUnknownDtypes) {
  expect_refused(file(R"({"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,1]}})", 1),
                 "unknown dtype 'Q7'");
}

TEST_F(Safetensors, RefusesOffsetsThatDoNotFit) {
  const auto two = [&](const std::string& a, const std::string& b, int bytes) {
    return file(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
                    R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}",
                bytes);
  };
  expect_refused(two("[0,4]", "[3,7]", 7), "overlap");
  expect_refused(two("[0,4]", "[0,4]", 4), "overlap");
  expect_refused(two("[0,4]", "[5,9]", 9), "belong to no tensor");
  expect_refused(two("[1,5]", "[5,9]", 9), "belong to no tensor");
  expect_refused(two("[0,4]", "[4,8]", 9), "tensors end at byte 8");
  expect_refused(two("[0,4]", "[4,8]", 7), "truncated");
  expect_refused(two("[4,0]", "[4,8]", 8), "begin <= end");
  expect_refused(two("[-4,0]", "[0,4]", 4), "begin <= end");
  expect_refused(two("[0.0,4.0]", "[4,8]", 8), "begin <= end");
  expect_refused(two("[0,18446744073709551615]", "[4,8]", 8), "begin <= end");
  expect_refused(two("[0,99999999999999999999999]", "[4,8]", 8), "begin <= end");
}

TEST_F(Safetensors, RefusesASizeThatIsNotShapeTimesDtype) {
  const auto one = [&](const std::string& shape) {
    return file(R"({"a":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":[0,8]}})", 8);
  };
  EXPECT_EQ(refusal(one("[2]")), "accepted");
  expect_refused(one("[3]"), "has 8 bytes, wanted 12");
  expect_refused(one("[0]"), "has 8 bytes, wanted 0");
  expect_refused(one("[-2]"), "whole numbers");
  expect_refused(one("[2.0]"), "whole numbers");
  expect_refused(one("[\"2\"]"), "whole numbers");
  // 2^62 * 2 * 4 bytes is 8 modulo 2^64 were it not counted as an overflow.
  expect_refused(one("[4611686018427387904,2,1]"), "whole numbers");
  expect_refused(one("[2305843009213693952,8]"), "more elements");
}

TEST_F(Safetensors, NamesWhatItCannotGive) {
  const SafetensorsFile opened(
      file(R"({"i":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
           R"("r":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[8,9]}})",
           9));
  const auto refused = [&](const std::string& name) {
    try {
      opened.tensor(name);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("given");
  };
  EXPECT_NE(refused("i").find("dtype I64"), std::string::npos) << refused("i");
  EXPECT_NE(refused("r").find("rank 5"), std::string::npos) << refused("r");
  EXPECT_NE(refused("x").find("'x' is missing"), std::string::npos) << refused("x");
}

TEST_F(Safetensors, WritesTheBytesOfTheReferenceLayout) {
  // Sorted by falling dtype size, then name; header padded with spaces to a multiple of 8.
  const Tensor floats = Tensor::from_floats({2}, {1, -2}, DType::F32);
  const Tensor half = Tensor::from_floats({1, 1}, {0.5}, DType::BF16);
  write_safetensors(path(), {{"a", half}, {"z", floats}});
  std::string header =
      R"({"__metadata__":{"format":"pt"},"z":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
      R"("a":{"dtype":"BF16","shape":[1,1],"data_offsets":[8,10]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  std::string wanted(8, '\0');
  wanted[0] = char(header.size());
  wanted += header;
  wanted += std::string("\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x3f", 10);
  EXPECT_EQ(read(path()), wanted);
  EXPECT_FALSE(fs::exists(path() + ".tmp"));
}

TEST_F(Safetensors, ReadsBackWhatItWroteAndConvertsOnTheWay) {
  const Tensor matrix = Tensor::from_floats({2, 3}, {0, 1, 2, 3, 4, 5.00001}, DType::F32);
  write_safetensors(path(), {{"whole", matrix}, {"columns", matrix.slice_cols(1, 3)}});
  EXPECT_EQ(SafetensorsFile(path()).tensor("whole").to_doubles(), matrix.to_doubles());
  EXPECT_EQ(SafetensorsFile(path()).tensor("columns").to_doubles(),
            (std::vector<double>{1, 2, 4, double(5.00001f)}));
  write_safetensors(path(), {{"whole", matrix}}, DType::BF16);
  const Tensor rounded = SafetensorsFile(path()).tensor("whole");
  EXPECT_EQ(rounded.dtype(), DType::BF16);
  EXPECT_EQ(rounded.to_doubles()[5], 5);
}

// RLIMIT_FSIZE stands in for a full disk: the write fails half-way with EFBIG.
TEST_F(Safetensors, LeavesTheOldFileWhenTheDiskIsFull) {
  write_safetensors(path(), {{"old", Tensor::zeros({4}, DType::F32)}});
  const std::string before = read(path());
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{4096, 4096};
    setrlimit(RLIMIT_FSIZE, &limit);
    try {
      write_safetensors(path(), {{"new", Tensor::zeros({100000}, DType::F32)}});
    } catch (const Error& error) {
      _exit(std::string(error.what()).find(path()) == 0 ? 7 : 8);
    }
    _exit(9);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_EQ(read(path()), before);
  EXPECT_FALSE(fs::exists(path() + ".tmp"));
}

TEST_F(Safetensors, RefusesToWriteIntoAMissingDirectory) {
  EXPECT_THROW(write_safetensors(path("no/such/a.safetensors"), std::vector<NamedTensor>{}), Error);
}

// 132 tensors: 11 dtypes x 3 patterns x 4 shapes, written by another implementation; each name says
// which pattern its values follow.
TEST(SafetensorsFixtures, AreReadInFull) {
  const char* given = std::getenv("GRAFT_SHARED_DATA");
  const fs::path data = fs::path(given ? given : "../shared/data") / "safetensors";
  if (!fs::exists(data)) GTEST_SKIP() << data << " is not there";
  const SafetensorsFile fixtures((data / "fixtures.safetensors").string());
  EXPECT_EQ(fixtures.entries().size(), 132u);
  int compared = 0;
  for (const auto& entry : fixtures.entries()) {
    const std::string& name = entry.name;
    if (entry.dtype == "U8") continue;
    if (entry.dtype[0] != 'F' && entry.dtype != "BF16" && entry.dtype != "I32") {
      EXPECT_THROW(fixtures.tensor(name), Error) << name;
      continue;
    }
    const std::vector<double> values = fixtures.tensor(name).to_doubles();
    for (size_t i = 0; i < values.size(); ++i) {
      const bool gradient = name.find("gradient") != std::string::npos;
      const bool repeating = name.find("repeating") != std::string::npos;
      EXPECT_EQ(values[i], double(gradient ? i : repeating ? i % 10 + 1 : i % 2)) << name;
    }
    ++compared;
  }
  EXPECT_EQ(compared, 12 * 4);
  // Row i of this Vandermonde matrix holds the powers of i + 1, from the first on.
  const SafetensorsFile vandermonde((data / "vandermonde.safetensors").string());
  ASSERT_EQ(vandermonde.entries().size(), 3u);
  for (const auto& entry : vandermonde.entries()) {
    const Tensor v = vandermonde.tensor(entry.name);
    ASSERT_EQ(v.shape(), (Shape{5, 5}));
    const std::vector<double> x = v.to_doubles();
    for (int i = 0; i < 5; ++i)
      for (int j = 0; j < 5; ++j) {
        const double wanted = std::pow(i + 1, j + 1);
        EXPECT_NEAR(x[size_t(5 * i + j)], wanted, 2e-2 * wanted) << entry.name;
      }
  }
}

}  // namespace
}  // namespace graft
