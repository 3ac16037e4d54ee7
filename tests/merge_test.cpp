// Merged models on disk: against the logits of tests/golden/stacks, which transformers computed
// from merged weights; and a certificate that notices one wrong weight.
#include "models/merge.h"

#include <algorithm>

#include "models/adapter_delta.h"
#include "models/adapter_stack.h"
#include "models/weights.h"
#include "tensor/backend.h"
#include "tensor/nf4.h"
#include "tests/golden_case.h"

namespace graft {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

std::vector<WeightedAdapter> adapters_of(const Json& golden) {
  std::vector<WeightedAdapter> adapters;
  for (const Json& one : golden["adapters"]) adapters.push_back({read_adapter(one[0]), one[1]});
  return adapters;
}

std::vector<std::vector<int32_t>> rows_of(const Json& golden) {
  return golden["input_ids"].get<std::vector<std::vector<int32_t>>>();
}

Json golden_of(const std::string& name) {
  return golden_json("tests/golden/stacks/" + name + ".json");
}

void merge(const Json& golden, DType dtype, const std::string& folder) {
  const auto base = load_model(golden["model"]);
  write_merged(*base, golden["model"], adapters_of(golden), dtype, folder);
}

TEST(Merge, GivesTheLogitsOfTransformers) {
  for (const char* name :
       {"mixed_ranks", "mixed_rslora", "three", "one", "dora", "dora_and_lora", "dora_patterns"}) {
    const Json golden = golden_of(name);
    const ScratchFolder scratch;
    merge(golden, DType::F32, scratch / "m");
    const auto merged = load_model(scratch / "m");
    EXPECT_LT(
        worst_share(logits_of(*merged, golden["input_ids"]), golden_numbers(golden["logits"])),
        1e-5)
        << name;
    const Json config = golden_json(scratch / "m/config.json");
    EXPECT_EQ(ModelConfig::load(scratch / "m").tie_word_embeddings,
              ModelConfig::load(golden["model"]).tie_word_embeddings);
    EXPECT_EQ(config.value("dtype", config.value("torch_dtype", "")), "float32");
  }
}

// Rounded once: each BF16 weight is that of the F32 merge, rounded to nearest even.
TEST(Merge, RoundsOnce) {
  const Json golden = golden_of("mixed_ranks");
  const ScratchFolder scratch;
  merge(golden, DType::F32, scratch / "wide");
  for (const DType dtype : {DType::BF16, DType::F16}) {
    const std::string folder = scratch / std::string(dtype_name(dtype));
    merge(golden, dtype, folder);
    const SafetensorsFile wide(scratch / "wide/model.safetensors");
    const SafetensorsFile narrow(folder + "/model.safetensors");
    ASSERT_EQ(narrow.entries().size(), wide.entries().size());
    for (const SafetensorsEntry& entry : narrow.entries()) {
      EXPECT_EQ(entry.dtype, dtype_name(dtype));
      EXPECT_EQ(narrow.tensor(entry.name).to_doubles(),
                wide.tensor(entry.name).to(dtype).to_doubles())
          << entry.name;
    }
    EXPECT_EQ(ModelConfig::load(folder).dtype, dtype);
  }
}

TEST(Merge, CertifiesWhatItWroteAndNoticesOneWrongWeight) {
  for (const DType dtype : {DType::F32, DType::BF16}) {
    const Json golden = golden_of("three");
    const ScratchFolder scratch;
    merge(golden, dtype, scratch / "m");
    const auto wanted = load_model(golden["model"]);
    AdapterStack stack(*wanted);
    for (const Json& one : golden["adapters"]) stack.attach(one[0], one[1]);
    const auto certificate = [&] {
      const auto merged = load_model(scratch / "m", DType::F32);
      return compare_models(*wanted, *merged, rows_of(golden));
    };
    const CertificateLimits limits = CertificateLimits::of(dtype);
    const Certificate good = certificate();
    EXPECT_EQ(violations(good, limits), "");
    EXPECT_EQ(good.tokens, 23);
    EXPECT_GT(good.largest_logit, 0.1);

    const std::string path = scratch / "m/model.safetensors";
    std::vector<NamedTensor> tensors;
    {
      const SafetensorsFile file(path);
      for (const SafetensorsEntry& entry : file.entries())
        tensors.push_back({entry.name, file.tensor(entry.name).clone()});
    }
    for (NamedTensor& named : tensors) {
      if (named.name != "model.layers.1.mlp.up_proj.weight") continue;
      Tensor element = named.tensor.slice_rows(3, 4).slice_cols(7, 8);
      backend_of(element).fill(element, element.to_doubles()[0] + 2);
    }
    write_safetensors(path, std::move(tensors));
    const std::string wrong = violations(certificate(), limits);
    EXPECT_NE(wrong, "") << dtype_name(dtype);
  }
}

// A base without the adapters is not the merged model: what compare_models says of the two.
TEST(Certificate, HasKlAndAgreementOfUnlikeModels) {
  const Json golden = golden_of("three");
  const auto bare = load_model(golden["model"]), other = load_model(golden["model"]);
  const Certificate same = compare_models(*bare, *other, rows_of(golden));
  EXPECT_EQ(same.largest_difference, 0);
  EXPECT_EQ(same.agreement, 1);
  EXPECT_NEAR(same.mean_kl, 0, 1e-12);
  AdapterStack stack(*other);
  for (const Json& one : golden["adapters"]) stack.attach(one[0], one[1]);
  const Certificate unlike = compare_models(*bare, *other, rows_of(golden));
  // The definition, over the logits at once.
  const std::vector<double> p = logits_of(*bare, golden["input_ids"]),
                            q = logits_of(*other, golden["input_ids"]);
  const size_t vocab = size_t(bare->config().vocab_size);
  double kl = 0, agreement = 0, largest = 0;
  for (size_t at = 0; at < p.size(); at += vocab) {
    double zp = 0, zq = 0;
    for (size_t i = 0; i < vocab; ++i) zp += std::exp(p[at + i]), zq += std::exp(q[at + i]);
    for (size_t i = 0; i < vocab; ++i) {
      const double a = std::exp(p[at + i]) / zp, b = std::exp(q[at + i]) / zq;
      kl += a * std::log(a / b);
      largest = std::max(largest, std::abs(p[at + i] - q[at + i]));
    }
    agreement += std::max_element(&p[at], &p[at] + vocab) - &p[at] ==
                 std::max_element(&q[at], &q[at] + vocab) - &q[at];
  }
  const double count = double(p.size() / vocab);
  EXPECT_NEAR(unlike.mean_kl, kl / count, 1e-6 * kl / count);
  EXPECT_EQ(unlike.agreement, agreement / count);
  EXPECT_EQ(unlike.largest_difference, largest);
  EXPECT_GE(unlike.largest_kl, unlike.mean_kl);
  const std::string all = violations(unlike, {});
  for (const char* part : {"logits differ", "KL is", "agrees in"})
    EXPECT_NE(all.find(part), std::string::npos) << all;
}

// --- a base in NF4 ---

const std::string kQuantised = "tests/golden/quantised/";
Json nf4_golden() { return golden_json("tests/golden/trajectories/qlora/merged.json"); }

Nf4Loss merge_nf4(Decoder& base, DType dtype, const std::string& folder) {
  const AdapterFile adapter = read_adapter(nf4_golden()["adapter"]);
  return write_merged(base, kQuantised + "base", {{adapter, 1}}, dtype, folder);
}

// Saved by bitsandbytes or quantised on loading, with quantised scales and without: the merged
// files say what PEFT says of the adapter on bitsandbytes' weights.
TEST(MergeNf4, GivesTheLogitsOfPeftOnBitsandbytes) {
  const Json golden = nf4_golden();
  for (const bool double_quant : {true, false})
    for (const bool saved : {true, false}) {
      const auto base =
          saved ? load_model(kQuantised + (double_quant ? "nf4_double" : "nf4_single"), DType::F32)
                : load_model(golden["base"], DType::F32, Device::CPU, {true, double_quant});
      const ScratchFolder scratch;
      const Nf4Loss loss = merge_nf4(*base, DType::F32, scratch / "m");
      const auto merged = load_model(scratch / "m");
      EXPECT_FALSE(has_nf4_weights(*merged));
      EXPECT_LT(worst_share(logits_of(*merged, golden["input_ids"]),
                            golden_numbers(golden[double_quant ? "logits" : "logits_single"])),
                1e-5)
          << "double " << double_quant << ", saved " << saved;
      EXPECT_EQ(loss.weights, 14);
      EXPECT_EQ(loss.rounded.largest, 0);
      EXPECT_EQ(loss.rounded.share(), 0);
    }
}

// What it says of the loss, against the files: those in F32 have what base and adapters are.
TEST(MergeNf4, SaysWhatTheFilesLose) {
  const Json golden = nf4_golden();
  const auto base = load_model(golden["base"], DType::F32, Device::CPU, {true, true});
  const ScratchFolder scratch;
  merge_nf4(*base, DType::F32, scratch / "wide");
  const SafetensorsFile wide(scratch / "wide/model.safetensors");
  for (const DType dtype : {DType::BF16, DType::F16}) {
    const std::string folder = scratch / std::string(dtype_name(dtype));
    const Nf4Loss loss = merge_nf4(*base, dtype, folder);
    const SafetensorsFile narrow(folder + "/model.safetensors");
    double largest = 0, squares = 0, again = 0, again_squares = 0, norm = 0;
    int64_t weights = 0, bytes = 0, nf4 = 0;
    for (const SafetensorsEntry& entry : narrow.entries()) {
      if (!entry.name.ends_with("_proj.weight")) continue;
      ++weights;
      bytes += entry.end - entry.begin;
      nf4 += nf4_bytes(entry.shape[0] * entry.shape[1], DType::NF4);
      const Tensor written = narrow.tensor(entry.name);
      const auto p = wide.tensor(entry.name).to_doubles(), q = written.to_doubles(),
                 r = nf4_quantise(written, true).to(DType::F32).to_doubles();
      for (size_t i = 0; i < p.size(); ++i) {
        largest = std::max(largest, std::abs(q[i] - p[i]));
        again = std::max(again, std::abs(r[i] - p[i]));
        squares += std::pow(q[i] - p[i], 2);
        again_squares += std::pow(r[i] - p[i], 2);
        norm += p[i] * p[i];
      }
    }
    EXPECT_EQ(loss.weights, weights);
    EXPECT_EQ(loss.bytes_after, bytes);
    EXPECT_EQ(loss.bytes_before, nf4);
    EXPECT_EQ(loss.rounded.largest, largest);
    EXPECT_EQ(loss.quantised.largest, again);
    const double share = std::sqrt(squares / norm), again_share = std::sqrt(again_squares / norm);
    EXPECT_NEAR(loss.rounded.share(), share, 1e-9 * share);
    EXPECT_NEAR(loss.quantised.share(), again_share, 1e-9 * again_share);
    EXPECT_GT(share, 0);
    EXPECT_GT(again_share, 10 * share);
  }
}

TEST(MergeNf4, OfADenseBaseLosesNothingToNf4) {
  const auto base = load_model(kQuantised + "base", DType::F32);
  const ScratchFolder scratch;
  EXPECT_EQ(merge_nf4(*base, DType::BF16, scratch / "m").weights, 0);
}

TEST(MergeNf4, RefusesWhatTheDtypeCannotHold) {
  const auto base = load_model(kQuantised + "base", DType::F32, Device::CPU, {true, true});
  AdapterFile adapter = read_adapter(nf4_golden()["adapter"]);
  adapter.modules[0].scaling = 1e8;
  const ScratchFolder scratch;
  try {
    write_merged(*base, kQuantised + "base", {{adapter, 1}}, DType::F16, scratch / "m");
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find("F16 cannot hold; take --dtype float32"), std::string::npos) << what;
    EXPECT_EQ(what.find('\n'), std::string::npos) << what;
  }
}

// An adapter on a tied output head: the head is written by itself and the flag says so.
TEST(Merge, UntiesAHeadThatAnAdapterChanges) {
  const std::string directory = "tests/golden/models/qwen3_tied";
  const auto base = load_model(directory);
  const int64_t vocab = base->config().vocab_size, hidden = base->config().hidden_size;
  AdapterFile file;
  std::vector<double> a(size_t(2 * hidden)), b(size_t(2 * vocab));
  for (size_t i = 0; i < a.size(); ++i) a[i] = std::sin(double(i));
  for (size_t i = 0; i < b.size(); ++i) b[i] = 0.1 * std::cos(double(i));
  file.modules.push_back({"lm_head",
                          Tensor::from_floats({2, hidden}, a, DType::F32),
                          Tensor::from_floats({vocab, 2}, b, DType::F32),
                          {},
                          0.5});
  const ScratchFolder scratch;
  write_merged(*base, directory, {{file, 1}}, DType::F32, scratch / "m");
  EXPECT_FALSE(ModelConfig::load(scratch / "m").tie_word_embeddings);
  const SafetensorsFile written(scratch / "m/model.safetensors");
  const std::vector<double> head = written.tensor("lm_head.weight").to_doubles();
  const std::vector<double> embed = written.tensor("model.embed_tokens.weight").to_doubles();
  EXPECT_EQ(embed, base->embed_tokens.weight.value().to_doubles());
  for (int64_t v = 0; v < vocab; ++v)
    for (int64_t h = 0; h < hidden; ++h) {
      const size_t at = size_t(v * hidden + h);
      const double delta =
          0.5 * (b[size_t(2 * v)] * a[size_t(h)] + b[size_t(2 * v + 1)] * a[size_t(hidden + h)]);
      EXPECT_NEAR(head[at], embed[at] + delta, 1e-6);
    }
  EXPECT_NE(load_model(scratch / "m"), nullptr);
}

TEST(Merge, WritesShardsThatLoad) {
  const std::string directory = "tests/golden/models/llama_gqa";
  const auto base = load_model(directory);
  struct Collect : Visitor {
    std::vector<TensorToMake> tensors;
    void parameter(const std::string& name, Variable& value) override {
      const Tensor t = value.value();
      tensors.push_back({name, t.shape(), DType::F32, [t] { return t; }});
    }
  } collect;
  base->visit("", collect);
  const ScratchFolder scratch;
  write_shards(scratch / "m", std::move(collect.tensors), 20000);
  fs::copy(directory + "/config.json", scratch / "m/config.json");
  EXPECT_FALSE(fs::exists(scratch / "m/model.safetensors"));
  int64_t shards = 0;
  for (const auto& entry : fs::directory_iterator(scratch / "m"))
    shards += entry.path().extension() == ".safetensors";
  EXPECT_GT(shards, 3);
  const Json row = {{5, 17, 80, 3}};
  EXPECT_EQ(logits_of(*load_model(scratch / "m"), row), logits_of(*base, row));
}

// DoRA by hand: W' = m / n (W + s B A), by row.
TEST(AdapterDelta, OfDoraIsTheRowsScaledToTheirMagnitudes) {
  const Tensor w = Tensor::from_floats({2, 3}, {1, 2, 2, 0, 3, 4}, DType::F32);
  AdapterModule module{"x", Tensor::from_floats({1, 3}, {1, 0, -1}, DType::F32),
                       Tensor::from_floats({2, 1}, {0.5, -1}, DType::F32),
                       Tensor::from_floats({2}, {3, 10}, DType::F32), 2};
  Tensor merged = w.clone();
  add_delta(merged, w, module, 0.25);
  const std::vector<double> v = {2, 2, 1, -2, 3, 6}, norms = {3, 7}, m = {3, 10};
  const std::vector<double> got = merged.to_doubles(), from = w.to_doubles();
  for (size_t i = 0; i < 6; ++i)
    EXPECT_NEAR(got[i], from[i] + 0.25 * (m[i / 3] / norms[i / 3] * v[i] - from[i]), 1e-6);
}

// Where W + s B A has a row of zeros, its length divides nothing: the layer gives 0 there.
TEST(AdapterDelta, OfADoraRowWithoutLengthLeavesNothingOfTheRow) {
  const Tensor w = Tensor::from_floats({2, 2}, {0, 0, 3, 4}, DType::F32);
  const AdapterModule module{"x", Tensor::from_floats({1, 2}, {1, 2}, DType::F32),
                             Tensor::from_floats({2, 1}, {0, 0}, DType::F32),
                             Tensor::from_floats({2}, {7, 10}, DType::F32), 2};
  Tensor merged = w.clone();
  add_delta(merged, w, module, 1);
  EXPECT_EQ(merged.to_doubles(), (std::vector<double>{0, 0, 6, 8}));
}

}  // namespace
}  // namespace graft
