// The table of all rungs. Read before: variants.h. Order of the page: how problems are made, one
// group of functions per family, the table.
#include "cuda/variants.h"

#include <cmath>

#include "cuda/attention.h"
#include "cuda/cross_entropy_ladder.h"
#include "cuda/cuda_backend.h"
#include "cuda/gemm_by_hand.h"
#include "cuda/gpu.cuh"
#include "cuda/lora_linear.h"
#include "cuda/nf4.h"
#include "cuda/rms_norm.h"
#include "tensor/nf4.h"
#include "tensor/random.h"

namespace graft {
namespace {

using Sizes = std::vector<int64_t>;

constexpr double kEps = 1e-6, kScaling = 2;  // of RMSNorm, of LoRA

// In [-scale, scale).
Tensor random_tensor(Random& random, Shape shape, DType dtype, double scale = 1) {
  Tensor t = Tensor::empty(shape, DType::F32);
  for (int64_t i = 0; i < t.num_elements(); ++i)
    t.data<float>()[i] = float(scale * (2 * random.uniform() - 1));
  return t.to(dtype);
}
Tensor bf16_tensor(Random& random, Shape shape, double scale = 1) {
  return random_tensor(random, shape, DType::BF16, scale);
}

// --- gemm: inputs a, b; outputs c ----------------------------------------------------------------

LadderCosts gemm_costs(const Sizes& n) {
  const double M = double(n[0]), N = double(n[1]), K = double(n[2]);
  return {2 * (M * K + N * K + M * N), 2 * M * N * K};
}
LadderProblem make_gemm(const Sizes& n) {
  Random random(1);
  LadderProblem p;
  p.inputs = {bf16_tensor(random, {n[0], n[2]}), bf16_tensor(random, {n[1], n[2]})};
  p.outputs = {Tensor::zeros({n[0], n[1]}, DType::BF16)};
  return p;
}
void gemm_by(Backend& backend, LadderProblem& p) {
  const GemmTerm term = {p.inputs[0], p.inputs[1], false, true, 1};
  backend.gemm(p.outputs[0], {&term, 1});
}
void run_gemm(int rung, LadderProblem& p, cudaStream_t stream) {
  gemm_by_hand(rung, p.outputs[0], p.inputs[0], p.inputs[1], stream);
}

// --- lora_linear: inputs x, weight, lora_a, lora_b; outputs y ------------------------------------

LadderCosts lora_costs(const Sizes& n) {
  const double M = double(n[0]), N = double(n[1]), K = double(n[2]), r = double(n[3]);
  return {2 * (M * K + N * K + M * N + r * (K + N)), 2 * M * (N * K + r * (K + N))};
}
LadderProblem make_lora(const Sizes& n) {
  Random random(2);
  LadderProblem p;
  p.inputs = {bf16_tensor(random, {n[0], n[2]}), bf16_tensor(random, {n[1], n[2]}),
              bf16_tensor(random, {n[3], n[2]}), bf16_tensor(random, {n[1], n[3]})};
  p.outputs = {Tensor::zeros({n[0], n[1]}, DType::BF16)};
  return p;
}
void lora_by(Backend& backend, LadderProblem& p, DType dtype_of_u) {
  const Tensor &x = p.inputs[0], &lora_a = p.inputs[2];
  Tensor u = Tensor::empty({x.size(0), lora_a.size(0)}, dtype_of_u, x.device(), Scope::Scratch);
  const GemmTerm down = {x, lora_a, false, true, 1};
  backend.gemm(u, {&down, 1});
  const GemmTerm terms[] = {{x, p.inputs[1], false, true, 1},
                            {u, p.inputs[3], false, true, kScaling}};
  backend.gemm(p.outputs[0], terms);
}
void run_lora(int rung, LadderProblem& p, cudaStream_t stream) {
  lora_linear(rung, p.outputs[0], p.inputs[0], p.inputs[1], p.inputs[2], p.inputs[3], kScaling,
              stream);
}

// --- widen_nf4: inputs weight, NF4; outputs it in BF16 -------------------------------------------

LadderCosts nf4_costs(const Sizes& n) {
  const int64_t elements = n[0] * n[1];
  return {double(2 * elements + nf4_bytes(elements, DType::NF4)), double(elements)};
}
LadderProblem make_nf4(const Sizes& n) {
  Random random(8);
  LadderProblem p;
  p.inputs = {nf4_quantise(random_tensor(random, {n[0], n[1]}, DType::F32), true)};
  p.outputs = {Tensor::zeros({n[0], n[1]}, DType::BF16)};
  return p;
}
void reference_nf4(LadderProblem& p) { reference_backend().copy(p.outputs[0], p.inputs[0]); }
void run_nf4(int rung, LadderProblem& p, cudaStream_t stream) {
  launch_widen_nf4(rung, p.outputs[0], p.inputs[0], stream);
}

// --- rms_norm: inputs x, weight; outputs y, rstd. Backward: dy, x, weight, rstd; dx --------------

LadderCosts norm_costs(const Sizes& n) {
  const double R = double(n[0]), H = double(n[1]);
  return {2 * (2 * R * H + H) + 4 * R, 5 * R * H};
}
LadderProblem make_norm(const Sizes& n) {
  Random random(3);
  LadderProblem p;
  p.inputs = {bf16_tensor(random, {n[0], n[1]}), bf16_tensor(random, {n[1]})};
  p.outputs = {Tensor::zeros({n[0], n[1]}, DType::BF16), Tensor::zeros({n[0]}, DType::F32)};
  return p;
}
void reference_norm(LadderProblem& p) {
  reference_backend().rms_norm_forward(p.outputs[0], p.outputs[1], p.inputs[0], p.inputs[1], kEps);
}
void run_norm(int rung, LadderProblem& p, cudaStream_t stream) {
  launch_rms_norm_forward(rung, p.outputs[0], p.outputs[1], p.inputs[0], p.inputs[1], kEps, stream);
}

LadderCosts norm_backward_costs(const Sizes& n) {
  const double R = double(n[0]), H = double(n[1]);
  return {2 * (3 * R * H + H) + 4 * R, 9 * R * H};
}
LadderProblem make_norm_backward(const Sizes& n) {
  Random random(4);
  const Tensor dy = bf16_tensor(random, {n[0], n[1]}), x = bf16_tensor(random, {n[0], n[1]});
  Tensor rstd = Tensor::empty({n[0]}, DType::F32);
  for (int64_t row = 0; row < n[0]; ++row) {
    double squares = 0;
    for (double value : x.slice_rows(row, row + 1).to_doubles()) squares += value * value;
    rstd.data<float>()[row] = float(1 / std::sqrt(squares / double(n[1]) + kEps));
  }
  LadderProblem p;
  p.inputs = {dy, x, bf16_tensor(random, {n[1]}), rstd};
  p.outputs = {Tensor::zeros({n[0], n[1]}, DType::BF16)};
  return p;
}
void reference_norm_backward(LadderProblem& p) {
  Tensor no_dweight;
  reference_backend().rms_norm_backward(p.outputs[0], no_dweight, p.inputs[0], p.inputs[1],
                                        p.inputs[2], p.inputs[3]);
}
void run_norm_backward(int rung, LadderProblem& p, cudaStream_t stream) {
  launch_rms_norm_dx(rung, p.outputs[0], p.inputs[0], p.inputs[1], p.inputs[2], p.inputs[3],
                     stream);
}

// --- cross_entropy: inputs labels; outputs losses, logits (which hold the input) -----------------

constexpr double kLossScale = 0.125;

LadderCosts cross_entropy_costs(const Sizes& n) {
  const double N = double(n[0]), V = double(n[1]);
  return {2 * 2 * N * V + 4 * 2 * N, 6 * N * V};
}
LadderProblem make_cross_entropy(const Sizes& n) {
  Random random(5);
  std::vector<int32_t> labels;
  for (int64_t row = 0; row < n[0]; ++row) labels.push_back(int32_t(random.below(uint64_t(n[1]))));
  LadderProblem p;
  p.inputs = {Tensor::from_ints({n[0]}, labels)};
  p.outputs = {Tensor::zeros({n[0]}, DType::F32), bf16_tensor(random, {n[0], n[1]}, 8)};
  return p;
}
void reference_cross_entropy(LadderProblem& p) {
  reference_backend().cross_entropy(p.outputs[0], p.outputs[1], p.inputs[0], kLossScale, true);
}
void run_cross_entropy(int rung, LadderProblem& p, cudaStream_t stream) {
  cross_entropy_rung(rung, p.outputs[0], p.outputs[1], p.inputs[0], kLossScale, stream);
}

// --- attention: inputs q, k, v; host inputs cu_seqlens; outputs out, lse -------------------------

// Sizes: documents, tokens of each, heads, kv_heads, head_dim.
Tensor documents(const Sizes& n) {
  std::vector<int32_t> ends;
  for (int64_t d = 0; d <= n[0]; ++d) ends.push_back(int32_t(d * n[1]));
  return Tensor::from_ints({n[0] + 1}, ends);
}
double attention_scale(const Tensor& q) { return 1 / std::sqrt(double(q.size(2))); }
// Pairs of a query and a key that it sees, over all heads, times head_dim.
double attention_work(const Sizes& n) {
  return double(n[0]) * double(n[1]) * double(n[1] + 1) / 2 * double(n[2]) * double(n[4]);
}

LadderCosts attention_costs(const Sizes& n) {
  const double tokens = double(n[0] * n[1]), q = double(n[2] * n[4]), kv = double(n[3] * n[4]);
  return {tokens * (2 * (2 * q + 2 * kv) + 4 * double(n[2])), 4 * attention_work(n)};
}
LadderProblem make_attention(const Sizes& n) {
  Random random(6);
  const int64_t tokens = n[0] * n[1];
  LadderProblem p;
  p.inputs = {bf16_tensor(random, {tokens, n[2], n[4]}, 2),
              bf16_tensor(random, {tokens, n[3], n[4]}, 2),
              bf16_tensor(random, {tokens, n[3], n[4]})};
  p.host_inputs = {documents(n)};
  p.outputs = {Tensor::zeros(p.inputs[0].shape(), DType::BF16),
               Tensor::zeros({n[2], tokens}, DType::F32)};
  return p;
}
void reference_attention(LadderProblem& p) {
  reference_backend().attention_forward(p.outputs[0], p.outputs[1], p.inputs[0], p.inputs[1],
                                        p.inputs[2], p.host_inputs[0], p.host_inputs[0],
                                        attention_scale(p.inputs[0]));
}
void run_attention(int rung, LadderProblem& p, cudaStream_t stream) {
  attention_forward_rung(rung,
                         {p.outputs[0], p.outputs[1], p.inputs[0], p.inputs[1], p.inputs[2],
                          p.host_inputs[0], p.host_inputs[0], attention_scale(p.inputs[0])},
                         stream);
}

LadderCosts attention_backward_costs(const Sizes& n) {
  const double tokens = double(n[0] * n[1]), q = double(n[2] * n[4]), kv = double(n[3] * n[4]);
  return {tokens * (2 * (4 * q + 4 * kv) + 4 * double(n[2])), 10 * attention_work(n)};
}
// Backward: inputs q, k, v, dout, out, lse; outputs dq, dk, dv. The forward's results come from the
// fast CPU kernels: what is timed is as large as what is trained.
LadderProblem make_attention_backward(const Sizes& n) {
  LadderProblem p = make_attention(n);
  cpu_backend().attention_forward(p.outputs[0], p.outputs[1], p.inputs[0], p.inputs[1], p.inputs[2],
                                  p.host_inputs[0], p.host_inputs[0], attention_scale(p.inputs[0]));
  Random random(7);
  p.inputs.push_back(bf16_tensor(random, p.inputs[0].shape()));
  p.inputs.insert(p.inputs.end(), p.outputs.begin(), p.outputs.end());
  p.outputs.clear();
  for (int i = 0; i < 3; ++i)
    p.outputs.push_back(Tensor::zeros(p.inputs[size_t(i)].shape(), DType::BF16));
  return p;
}
void reference_attention_backward(LadderProblem& p) {
  reference_backend().attention_backward(
      p.outputs[0], p.outputs[1], p.outputs[2], p.inputs[3], p.inputs[0], p.inputs[1], p.inputs[2],
      p.inputs[4], p.inputs[5], p.host_inputs[0], attention_scale(p.inputs[0]));
}
void run_attention_backward(int rung, LadderProblem& p, cudaStream_t stream) {
  Tensor delta = Tensor::empty(p.inputs[5].shape(), DType::F32, Device::CUDA, Scope::Scratch);
  attention_delta(delta, p.inputs[3], p.inputs[4], stream);
  attention_backward_rung(
      rung,
      {p.outputs[0], p.outputs[1], p.outputs[2], p.inputs[3], p.inputs[0], p.inputs[1], p.inputs[2],
       p.inputs[5], delta, p.host_inputs[0], attention_scale(p.inputs[0])},
      stream);
}

// --- the table -----------------------------------------------------------------------------------

LadderFamily gemm_family() {
  return {
      .name = "gemm",
      .equation = "c = a bᵀ, BF16",
      .dimensions = "M N K",
      .bench_sizes = {4096, 4096, 4096},
      .small_sizes = {128, 256, 64},
      .rungs = {{1, "naive", "One thread per output: every multiply-add loads two elements.",
                 "gemm_by_hand.cu", "gemm_1_naive<__nv_bfloat16>"},
                {2, "shared tiles",
                 "A block reads 32 x 32 tiles once, in lines, and all its threads use them.",
                 "gemm_by_hand.cu", "gemm_2_shared<__nv_bfloat16>"},
                {3, "registers",
                 "A thread owns 8 x 8 outputs: 16 floats from shared memory for 64 multiply-adds.",
                 "gemm_by_hand.cu", "gemm_3_registers<__nv_bfloat16>"},
                {4, "tensor cores",
                 "A warp multiplies 16 x 16 by 16 x 8 in one mma.sync, fed by ldmatrix, whose rows "
                 "collide in the banks.",
                 "gemm_by_hand_mma.cu", "gemm_4_mma<false>"},
                {5, "swizzle",
                 "Chunks of a row change places with its number, and the collisions are gone.",
                 "gemm_by_hand_mma.cu", "gemm_4_mma<true>"},
                {6, "pipeline", "cp.async brings tiles three steps ahead, past the registers.",
                 "gemm_by_hand_mma.cu", "gemm_6_pipeline"},
                {7, "large tiles",
                 "A warp owns 64 x 64, and blocks run in bands that share what L2 holds.",
                 "gemm_by_hand_mma.cu", "gemm_7_large"}},
      .costs = gemm_costs,
      .make = make_gemm,
      .reference = [](LadderProblem& p) { gemm_by(reference_backend(), p); },
      .run = run_gemm,
      .library = [](LadderProblem& p) { gemm_by(cuda_backend(), p); },
      .library_name = "cuBLAS"};
}

LadderFamily lora_family() {
  return {.name = "lora_linear",
          .equation = "y = x Wᵀ + s (x Aᵀ) Bᵀ, BF16",
          .dimensions = "M N K r",
          .bench_sizes = {4096, 4096, 4096, 16},
          .small_sizes = {128, 256, 64, 16},
          .rungs = {{1, "naive",
                     "Three products one after the other, x Wᵀ and x Aᵀ by gemm's last rung; y is "
                     "read and written again.",
                     "lora_linear.cu", "lora_1_up"},
                    {2, "split-K",
                     "x Aᵀ is 16 columns wide: its sum is cut into slices, so that there are "
                     "blocks for the whole GPU.",
                     "lora_linear.cu", "lora_2_down<16>"},
                    {3, "fused",
                     "(x Aᵀ) Bᵀ is one step more of the accumulator of x Wᵀ, as if the operands "
                     "were [x u] and [W B]; y is written once.",
                     "lora_linear.cu", "lora_3_fused"}},
          .costs = lora_costs,
          .make = make_lora,
          .reference = [](LadderProblem& p) { lora_by(reference_backend(), p, DType::F32); },
          .run = run_lora,
          .library = [](LadderProblem& p) { lora_by(cuda_backend(), p, DType::BF16); },
          .library_name = "cuBLAS"};
}

LadderFamily norm_family() {
  return {.name = "rms_norm",
          .equation = "y = x rstd w, BF16",
          .dimensions = "R H",
          .bench_sizes = {16384, 4096},
          .small_sizes = {16, 512},
          .rungs = {{1, "thread", "A thread per row: neighbours read a row apart, 32 lines a load.",
                     "rms_norm.cu", "forward_1_thread<__nv_bfloat16, __nv_bfloat16>"},
                    {2, "warp", "A warp per row: 16-byte loads, and sums by shuffles.",
                     "rms_norm.cu", "forward_2_warp<__nv_bfloat16, __nv_bfloat16, 8>"}},
          .costs = norm_costs,
          .make = make_norm,
          .reference = reference_norm,
          .run = run_norm,
          .library = nullptr,
          .library_name = ""};
}

LadderFamily norm_backward_family() {
  return {
      .name = "rms_norm_backward",
      .equation = "dx = rstd (w dy - n mean(n w dy)), n = x rstd, BF16",
      .dimensions = "R H",
      .bench_sizes = {16384, 4096},
      .small_sizes = {16, 512},
      .rungs = {{1, "thread", "A thread per row, as in the forward.", "rms_norm.cu",
                 "dx_1_thread<__nv_bfloat16, __nv_bfloat16>"},
                {2, "warp", "A warp per row; x and dy are read twice, the second time from cache.",
                 "rms_norm.cu", "dx_2_warp<__nv_bfloat16, __nv_bfloat16, 8>"}},
      .costs = norm_backward_costs,
      .make = make_norm_backward,
      .reference = reference_norm_backward,
      .run = run_norm_backward,
      .library = nullptr,
      .library_name = ""};
}

LadderFamily nf4_family() {
  return {
      .name = "widen_nf4",
      .equation = "w = value[code] absmax, NF4 with quantised scales into BF16",
      .dimensions = "N K",
      .bench_sizes = {14336, 4096},
      .small_sizes = {64, 256},
      .rungs = {{1, "element", "A thread per element: two read one byte, 64 work out one scale.",
                 "nf4.cu", "widen_nf4_1_element<__nv_bfloat16>"},
                {2, "words",
                 "A thread takes the four bytes of eight elements and stores 16 bytes at once; "
                 "the 16 values lie in shared memory.",
                 "nf4.cu", "widen_nf4_2_words<__nv_bfloat16>"}},
      .costs = nf4_costs,
      .make = make_nf4,
      .reference = reference_nf4,
      .run = run_nf4,
      .library = nullptr,
      .library_name = ""};
}

LadderFamily cross_entropy_family() {
  return {.name = "cross_entropy",
          .equation = "loss = logsumexp(z) - z[label], dz = s (softmax(z) - onehot(label)), BF16",
          .dimensions = "N V",
          .bench_sizes = {1024, 151936},
          .small_sizes = {8, 4096},
          .rungs = {{1, "thread", "A thread per row and three passes: largest, sum, gradient.",
                     "cross_entropy.cu", "cross_entropy_1_thread<__nv_bfloat16>"},
                    {2, "block",
                     "A block per row: neighbours read neighbours, and the passes after the first "
                     "find the row in L2.",
                     "cross_entropy_ladder.cu", "cross_entropy_passes<__nv_bfloat16>"},
                    {3, "online",
                     "Largest and sum in one pass, which rescales the sum when the largest grows; "
                     "16-byte loads.",
                     "cross_entropy.cu", "cross_entropy_2_block<__nv_bfloat16, 8>"}},
          .costs = cross_entropy_costs,
          .make = make_cross_entropy,
          .reference = reference_cross_entropy,
          .run = run_cross_entropy,
          .library = nullptr,
          .library_name = ""};
}

LadderFamily attention_family() {
  return {.name = "attention",
          .equation = "out = softmax(scale q kᵀ + causal mask) v, BF16",
          .dimensions = "documents length heads kv_heads head_dim",
          .bench_sizes = {4, 2048, 32, 8, 128},
          .small_sizes = {1, 64, 2, 1, 128},
          .rungs = {{1, "warp",
                     "A warp per query: online softmax over its keys, a shuffled sum for each.",
                     "attention.cu", "attention_forward_1_naive<__nv_bfloat16>"},
                    {2, "shared tiles",
                     "A tile of keys and values in shared memory serves 32 queries; the lanes are "
                     "32 keys, so that a score needs no shuffle.",
                     "attention.cu", "attention_forward_2_tiled<__nv_bfloat16, 4, 8>"},
                    {3, "tensor cores",
                     "FlashAttention-2: both products by mma.sync on swizzled tiles, scores stay "
                     "in registers.",
                     "attention_3_mma.cu", "attention_forward_3_kernel<128>"}},
          .costs = attention_costs,
          .make = make_attention,
          .reference = reference_attention,
          .run = run_attention,
          .library = nullptr,
          .library_name = ""};
}

LadderFamily attention_backward_family() {
  return {
      .name = "attention_backward",
      .equation = "dq, dk, dv of the same, without atomics",
      .dimensions = "documents length heads kv_heads head_dim",
      .bench_sizes = {4, 2048, 32, 8, 128},
      .small_sizes = {1, 64, 2, 1, 128},
      .rungs = {{1, "warp",
                 "A warp per row of dq, then one per row of dk and dv: scores are computed again.",
                 "attention.cu", "attention_backward_1_naive<__nv_bfloat16, true>"},
                {2, "shared tiles", "A block owns rows and walks over tiles of the other side.",
                 "attention.cu", "attention_backward_2_tiled<__nv_bfloat16, 4, 8, true>"},
                {3, "tensor cores",
                 "Two such walks on tensor cores, in BF16: three products a tile for dq, four for "
                 "dk and dv.",
                 "attention_3_mma.cu", "attention_backward_3_kernel<128, true>"}},
      .costs = attention_backward_costs,
      .make = make_attention_backward,
      .reference = reference_attention_backward,
      .run = run_attention_backward,
      .library = nullptr,
      .library_name = ""};
}

}  // namespace

LadderProblem on_device(const LadderProblem& problem) {
  LadderProblem moved = problem;
  for (Tensor& t : moved.inputs) t = t.to(Device::CUDA);
  for (Tensor& t : moved.outputs) t = t.to(Device::CUDA);
  return moved;
}

std::vector<LadderFamily> ladder_families() {
  return {gemm_family(),          lora_family(),
          nf4_family(),           norm_family(),
          norm_backward_family(), cross_entropy_family(),
          attention_family(),     attention_backward_family()};
}

}  // namespace graft
