// By what an adapter knows its base: the same for the same weights wherever and however they lie,
// another for any other; and what loading an adapter makes of it.
#include "models/fingerprint.h"

#include <chrono>

#include "models/adapter.h"
#include "models/weights.h"
#include "tests/golden_case.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
const std::string kModel = "tests/golden/models/qwen3_tied",
                  kAdapter = "tests/golden/adapters/qwen3_tied";

std::vector<TensorToMake> tensors_of(const std::string& directory) {
  auto file = std::make_shared<SafetensorsFile>(directory + "/model.safetensors");
  std::vector<TensorToMake> all;
  for (const SafetensorsEntry& entry : file->entries()) {
    const Tensor t = file->tensor(entry.name);
    all.push_back({entry.name, t.shape(), t.dtype(), [t] { return t; }});
  }
  return all;
}

TEST(Fingerprint, DoesNotDependOnShardsPlaceOrDtypeAskedFor) {
  const ScratchFolder scratch;
  const BaseFingerprint before = fingerprint_of(kModel);
  EXPECT_NE(before.weights, "");
  EXPECT_EQ(before.tokenizer, "");  // this model has none
  write_shards(scratch / "shards", tensors_of(kModel), 20000);
  EXPECT_TRUE(fs::exists(scratch / "shards/model.safetensors.index.json"));
  EXPECT_EQ(fingerprint_of(scratch / "shards").weights, before.weights);
  EXPECT_EQ(load_model(kModel, DType::BF16)->fingerprint.weights, before.weights);
  EXPECT_EQ(load_model(kModel, DType::F32)->fingerprint.weights, before.weights);
}

TEST(Fingerprint, SeesEveryElementOfASmallTensorAndNamesShapesAndDtypes) {
  const std::string before = fingerprint_of(kModel).weights;
  const auto changed = [&](const std::function<void(std::vector<TensorToMake>&)>& change) {
    const ScratchFolder scratch;
    std::vector<TensorToMake> tensors = tensors_of(kModel);
    change(tensors);
    write_shards(scratch / "m", std::move(tensors));
    return fingerprint_of(scratch / "m").weights;
  };
  EXPECT_EQ(changed([](auto&) {}), before);
  EXPECT_NE(changed([](auto& t) { t[3].name += "x"; }), before);
  EXPECT_NE(changed([](auto& t) { t[3].dtype = DType::F16; }), before);
  EXPECT_NE(changed([](auto& t) { t.pop_back(); }), before);
  EXPECT_NE(changed([](auto& t) {
              Tensor other = t[3].make().clone();
              other.template data<float>()[other.num_elements() - 1] += 1e-6f;
              t[3].make = [other] { return other; };
            }),
            before);
}

TEST(Fingerprint, OfTheTokenizerIgnoresWhiteSpaceBetweenValuesAlone) {
  const ScratchFolder scratch;
  fs::copy(kModel, scratch / "m");
  const auto of = [&](const std::string& text) {
    std::ofstream(scratch / "m/tokenizer.json", std::ios::binary) << text;
    return fingerprint_of(scratch / "m").tokenizer;
  };
  const std::string first = of(R"({"a": "b c", "d": "\" e"})");
  EXPECT_EQ(of("{ \"a\":\"b c\",\n\"d\":\t\"\\\" e\" }\n"), first);
  EXPECT_NE(of(R"({"a": "bc", "d": "\" e"})"), first);
  EXPECT_NE(of(R"({"a": "b c", "d": "\"  e"})"), first);
}

TEST(Fingerprint, OfALargeFileTakesNoTime) {
  const ScratchFolder scratch;
  // 1 GB in two tensors, sparse on the disk.
  const std::string header =
      R"({"a":{"dtype":"F32","shape":[125000000],"data_offsets":[0,500000000]},)"
      R"("b":{"dtype":"F32","shape":[125000000],"data_offsets":[500000000,1000000000]}})";
  fs::create_directories(scratch / "m");
  const std::string path = scratch / "m/model.safetensors";
  const uint64_t length = header.size();
  std::ofstream(path, std::ios::binary)
      << std::string(reinterpret_cast<const char*>(&length), 8) << header;
  fs::resize_file(path, 8 + length + 1000000000);
  const auto start = std::chrono::steady_clock::now();
  fingerprint_of(scratch / "m");
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 1);
}

TEST(Fingerprint, IsWrittenWithTheAdapterAndAnotherBaseIsRefused) {
  const ScratchFolder scratch;
  const auto model = load_model(kModel);
  const LoraConfig config = load_adapter(*model, kAdapter);  // which has none: PEFT wrote it
  save_adapter(*model, config, scratch / "a");
  const SafetensorsFile file(scratch / "a/adapter_model.safetensors");
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_EQ(file.metadata().at(kBaseFingerprintKey), model->fingerprint.weights);
  EXPECT_FALSE(file.metadata().contains(kTokenizerFingerprintKey));

  std::vector<TensorToMake> tensors = tensors_of(kModel);
  Tensor other = tensors[0].make().clone();
  other.data<float>()[0] += 0.5f;
  tensors[0].make = [other] { return other; };
  fs::copy(kModel, scratch / "m");
  write_shards(scratch / "m", std::move(tensors));
  const auto another = load_model(scratch / "m");
  const std::string error = error_of([&] { load_adapter(*another, scratch / "a"); });
  EXPECT_NE(error.find("belongs to another base"), std::string::npos) << error;
  EXPECT_NE(error.find("--allow-other-base"), std::string::npos) << error;
  for (const NamedLinear& layer : linear_layers(*another)) EXPECT_EQ(layer.linear->lora, nullptr);
  EXPECT_EQ(error_of([&] { load_adapter(*another, scratch / "a", {.allow_other_base = true}); }),
            "");
  EXPECT_EQ(error_of([&] { load_adapter(*model, scratch / "a"); }), "");
}

// Another tokenizer over the same weights; and a scheme of another number says nothing.
TEST(Fingerprint, ComparesWhatBothSidesKnow) {
  const BaseFingerprint here = {"1-aa", "1-bb"};
  const auto refused = [&](const BaseFingerprint& there) {
    return error_of([&] { check_same_base(there, here, "a"); });
  };
  EXPECT_EQ(refused({"1-aa", "1-bb"}), "");
  EXPECT_EQ(refused({"", ""}), "");
  EXPECT_EQ(refused({"1-aa", ""}), "");
  EXPECT_EQ(refused({"2-cc", "1-bb"}), "");
  EXPECT_NE(refused({"1-aa", "1-cc"}).find("tokenizer"), std::string::npos);
  EXPECT_NE(refused({"1-cc", "1-bb"}).find("weights"), std::string::npos);
}

}  // namespace
}  // namespace graft
