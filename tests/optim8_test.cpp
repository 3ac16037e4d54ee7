// AdamW with its state in 8 bits against bitsandbytes' AdamW8bit (tests/golden/make_nf4.py), and
// the CPU's kernel against the reference.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "nn/parameter_buffer.h"
#include "tensor/blockwise8.h"
#include "tensor/system_memory.h"
#include "tensor/thread_pool.h"
#include "tests/nf4_values.h"
#include "tests/op_cases.h"
#include "tests/tolerance.h"

namespace graft {
namespace {

std::vector<uint8_t> bytes_of(const std::string& hex) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes.push_back(uint8_t(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return bytes;
}
Tensor floats_of(const std::string& hex) {
  const std::vector<uint8_t> bytes = bytes_of(hex);
  Tensor tensor = Tensor::empty({int64_t(bytes.size() / 4)}, DType::F32);
  std::memcpy(tensor.raw(), bytes.data(), bytes.size());
  return tensor;
}

// Codes that are not the same must be neighbours: a product rounded otherwise at the edge of two.
void expect_codes(const uint8_t* actual, const uint8_t* expected, int64_t n, int64_t most,
                  const std::string& what) {
  int64_t different = 0;
  for (int64_t i = 0; i < n; ++i) {
    EXPECT_LE(std::abs(int(actual[i]) - int(expected[i])), 1) << what << ", element " << i;
    different += actual[i] != expected[i];
  }
  EXPECT_LE(different, most) << what;
}

struct Trained {
  Variable large, small;
  std::unique_ptr<ParameterBuffer> buffer;
  std::map<std::string, Tensor> state;
};

Trained train(const nlohmann::json& golden, int64_t steps) {
  Trained t{
      Variable(nf4_test_values(5000, 3), true), Variable(nf4_test_values(300, 4), true), {}, {}};
  t.buffer = std::make_unique<ParameterBuffer>(
      std::vector<std::pair<std::string, Variable>>{{"large", t.large}, {"small", t.small}},
      Device::CPU, Scope::Adapters, ParameterBuffer::Moments::Bits8);
  for (int64_t step = 1; step <= steps; ++step) {
    t.buffer->begin_step();
    for (const auto& entry : t.buffer->entries()) {
      const int64_t n = entry.variable.shape().num_elements();
      const Tensor from = nf4_test_values(n, 100 * step + (entry.name == "small"));
      Tensor grad = t.buffer->gradients().slice_rows(entry.offset, entry.offset + n);
      cpu_backend().scale(grad, from, 0.5 + double(step));
    }
    t.buffer->step({golden["lr"], golden["betas"][0], golden["betas"][1], golden["eps"],
                    golden["weight_decay"], step},
                   0);
  }
  for (const auto& [name, tensor] : t.buffer->state()) t.state[name] = tensor;
  return t;
}

TEST(AdamW8bit, TrainsAsBitsandbytes) {
  const auto golden = nlohmann::json::parse(std::ifstream("tests/golden/optim8.json"));
  Trained t = train(golden, golden["steps"]);
  expect_close(t.large.value(), floats_of(golden["large"]["values"]), 1e-6, "large");
  expect_close(t.small.value(), floats_of(golden["small"]["values"]), 1e-6, "small");
  for (const auto& [ours, theirs] : {std::pair{"m_8bit", "1"}, {"v_8bit", "2"}}) {
    const auto codes = bytes_of(golden["large"][std::string("state") + theirs]);
    ASSERT_EQ(codes.size(), 5000u);
    expect_codes(t.state[ours].data<uint8_t>(), codes.data(), 5000, 5, ours);
    expect_close(t.state[std::string(ours) + "_absmax"],
                 floats_of(golden["large"][std::string("absmax") + theirs]), 1e-6, ours);
  }
  // A leaf of fewer than 4096 elements keeps its state in F32.
  expect_close(t.state["m"].slice_rows(0, 300), floats_of(golden["small"]["state1"]), 1e-6, "m");
  expect_close(t.state["v"].slice_rows(0, 300), floats_of(golden["small"]["state2"]), 1e-6, "v");
}

TEST(AdamW8bit, CarriesOnFromItsState) {
  const auto golden = nlohmann::json::parse(std::ifstream("tests/golden/optim8.json"));
  Trained whole = train(golden, 4), part = train(golden, 3);
  bool differs = false;
  for (const auto& [name, tensor] : part.state)
    differs = differs || !same_bytes(tensor, whole.state[name]);
  EXPECT_TRUE(differs);
  Trained again = train(golden, 3);
  for (const auto& [name, tensor] : again.state) {
    Tensor to = part.state[name];
    cpu_backend().copy(to, tensor);
  }
  for (auto* one : {&part, &again}) {
    one->buffer->begin_step();
    one->buffer->step({1e-2, 0.9, 0.99, 1e-8, 0.1, 4}, 0);
  }
  for (const auto& [name, tensor] : part.state) expect_same_bytes(tensor, again.state[name], name);
}

// F32 is 16 bytes a parameter; 8 bits 10, and two scales for 256. The leaf is never touched.
TEST(AdamW8bit, AsksForTheMemoryThatItTakes) {
  const int64_t n = bytes_available() / 6 / kBlock8 * kBlock8;
  const std::vector<std::pair<std::string, Variable>> leaf{
      {"w", Variable(Tensor::empty({n}, DType::F32), true)}};
  const auto refusal = [&](ParameterBuffer::Moments moments) -> std::string {
    try {
      ParameterBuffer(leaf, Device::CPU, Scope::Adapters, moments);
    } catch (const Error& error) {
      return error.what();
    }
    return "taken";
  };
  for (const auto& [moments, bytes] :
       {std::pair{ParameterBuffer::Moments::F32, 16 * n},
        {ParameterBuffer::Moments::Bits8, 10 * n + n / kBlock8 * 8}}) {
    const std::string expected = concat("it takes ", bytes >> 20, " MiB");
    EXPECT_NE(refusal(moments).find(expected), std::string::npos)
        << refusal(moments) << ", expected " << expected;
  }
}

// Step by step from one state: a code that is the other of two neighbours moves the next step.
TEST(AdamW8bit, KernelAgreesWithTheReferenceForAnyNumberOfThreads) {
  for (const int64_t n : {1, 255, 256, 257, 5000, 70000}) {
    const auto state = [&] {
      return State8{Tensor::zeros({n}, DType::U8), Tensor::zeros({num_blocks8(n)}, DType::F32)};
    };
    Tensor w = random_tensor({n}, DType::F32, 2);
    State8 m = state(), v = state();
    for (int64_t step = 1; step <= 4; ++step) {
      const Tensor gradient = random_tensor({n}, DType::F32, uint64_t(step), 0.3);
      const Tensor scale = Tensor::from_floats({}, {step == 4 ? NAN : 0.7}, DType::F64);
      const auto run = [&](Backend& backend, int threads) {
        set_num_threads(threads);
        Tensor to = w.clone();
        State8 first{m.codes.clone(), m.absmax.clone()}, second{v.codes.clone(), v.absmax.clone()};
        backend.adamw_8bit(to, first, second, gradient, scale,
                           {1e-3, 0.9, 0.999, 1e-8, 0.01, step});
        set_num_threads(0);
        return std::vector<Tensor>{to, first.codes, first.absmax, second.codes, second.absmax};
      };
      const auto plain = run(reference_backend(), 1), one = run(cpu_backend(), 1),
                 three = run(cpu_backend(), 3);
      for (size_t i = 0; i < one.size(); ++i) {
        const std::string what = concat("n ", n, ", step ", step, ", tensor ", i);
        expect_same_bytes(three[i], one[i], what);
        if (one[i].dtype() == DType::U8)
          expect_codes(one[i].data<uint8_t>(), plain[i].data<uint8_t>(), n, n / 1000, what);
        else
          expect_close(one[i], plain[i], 1e-6, what);
      }
      if (step == 4) expect_same_bytes(one[0], w, "a gradient that is not finite");
      w = plain[0];
      m = {plain[1], plain[2]};
      v = {plain[3], plain[4]};
    }
  }
}

}  // namespace
}  // namespace graft
