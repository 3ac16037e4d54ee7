#include "train/memory_plan.h"

#include <numeric>

#include "autograd/tape.h"
#include "models/weights.h"
#include "nn/parameter_buffer.h"
#include "tensor/cpu/cpu_backend.h"
#include "tensor/cpu/gemm.h"
#include "tensor/thread_pool.h"
#include "train/run_setup.h"

namespace graft {
namespace {

// The program, its libraries and a tokenizer of 150,000 tokens, as measured (RssAnon before the
// model is loaded).
constexpr int64_t kProcessBytes = int64_t(64) << 20;

// Every row full, every token labelled: the most that the options allow.
PackedBatch full_batch(const TrainOptions& options) {
  const size_t length = size_t(options.max_seq_length);
  const std::vector<std::vector<int32_t>> rows(size_t(options.per_device_train_batch_size),
                                               std::vector<int32_t>(length, 0));
  return pack(rows, rows);
}

// What PiSSA and OLoRA keep: residuals of the adapted weights, which the file no longer holds, and
// what A and B were.
void add_residuals(MemoryPlan& plan, Decoder& model, bool in_place, DType file_dtype) {
  for (const auto& [name, linear] : linear_layers(model)) {
    if (!linear->lora) continue;
    const Tensor& weight = linear->weight.value();
    const int64_t residual = in_place ? weight.num_bytes() : 0;
    const int64_t start = linear->lora->a.value().num_bytes() + linear->lora->b.value().num_bytes();
    if (in_place) plan.mapped_weights -= weight.num_elements() * dtype_size(file_dtype);
    plan.weights += residual;
    plan.adapters += start;
    plan.anonymous += residual + start;
  }
}

// Of the weights that quantise_model takes.
struct LinearWeights {
  int64_t elements = 0, bytes = 0;
};
LinearWeights linear_weights(Decoder& model) {
  LinearWeights sum;
  for (const auto& [name, linear] : linear_layers(model)) {
    if (name == "lm_head") continue;
    sum.elements += linear->weight.value().num_elements();
    sum.bytes += linear->weight.value().num_bytes();
  }
  return sum;
}

}  // namespace

MemoryPlan plan_memory(const ModelConfig& config, const TrainOptions& options, DType file_dtype) {
  MemoryPlan plan;
  const bool full = options.method == TrainOptions::Method::Full;
  const DType dtype = options.dtype.value_or(file_dtype == DType::F16 ? DType::F32 : file_dtype);
  Allocator& meta = allocator_of(Device::Meta);
  const int64_t base_parameters = num_parameters(config);
  const int64_t live_before = meta.stats().live_total;

  auto model = random_model(config, dtype, 0, 0.02, Device::Meta);
  LinearWeights nf4;
  if (is_quantised(options.method) || config.nf4) {
    quantise_model(*model,
                   config.nf4 ? config.nf4_double_quant : options.bnb_4bit_use_double_quant);
    nf4 = linear_weights(*model);
  }
  const int64_t weight_bytes = meta.stats().live_total - live_before;
  meta.release_cached();  // what building the weights took for a moment is not part of training
  const int64_t reserved_before = meta.stats().reserved;
  meta.reset_peak();
  // Weights are used where the file has them, unless another dtype was asked for or they are
  // trained. F16 is as wide as BF16 on disk and stays as it is.
  const bool in_place = !full && (!options.dtype || *options.dtype == file_dtype);
  plan.mapped_weights = in_place ? (base_parameters - nf4.elements) * dtype_size(file_dtype) : 0;

  LoraConfig lora = options.lora;
  lora.use_dora = uses_dora(options);
  if (!full) plan.targets = attach_fresh_adapter(*model, lora, 0);
  const auto leaves = trained_leaves(*model, options.method, options.loraplus_lr_ratio);
  for (const auto& [name, leaf] : leaves) plan.trainable_parameters += leaf.value().num_elements();
  for (const auto& [name, linear] : adaptable_layers(*model)) {
    if (!linear->lora) continue;
    plan.module_parameters.emplace_back(name, 0);
    for (const auto& [leaf, variable] : adapter_leaves(name, *linear->lora))
      plan.module_parameters.back().second += variable.value().num_elements();
  }
  for (const ReplacedParameter& one : model->replaced)
    plan.replaced.emplace_back(one.name, one.own.shape().num_elements());

  ParameterBuffer parameters(leaves, Device::Meta, Scope::Adapters, moments_of(options));
  plan.all_parameters = all_parameters(base_parameters, options.method, parameters.entries());
  ForwardContext context;
  context.training = true;
  const PackedBatch batch = full_batch(options);
  plan.tokens = batch.num_tokens();
  backward(model->loss(batch, context, 1.0, options.gradient_checkpointing));

  const MemoryStats stats = meta.stats();
  const int threads = options.threads ? int(options.threads) : thread_pool().num_threads();
  plan.weights = in_place ? nf4.bytes : weight_bytes;
  plan.adapters = stats.peak[int(Scope::Adapters)];
  plan.optimizer = stats.peak[int(Scope::Optimizer)];
  plan.activations = stats.peak[int(Scope::Activations)];
  // The meta backend allocates nothing itself: what the CPU kernels keep is added by shape.
  const int64_t kernel_scratch =
      gemm_scratch_bytes(threads) +
      cpu_kernel_scratch_bytes(plan.tokens, config.num_attention_heads, config.num_key_value_heads,
                               config.head_dim, true);
  plan.scratch = stats.peak[int(Scope::Scratch)] + kernel_scratch;
  plan.process = kProcessBytes;
  // Blocks are cached, never given back: what was reserved is what the process holds.
  plan.anonymous =
      stats.reserved_peak - reserved_before + plan.weights + plan.process + kernel_scratch;
  if (!full && has_residual_base(lora)) add_residuals(plan, *model, in_place, file_dtype);
  return plan;
}

}  // namespace graft
