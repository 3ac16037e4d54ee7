// How fast is each CPU kernel but the matrix product (gemm_bench.cpp), at the shapes of
// Qwen2.5-0.5B? The argument is the number of tokens. bytes_per_second counts what must be read and
// written once; FLOP/s of attention count the half of the square that the causal mask leaves:
// forward 2 T^2 q, backward 2.5 times that (q = heads * head_dim). GRAFT_CPU picks the instruction
// set, GRAFT_BENCH_DTYPE=bf16 the type of the activations.
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <string_view>

#include "tensor/backend.h"
#include "tensor/random.h"

namespace graft {
namespace {

constexpr int64_t kHidden = 896, kInner = 4864, kVocabulary = 151936;
constexpr int64_t kHeads = 14, kKvHeads = 2, kHeadDim = 64;

DType activation_dtype() {
  const char* name = std::getenv("GRAFT_BENCH_DTYPE");
  return name && std::string_view(name) == "bf16" ? DType::BF16 : DType::F32;
}

Tensor random_tensor(Shape shape, DType dtype) {
  Random random(uint64_t(shape.num_elements()));
  Tensor narrow = Tensor::empty(shape, DType::F32);
  for (int64_t i = 0; i < narrow.num_elements(); ++i)
    narrow.data<float>()[i] = float(2 * random.uniform() - 1);
  return narrow.to(dtype);
}
Tensor like(const Tensor& t) { return Tensor::zeros(t.shape(), t.dtype()); }

void count_bytes(benchmark::State& state, int64_t tensors, const Tensor& t) {
  state.SetBytesProcessed(state.iterations() * tensors * t.num_bytes());
}

void BM_add(benchmark::State& state) {
  const Tensor a = random_tensor({state.range(0), kHidden}, activation_dtype()), b = a.clone();
  Tensor y = like(a);
  for (auto _ : state) cpu_backend().add(y, a, b);
  count_bytes(state, 3, y);
}

void BM_rms_norm_forward(benchmark::State& state) {
  const Tensor x = random_tensor({state.range(0), kHidden}, activation_dtype());
  const Tensor weight = random_tensor({kHidden}, activation_dtype());
  Tensor y = like(x), rstd = Tensor::empty({state.range(0)}, DType::F32);
  for (auto _ : state) cpu_backend().rms_norm_forward(y, rstd, x, weight, 1e-6);
  count_bytes(state, 2, x);
}

void BM_rms_norm_backward(benchmark::State& state) {
  const Tensor x = random_tensor({state.range(0), kHidden}, activation_dtype()), dy = x.clone();
  const Tensor weight = random_tensor({kHidden}, activation_dtype());
  Tensor dx = like(x), none, rstd = random_tensor({state.range(0)}, DType::F32);
  for (auto _ : state) cpu_backend().rms_norm_backward(dx, none, dy, x, weight, rstd);
  count_bytes(state, 3, x);
}

void BM_rope(benchmark::State& state) {
  const int64_t tokens = state.range(0);
  const Tensor x = random_tensor({tokens, kHeads, kHeadDim}, activation_dtype());
  const Tensor table = random_tensor({tokens, kHeadDim}, DType::F32);
  std::vector<int32_t> positions;
  for (int64_t t = 0; t < tokens; ++t) positions.push_back(int32_t(t));
  const Tensor at = Tensor::from_ints({tokens}, positions);
  Tensor y = like(x);
  for (auto _ : state) cpu_backend().rope(y, x, at, table, 1);
  count_bytes(state, 2, x);
}

// Heads with what the norm and the rotation of Qwen3 need, at the shape of Qwen2.5-0.5B.
struct HeadTensors {
  Tensor x, dy, y, weight, rstd, table, positions;
  explicit HeadTensors(int64_t tokens)
      : x(random_tensor({tokens, kHeads, kHeadDim}, activation_dtype())),
        dy(x.clone()),
        y(like(x)),
        weight(random_tensor({kHeadDim}, activation_dtype())),
        rstd(random_tensor({tokens * kHeads}, DType::F32)),
        table(random_tensor({tokens, kHeadDim}, DType::F32)) {
    std::vector<int32_t> at;
    for (int64_t t = 0; t < tokens; ++t) at.push_back(int32_t(t));
    positions = Tensor::from_ints({tokens}, at);
  }
};

// What one pass saves: the same by two kernels, and by one.
void BM_norm_then_rope_forward(benchmark::State& state) {
  HeadTensors t(state.range(0));
  Tensor normed = like(t.x);
  for (auto _ : state) {
    cpu_backend().rms_norm_forward(normed, t.rstd, t.x, t.weight, 1e-6);
    cpu_backend().rope(t.y, normed, t.positions, t.table, 1);
  }
  count_bytes(state, 2, t.x);
}

void BM_qk_norm_rope_forward(benchmark::State& state) {
  HeadTensors t(state.range(0));
  for (auto _ : state)
    cpu_backend().qk_norm_rope_forward(t.y, t.rstd, t.x, t.weight, 1e-6, t.positions, t.table);
  count_bytes(state, 2, t.x);
}

void BM_rope_then_norm_backward(benchmark::State& state) {
  HeadTensors t(state.range(0));
  Tensor turned = like(t.x), none;
  for (auto _ : state) {
    cpu_backend().rope(turned, t.dy, t.positions, t.table, -1);
    cpu_backend().rms_norm_backward(t.y, none, turned, t.x, t.weight, t.rstd);
  }
  count_bytes(state, 3, t.x);
}

void BM_qk_norm_rope_backward(benchmark::State& state) {
  HeadTensors t(state.range(0));
  Tensor none;
  for (auto _ : state)
    cpu_backend().qk_norm_rope_backward(t.y, none, t.dy, t.x, t.weight, t.rstd, t.positions,
                                        t.table);
  count_bytes(state, 3, t.x);
}

void BM_swiglu_forward(benchmark::State& state) {
  const Tensor gate = random_tensor({state.range(0), kInner}, activation_dtype()),
               up = gate.clone();
  Tensor y = like(gate);
  for (auto _ : state) cpu_backend().swiglu_forward(y, gate, up);
  count_bytes(state, 3, gate);
}

void BM_swiglu_backward(benchmark::State& state) {
  const Tensor gate = random_tensor({state.range(0), kInner}, activation_dtype()),
               up = gate.clone();
  const Tensor dy = gate.clone();
  Tensor dgate = like(gate), dup = like(gate);
  for (auto _ : state) cpu_backend().swiglu_backward(dgate, dup, dy, gate, up);
  count_bytes(state, 5, gate);
}

void BM_dropout(benchmark::State& state) {
  const Tensor x = random_tensor({state.range(0), kHidden}, activation_dtype());
  Tensor y = like(x);
  for (auto _ : state) cpu_backend().dropout(y, x, 0.05, {1, 2, 3, 0}, false);
  count_bytes(state, 2, x);
}

// A chunk of 64 rows of logits, with the gradient.
void BM_cross_entropy(benchmark::State& state) {
  const Tensor fresh = random_tensor({64, kVocabulary}, DType::F32);
  Tensor logits = fresh.clone(), losses = Tensor::empty({64}, DType::F32);
  const Tensor labels = Tensor::from_ints({64}, std::vector<int32_t>(64, 17));
  for (auto _ : state) cpu_backend().cross_entropy(losses, logits, labels, 1e-3, true);
  count_bytes(state, 2, logits);
}

// The adapter of r = 16 on the seven projections: 8.8 million parameters.
void BM_adamw(benchmark::State& state) {
  Tensor p = random_tensor({8798208}, DType::F32), m = like(p), v = like(p);
  const Tensor g = p.clone();
  const Tensor factor = Tensor::from_floats({}, {1}, DType::F64);
  int64_t step = 0;
  for (auto _ : state) cpu_backend().adamw(p, m, v, g, factor, {1e-4, 0.9, 0.999, 1e-8, 0, ++step});
  count_bytes(state, 7, p);
}

void BM_sum_of_squares(benchmark::State& state) {
  const Tensor g = random_tensor({8798208}, DType::F32);
  Tensor total = Tensor::zeros({}, DType::F64);
  for (auto _ : state) cpu_backend().sum_of_squares(total, g);
  count_bytes(state, 1, g);
}

struct AttentionTensors {
  Tensor q, k, v, out, lse, cu, dq, dk, dv, dout;
  explicit AttentionTensors(int64_t tokens)
      : q(random_tensor({tokens, kHeads, kHeadDim}, activation_dtype())),
        k(random_tensor({tokens, kKvHeads, kHeadDim}, activation_dtype())),
        v(k.clone()),
        out(like(q)),
        lse(Tensor::empty({kHeads, tokens}, DType::F32)),
        cu(Tensor::from_ints({2}, {0, int32_t(tokens)})),
        dq(like(q)),
        dk(like(k)),
        dv(like(k)),
        dout(q.clone()) {}
  void forward() { cpu_backend().attention_forward(out, lse, q, k, v, cu, cu, 0.125); }
  void backward() {
    cpu_backend().attention_backward(dq, dk, dv, dout, q, k, v, out, lse, cu, 0.125);
  }
};

void count_flops(benchmark::State& state, double products) {
  const double square = double(state.range(0)) * double(state.range(0)) * kHeads * kHeadDim;
  state.counters["FLOP/s"] =
      benchmark::Counter(products * square, benchmark::Counter::kIsIterationInvariantRate);
}

void BM_attention_forward(benchmark::State& state) {
  AttentionTensors tensors(state.range(0));
  for (auto _ : state) tensors.forward();
  count_flops(state, 2);
}

void BM_attention_backward(benchmark::State& state) {
  AttentionTensors tensors(state.range(0));
  tensors.forward();
  for (auto _ : state) tensors.backward();
  count_flops(state, 5);
}

// One query over a cache of so many keys.
void BM_attention_decode(benchmark::State& state) {
  const AttentionTensors cache(state.range(0));
  AttentionTensors one(1);
  for (auto _ : state)
    cpu_backend().attention_forward(one.out, one.lse, one.q, cache.k, cache.v, one.cu, cache.cu,
                                    0.125);
  count_bytes(state, 2, cache.k);
}

#define GRAFT_BENCHMARK(name) BENCHMARK(name)->Unit(benchmark::kMicrosecond)->UseRealTime()
GRAFT_BENCHMARK(BM_add)->Arg(512);
GRAFT_BENCHMARK(BM_rms_norm_forward)->Arg(512);
GRAFT_BENCHMARK(BM_rms_norm_backward)->Arg(512);
GRAFT_BENCHMARK(BM_rope)->Arg(512);
GRAFT_BENCHMARK(BM_norm_then_rope_forward)->Arg(512);
GRAFT_BENCHMARK(BM_qk_norm_rope_forward)->Arg(512);
GRAFT_BENCHMARK(BM_rope_then_norm_backward)->Arg(512);
GRAFT_BENCHMARK(BM_qk_norm_rope_backward)->Arg(512);
GRAFT_BENCHMARK(BM_swiglu_forward)->Arg(512);
GRAFT_BENCHMARK(BM_swiglu_backward)->Arg(512);
GRAFT_BENCHMARK(BM_dropout)->Arg(512);
GRAFT_BENCHMARK(BM_cross_entropy);
GRAFT_BENCHMARK(BM_adamw);
GRAFT_BENCHMARK(BM_sum_of_squares);
GRAFT_BENCHMARK(BM_attention_forward)->Arg(512)->Arg(2048);
GRAFT_BENCHMARK(BM_attention_backward)->Arg(512)->Arg(2048);
GRAFT_BENCHMARK(BM_attention_decode)->Arg(2048);

}  // namespace
}  // namespace graft

BENCHMARK_MAIN();
