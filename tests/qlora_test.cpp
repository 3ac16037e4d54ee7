// Models in NF4: loaded and quantised, loaded as bitsandbytes saved them, and trained on, against
// transformers, PEFT and bitsandbytes (tests/golden/make_qlora.py). What is wrong with a quantised
// file is said in one line.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "models/weights.h"
#include "tensor/nf4.h"
#include "tensor/safetensors.h"
#include "tests/tiny_run.h"
#include "tests/tolerance.h"
#include "train/finetune.h"
#include "train/memory_plan.h"
#include "train/run_setup.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

const std::string kBase = "tests/golden/quantised/base";
const std::string kDouble = "tests/golden/quantised/nf4_double";
const std::string kSingle = "tests/golden/quantised/nf4_single";
const std::string kTrajectory = "tests/golden/trajectories/qlora";
constexpr Quantisation kNf4{true, true}, kNf4Single{true, false};

Json read_golden(const std::string& folder) {
  return Json::parse(std::ifstream(folder + "/golden.json"));
}

Tensor logits_of(Decoder& model, const Json& golden) {
  NoRecord off;
  const std::vector<int32_t> ids = golden["input_ids"];
  return model.logits(model.forward(pack({ids}), {}).value());
}

Tensor expected(const Json& rows) {
  std::vector<double> values;
  for (const Json& row : rows)
    for (const Json& value : row) values.push_back(value);
  return Tensor::from_floats({int64_t(rows.size()), int64_t(rows[0].size())}, values, DType::F32);
}

TEST(QuantisedModel, LogitsAgreeWithBitsandbytes) {
  const Json golden = read_golden(kBase);
  const auto dense = load_model(kBase, DType::F32);
  expect_close(logits_of(*dense, golden), expected(golden["logits"]), 1e-4, "dense");
  const auto nf4 = load_model(kBase, DType::F32, Device::CPU, kNf4);
  expect_close(logits_of(*nf4, golden), expected(golden["logits_nf4"]), 1e-4, "double");
  const auto single = load_model(kBase, DType::F32, Device::CPU, kNf4Single);
  expect_close(logits_of(*single, golden), expected(golden["logits_nf4_single"]), 1e-4, "single");
  UseReferenceBackend reference;
  const auto plain = load_model(kBase, DType::F32, Device::CPU, kNf4);
  expect_close(logits_of(*plain, golden), expected(golden["logits_nf4"]), 1e-4, "reference");
}

// Linear layers alone, and never the embedding or lm_head; a model of two linear dtypes is none.
TEST(QuantisedModel, KeepsEmbeddingsNormsAndBiases) {
  const auto model = load_model("tests/golden/models/llama_bias", DType::BF16, Device::CPU, kNf4);
  struct Dtypes : Visitor {
    int nf4 = 0, dense = 0;
    void parameter(const std::string& name, Variable& value) override {
      const bool projection = name.ends_with("_proj.weight");
      EXPECT_EQ(value.value().dtype(), projection ? DType::NF4 : DType::BF16) << name;
      ++(projection ? nf4 : dense);
    }
  } dtypes;
  model->visit("", dtypes);
  EXPECT_EQ(dtypes.nf4, 14);
  EXPECT_GT(dtypes.dense, 14);
}

// What bitsandbytes saved and what is quantised here from the same dense model has the same bytes.
TEST(QuantisedModel, SavedByBitsandbytesLoadsAsItIs) {
  for (const auto& [folder, quantisation] :
       {std::pair{kDouble, kNf4}, std::pair{kSingle, kNf4Single}}) {
    SCOPED_TRACE(folder);
    const auto saved = load_model(folder, DType::F32);
    const auto made = load_model(kBase, DType::F32, Device::CPU, quantisation);
    const auto a = linear_layers(*saved), b = linear_layers(*made);
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i].name == "lm_head") continue;
      const Tensor &x = a[i].linear->weight.value(), &y = b[i].linear->weight.value();
      ASSERT_EQ(x.dtype(), quantisation.double_quant ? DType::NF4 : DType::NF4Single);
      ASSERT_EQ(x.num_bytes(), y.num_bytes());
      EXPECT_EQ(std::memcmp(x.raw(), y.raw(), size_t(x.num_bytes())), 0) << a[i].name;
    }
    const Json golden = read_golden(folder);
    expect_close(logits_of(*saved, golden), expected(golden["logits"]), 1e-4, "logits");
  }
}

// While a model is quantised its dense weights are in memory one at a time, if at all.
TEST(QuantisedModel, IsNeverInMemoryAsADenseOne) {
  Allocator& memory = allocator_of(Device::CPU);
  memory.reset_peak();
  const int64_t before = memory.stats().live_total;
  const auto model = load_model(kBase, DType::F32, Device::CPU, kNf4);
  const MemoryStats stats = memory.stats();
  int64_t nf4 = 0, largest = 0, all = 0;
  for (const auto& [name, linear] : linear_layers(*model)) {
    if (name == "lm_head") continue;
    nf4 += linear->weight.value().num_bytes();
    largest = std::max(largest, linear->weight.value().num_elements() * 4);
    all += linear->weight.value().num_elements() * 4;
  }
  const int64_t slack = 4096 * 20;  // blocks are rounded up
  EXPECT_LE(stats.live_total - before, nf4 + slack);
  EXPECT_LE(stats.peak_total - before, nf4 + largest + slack);
  EXPECT_LT(nf4 + largest + slack, all);  // or this would say nothing
}

class Qlora : public TinyRun {
 protected:
  static TrainOptions options(const Json& golden) {
    TrainOptions o;
    const auto& recipe = golden["recipe"];
    o.model = golden["model"];
    o.method = TrainOptions::Method::Qlora;
    o.adapter = kTrajectory + "/start";
    o.learning_rate = recipe["learning_rate"];
    o.adam_beta1 = recipe["adam_beta1"];
    o.adam_beta2 = recipe["adam_beta2"];
    o.adam_epsilon = recipe["adam_epsilon"];
    o.weight_decay = recipe["weight_decay"];
    o.max_grad_norm = recipe["max_grad_norm"];
    o.warmup_steps = recipe["warmup_steps"];
    o.max_steps = recipe["max_steps"];
    o.per_device_train_batch_size = int64_t(golden["batches"][0][0].size());
    o.gradient_accumulation_steps = int64_t(golden["batches"][0].size());
    o.shuffle = false;
    o.save_steps = 0;
    o.dtype = DType::F32;
    return o;
  }
  static TrainData rows(const Json& golden) {
    TrainData data;
    for (const auto& step : golden["batches"])
      for (const auto& micro_batch : step)
        for (const auto& row : micro_batch)
          data.train.rows.push_back({row["input_ids"], row["labels"]});
    return data;
  }
  // Of the adapters in two folders.
  static double largest_difference(const std::string& a, const std::string& b) {
    const SafetensorsFile x(a + "/adapter_model.safetensors"), y(b + "/adapter_model.safetensors");
    double largest = 0;
    EXPECT_EQ(x.entries().size(), y.entries().size());
    for (const SafetensorsEntry& entry : y.entries()) {
      const auto p = x.tensor(entry.name).to_doubles(), q = y.tensor(entry.name).to_doubles();
      for (size_t i = 0; i < q.size(); ++i) largest = std::max(largest, std::fabs(p[i] - q[i]));
    }
    return largest;
  }
};

TEST_F(Qlora, TrainsAsPeftOnBitsandbytes) {
  const Json golden = read_golden(kTrajectory);
  TrainOptions o = options(golden);
  o.output_dir = path("out");
  const TrainResult result = finetune(o, rows(golden));
  const std::vector<double> losses = golden["losses"], norms = golden["grad_norms"];
  ASSERT_EQ(result.losses.size(), losses.size());
  double worst = 0;
  for (size_t i = 0; i < losses.size(); ++i) {
    worst = std::max(worst, std::fabs(result.losses[i] / losses[i] - 1));
    EXPECT_NEAR(result.losses[i], losses[i], 1e-5 * losses[i]) << "loss of step " << i + 1;
    EXPECT_NEAR(result.grad_norms[i], norms[i], 1e-4 * norms[i]) << "norm of step " << i + 1;
  }
  const double final = largest_difference(path("out"), kTrajectory + "/final");
  EXPECT_LE(final, 1e-4);
  RecordProperty("loss", std::to_string(worst));
  RecordProperty("final", std::to_string(final));

  // The base that bitsandbytes saved gives the same numbers; the file knows that it is another one.
  o.model = kDouble;
  o.method = TrainOptions::Method::Lora;
  o.output_dir = path("saved");
  finetune(o, rows(golden));
  EXPECT_EQ(largest_difference(path("saved"), path("out")), 0);
}

// PEFT's DoRA on bitsandbytes' weights: the norm is that of the widened rows.
TEST_F(Qlora, TrainsDoraAsPeftOnBitsandbytes) {
  const std::string folder = "tests/golden/trajectories/qdora";
  const Json golden = read_golden(folder);
  for (const auto method : {TrainOptions::Method::Qdora, TrainOptions::Method::Qlora}) {
    TrainOptions o = options(golden);
    o.method = method;  // the adapter says that it is DoRA
    o.adapter = folder + "/start";
    o.output_dir = path(method == TrainOptions::Method::Qdora ? "out" : "again");
    const TrainResult result = finetune(o, rows(golden));
    const std::vector<double> losses = golden["losses"], norms = golden["grad_norms"];
    ASSERT_EQ(result.losses.size(), losses.size());
    for (size_t i = 0; i < losses.size(); ++i) {
      EXPECT_NEAR(result.losses[i], losses[i], 1e-5 * losses[i]) << "loss of step " << i + 1;
      EXPECT_NEAR(result.grad_norms[i], norms[i], 1e-4 * norms[i]) << "norm of step " << i + 1;
    }
    EXPECT_LE(largest_difference(o.output_dir, folder + "/final"), 1e-4);
  }
  EXPECT_EQ(largest_difference(path("again"), path("out")), 0);
}

TEST_F(Qlora, InBf16IsAsNearToF32AsPeft) {
  const Json golden = read_golden(kTrajectory);
  TrainOptions o = options(golden);
  o.dtype = DType::BF16;
  o.output_dir = path("out");
  const TrainResult result = finetune(o, rows(golden));
  const std::vector<double> losses = golden["losses"];
  double squares = 0, differences = 0;
  for (size_t i = 0; i < losses.size(); ++i) {
    squares += losses[i] * losses[i];
    differences += std::pow(result.losses[i] - losses[i], 2);
  }
  EXPECT_LE(std::sqrt(differences / squares),
            1.2 * golden["bf16_distance"]["losses"]["relative_l2"].get<double>());
  EXPECT_GT(differences, 0);
}

TEST_F(Qlora, CheckpointingAndResumingGiveTheSameBytes) {
  const Json golden = read_golden(kTrajectory);
  TrainOptions o = options(golden);
  o.max_steps = 6;
  o.output_dir = path("whole");
  finetune(o, rows(golden));
  o.gradient_checkpointing = true;
  o.save_steps = 2;
  o.save_total_limit = 2;
  o.output_dir = path("parts");
  finetune(o, rows(golden));
  EXPECT_EQ(read("parts/adapter_model.safetensors"), read("whole/adapter_model.safetensors"));
  fs::remove_all(path("parts/checkpoint-6"));
  fs::remove(path("parts/adapter_model.safetensors"));
  o.resume = true;
  finetune(o, rows(golden));
  EXPECT_EQ(read("parts/adapter_model.safetensors"), read("whole/adapter_model.safetensors"));
  o.bnb_4bit_use_double_quant = false;
  EXPECT_THROW(finetune(o, rows(golden)), Error);
}

TEST_F(Qlora, OptionsThatDoNotFitAreRefusedInOneLine) {
  const auto refused = [&](const auto& change, const std::string& part) {
    TrainOptions o = options(read_golden(kTrajectory));
    o.output_dir = path("out");
    change(o);
    try {
      finetune(o, rows(read_golden(kTrajectory)));
      ADD_FAILURE() << "accepted; wanted: " << part;
    } catch (const Error& error) {
      const std::string what = error.what();
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      EXPECT_NE(what.find(part), std::string::npos) << what;
    }
    EXPECT_FALSE(fs::exists(path("out")));
  };
  using O = TrainOptions;
  refused([](O& o) { o.method = O::Method::Qdora; }, "is plain LoRA, but the method is qdora");
  refused(
      [](O& o) {
        o.method = O::Method::Qdora;
        o.given.insert("use_dora");
      },
      "use_dora is false with method qdora");
  refused([](O& o) { o.lora_layout = LoraLayout::Merged; }, "lora_layout");
  refused(
      [](O& o) {
        o.method = O::Method::Lora;
        o.given.insert("bnb_4bit_use_double_quant");
      },
      "bnb_4bit_use_double_quant is given");
  refused(
      [](O& o) {
        o.method = O::Method::Full;
        o.adapter = "";
        o.model = kDouble;
      },
      "which method full cannot train");
}

TEST_F(Qlora, PlansForItsWeights) {
  const ModelConfig config = ModelConfig::load(kBase);
  TrainOptions o;
  o.max_seq_length = 64;
  const MemoryPlan dense = plan_memory(config, o, DType::BF16);
  o.method = TrainOptions::Method::Qlora;
  const MemoryPlan quantised = plan_memory(config, o, DType::BF16);
  const int64_t linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128);
  EXPECT_EQ(dense.mapped_weights - quantised.mapped_weights, linear * 2);
  int64_t bytes = 0;
  const auto model = load_model(kBase, DType::BF16, Device::CPU, kNf4);
  for (const auto& [name, layer] : linear_layers(*model))
    if (name != "lm_head") bytes += layer->weight.value().num_bytes();
  EXPECT_EQ(quantised.weights, bytes);
  EXPECT_EQ(quantised.adapters, dense.adapters);
  EXPECT_EQ(quantised.optimizer, dense.optimizer);

  o.method = TrainOptions::Method::Lora;
  const MemoryPlan saved = plan_memory(ModelConfig::load(kDouble), o, DType::BF16);
  EXPECT_EQ(saved.weights, quantised.weights);
}

TEST_F(Qlora, GeneratesOnTheBaseItWasTrainedOn) {
  const auto ids = [&](const std::string& more) {
    const auto run = shell("$GRAFT generate --model model --prompt abc --max-new-tokens 12 --ids " +
                           std::string("--ignore-eos --dtype float32 ") + more);
    EXPECT_EQ(run.status, 0) << run.err;
    return run.out;
  };
  // The same as the saved NF4 weights, which need no flag, and not the same as the dense ones.
  const auto nf4 = load_model(model(), DType::F32, Device::CPU, kNf4);
  NoRecord off;
  const auto dense = load_model(model(), DType::F32);
  const PackedBatch batch = pack({{1, 2, 3}});
  EXPECT_NE(nf4->logits(nf4->forward(batch, {}).value()).to_doubles(),
            dense->logits(dense->forward(batch, {}).value()).to_doubles());
  const std::string quantised = ids("--load-in-4bit");
  EXPECT_EQ(quantised, ids("--load-in-4bit --bnb-4bit-use-double-quant true"));
  const auto wrong =
      shell("$GRAFT generate --model model --prompt a --bnb-4bit-use-double-quant true");
  EXPECT_EQ(wrong.status, 2);
  EXPECT_NE(wrong.err.find("without --load-in-4bit"), std::string::npos) << wrong.err;
}

// --- what is wrong with a quantised file ---------------------------------------------------------

class QuantisedFile : public TinyRun {
 protected:
  using Tensors = std::map<std::string, Tensor>;
  // The golden checkpoint with its tensors or its config changed: how it is refused.
  void expect_refused(const std::string& part, const std::function<void(Tensors&, Json&)>& change) {
    const SafetensorsFile file(from_ + "/model.safetensors");
    Tensors tensors;
    for (const auto& entry : file.entries()) tensors[entry.name] = file.tensor(entry.name).clone();
    Json config = Json::parse(std::ifstream(from_ + "/config.json"));
    change(tensors, config);
    write("bad/config.json", config.dump());
    std::vector<NamedTensor> list;
    for (const auto& [name, tensor] : tensors) list.push_back({name, tensor});
    write_safetensors(path("bad/model.safetensors"), list);
    try {
      load_model(path("bad"), DType::F32);
      ADD_FAILURE() << "accepted; wanted: " << part;
    } catch (const Error& error) {
      const std::string what = error.what();
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      EXPECT_EQ(what.rfind(path("bad"), 0), 0u) << what;
      EXPECT_NE(what.find(part), std::string::npos) << what;
    }
  }
  std::string from_ = kDouble;

  static Tensor text(const std::string& json) {
    Tensor tensor = Tensor::empty({int64_t(json.size())}, DType::U8);
    std::memcpy(tensor.raw(), json.data(), json.size());
    return tensor;
  }
};

TEST_F(QuantisedFile, OfWhichAPartIsWrongIsRefusedInOneLine) {
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  const std::string state = name + ".quant_state.bitsandbytes__nf4";
  const auto change_state = [&](const char* key, const Json& value) {
    return [=](Tensors& t, Json&) {
      const Tensor& old = t[state];
      Json json = Json::parse(old.data<char>(), old.data<char>() + old.num_elements());
      json[key] = value;
      t[state] = text(json.dump());
    };
  };
  expect_refused("' has 100 elements, an NF4 weight of (128, 64) in blocks of 64 wants 128",
                 [&](Tensors& t, Json&) { t[name + ".absmax"] = Tensor::zeros({100}, DType::U8); });
  expect_refused("has 4000 elements", [&](Tensors& t, Json&) {
    t[name] = Tensor::zeros({4000, 1}, DType::U8);
  });
  expect_refused("nested_absmax' has 2 elements", [&](Tensors& t, Json&) {
    t[name + ".nested_absmax"] = Tensor::zeros({2}, DType::F32);
  });
  // Each part by its name, and not by what its absence makes of the others.
  for (const char* suffix : {".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"}) {
    const std::string part = name + suffix;
    expect_refused("'" + part + "' is missing, a part of the NF4 weight '" + name + "'",
                   [&](Tensors& t, Json&) { t.erase(part); });
    expect_refused("'" + part + "' has the dtype I32", [&](Tensors& t, Json&) {
      t[part] = Tensor::zeros(t[part].shape(), DType::I32);
    });
  }
  expect_refused("'" + state + "' is missing, but '" + name + ".absmax' is there",
                 [&](Tensors& t, Json&) { t.erase(state); });
  expect_refused("'" + name + ".nested_absmax' is missing", [&](Tensors& t, Json&) {
    t.erase(name + ".nested_absmax");
    t.erase(name + ".nested_quant_map");
  });
  expect_refused("has 15 elements", [&](Tensors& t, Json&) {
    t[name + ".quant_map"] = Tensor::zeros({15}, DType::F32);
  });
  expect_refused("nested_quant_map' has 255 elements", [&](Tensors& t, Json&) {
    t[name + ".nested_quant_map"] = Tensor::zeros({255}, DType::F32);
  });
  expect_refused("is not the map of nf4",
                 [&](Tensors& t, Json&) { t[name + ".quant_map"].data<float>()[3] = 0.5f; });
  expect_refused("hold NaN or infinity",
                 [&](Tensors& t, Json&) { t[name + ".nested_absmax"].data<float>()[0] = NAN; });
  expect_refused("hold NaN or infinity", [&](Tensors& t, Json&) {
    t[name + ".nested_quant_map"].data<float>()[9] = INFINITY;
  });
  expect_refused("has quant_type \"fp4\", wanted \"nf4\"", change_state("quant_type", "fp4"));
  expect_refused("has blocksize \"64\", wanted 64", change_state("blocksize", "64"));
  expect_refused("has no nested_offset", change_state("nested_offset", "0.1"));
  expect_refused("has nested_offset 1e+39", change_state("nested_offset", 1e39));
  expect_refused("has blocksize 128, wanted 64", change_state("blocksize", 128));
  expect_refused("has shape [64,128], wanted [128,64]", change_state("shape", {64, 128}));
  expect_refused("has nested_blocksize 64, wanted 256", change_state("nested_blocksize", 64));
  expect_refused("is not a JSON object", [&](Tensors& t, Json&) { t[state] = text("{"); });
  expect_refused("is quantised to fp4", [&](Tensors& t, Json&) {
    t[name + ".quant_state.bitsandbytes__fp4"] = t[state];
    t.erase(state);
  });
  expect_refused("is quantised to int8", [&](Tensors& t, Json&) {
    t.erase(state);
    t["model.layers.1.mlp.up_proj.SCB"] = Tensor::zeros({128}, DType::F32);
  });
  expect_refused("has no place in the model",
                 [&](Tensors& t, Json&) { t[name + ".more"] = Tensor::zeros({1}, DType::F32); });
}

TEST_F(QuantisedFile, WithScalesInF32OfWhichAPartIsWrongIsRefusedInOneLine) {
  from_ = kSingle;
  const std::string name = "model.layers.0.self_attn.k_proj.weight";
  expect_refused("absmax' has 33 elements, an NF4 weight of (32, 64) in blocks of 64 wants 32",
                 [&](Tensors& t, Json&) { t[name + ".absmax"] = Tensor::zeros({33}, DType::F32); });
  expect_refused("'" + name + ".absmax' is missing",
                 [&](Tensors& t, Json&) { t.erase(name + ".absmax"); });
  expect_refused("hold NaN or infinity",
                 [&](Tensors& t, Json&) { t[name + ".absmax"].data<float>()[31] = INFINITY; });
  expect_refused("'" + name + ".nested_absmax' is missing",
                 [&](Tensors& t, Json&) { t[name + ".absmax"] = Tensor::zeros({32}, DType::U8); });
}

// Commands that were to read such a file: one line, nothing new, and what was there is as it was.
TEST_F(QuantisedFile, LeavesEverythingAsItWas) {
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  expect_refused("has 100 elements",
                 [&](Tensors& t, Json&) { t[name + ".absmax"] = Tensor::zeros({100}, DType::U8); });
  for (const char* file : {"tokenizer.json", "tokenizer_config.json"})
    fs::copy(path(std::string("model/") + file), path("bad"));
  fs::copy(kTrajectory + "/final", path("a"));
  write_data("data.jsonl", 8);
  const auto tree = [&] {
    std::map<std::string, std::string> bytes;
    for (const auto& entry : fs::recursive_directory_iterator(folder_))
      if (const std::string one = fs::relative(entry.path(), folder_); !one.starts_with("std"))
        bytes[one] = entry.is_directory() ? "" : read(one);
    return bytes;
  };
  const auto before = tree();
  for (const char* command :
       {"train --model bad --data data.jsonl --output-dir out --max-steps 1",
        "merge --model bad --adapter a -o out", "generate --model bad --adapter a --prompt abc"}) {
    const Outcome outcome = shell(std::string("$GRAFT ") + command);
    EXPECT_EQ(outcome.status, 1) << command << ": " << outcome.err;
    EXPECT_EQ(outcome.err.rfind("graft: error: bad/model.safetensors: ", 0), 0u) << outcome.err;
    EXPECT_NE(outcome.err.find("in blocks of 64 wants 128"), std::string::npos) << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_EQ(tree(), before) << command;
  }
}

TEST_F(QuantisedFile, OfAnotherKindIsRefusedByItsConfig) {
  const auto set = [](const char* key, const Json& value) {
    return [=](Tensors&, Json& config) { config["quantization_config"][key] = value; };
  };
  expect_refused("quantization_config is gptq", set("quant_method", "gptq"));
  expect_refused("quantization_config is bitsandbytes fp4", set("bnb_4bit_quant_type", "fp4"));
  expect_refused("bnb_4bit_quant_storage is bfloat16", set("bnb_4bit_quant_storage", "bfloat16"));
  expect_refused("quantization_config is bitsandbytes int8", [](Tensors&, Json& config) {
    config["quantization_config"] = {{"quant_method", "bitsandbytes"}, {"load_in_8bit", true}};
  });
}

}  // namespace
}  // namespace graft
