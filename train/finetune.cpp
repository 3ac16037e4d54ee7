#include "train/finetune.h"

#include <chrono>
#include <cmath>
#include <filesystem>

#include "autograd/tape.h"
#include "models/model_files.h"
#include "models/weights.h"
#include "tensor/safetensors.h"
#include "tensor/thread_pool.h"
#include "train/checkpoint.h"
#include "train/data_loader.h"
#include "train/device_choice.h"
#include "train/report.h"
#include "train/run_setup.h"
#include "train/step_graphs.h"

namespace graft {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct StepOutcome {
  double loss = 0;  // mean over the labelled tokens of the whole step
  double grad_norm = 0;
  int64_t num_tokens = 0, num_label_tokens = 0;
};

class Run {
 public:
  Run(TrainOptions& options, const TrainData& data, const RunControl& control,
      const std::string& model_dir, Device device);
  TrainResult train();

 private:
  void lay_out_products();
  void train_steps();
  StepOutcome train_step(int64_t step);
  void compute_step(const StepInputs& inputs, const AdamWStep& adamw);
  bool eval_due(int64_t step) const;
  std::vector<double> eval_losses(const std::vector<int64_t>& rows);
  void evaluate(int64_t step);
  void log_step(int64_t step, const StepOutcome& outcome);
  void begin_output();
  void take_back_output();  // so that the same command can be given again
  void save();
  bool interrupted() const { return control_.interrupt && *control_.interrupt; }

  TrainOptions& options_;
  const TrainData& data_;
  const RunControl& control_;
  std::string model_dir_;
  std::unique_ptr<Decoder> model_;
  ParameterBuffer parameters_;
  DataLoader loader_;
  Schedule schedule_;
  std::unique_ptr<StepGraphs> graphs_;  // null without cuda_graph
  std::unique_ptr<Report> report_;
  TrainerState state_;
  TrainResult result_;
  int64_t first_step_ = 1;    // of this process
  bool saved_ = false;        // there is a checkpoint
  bool had_plan_ = false;     // gemm_plan.json was there before
  std::string made_;          // the topmost directory that was not there
  double train_seconds_ = 0;  // of this process, without evaluations
  double unlogged_seconds_ = 0;
  int64_t unlogged_tokens_ = 0;
};

Run::Run(TrainOptions& options, const TrainData& data, const RunControl& control,
         const std::string& model_dir, Device device)
    : options_(options),
      data_(data),
      control_(control),
      model_dir_(model_dir),
      model_(prepare_model(options, model_dir, device)),
      parameters_(trained_leaves(*model_, options.method, options.loraplus_lr_ratio), device,
                  options.method == TrainOptions::Method::Full ? Scope::Weights : Scope::Adapters,
                  moments_of(options)),
      loader_(data.train, {.batch_size = options.per_device_train_batch_size,
                           .accumulation_steps = options.gradient_accumulation_steps,
                           .shuffle = options.shuffle,
                           .seed = options.seed}) {
  // Now, and not in the midst of a step.
  model_->reserve_positions(std::max(data.train.longest_row(), data.eval.longest_row()));
  if (options.cuda_graph) graphs_ = std::make_unique<StepGraphs>();
  lay_out_products();
  schedule_.type = options.lr_scheduler_type;
  schedule_.learning_rate = options.learning_rate;
  schedule_.min_lr_ratio = options.min_lr_ratio;
  schedule_.total_steps =
      options.max_steps > 0
          ? options.max_steps
          : int64_t(std::ceil(options.num_epochs * double(loader_.steps_per_epoch())));
  schedule_.warmup_steps =
      num_warmup_steps(options.warmup_steps, options.warmup_ratio, schedule_.total_steps);

  int64_t trained = 0;
  for (const auto& entry : parameters_.entries()) trained += entry.variable.shape().num_elements();
  result_.trainable_line = trainable_parameters_line(
      trained,
      all_parameters(num_parameters(model_->config()), options.method, parameters_.entries()));
}

// The adapters are in the parameter buffer by now; borders and norms are made from them, here and
// whenever they change.
void Run::lay_out_products() {
  const LoraLayout layout = model_->set_lora_layout(options_.lora_layout);
  if (layout != options_.lora_layout)
    Report(control_.console, "")
        .line(layout == LoraLayout::Merged
                  ? "lora_layout: merged, for bordered needs lora_dropout: 0"
              : options_.lora.use_dora ? "lora_layout: plain, for DoRA scales its layers singly"
              : !options_.base_adapters.empty()
                  ? "lora_layout: plain, for there are base_adapters"
                  : "lora_layout: plain, for biases or norms are trained");
  if (layout == LoraLayout::Bordered || options_.lora.use_dora)
    parameters_.on_publish([this] { model_->refresh_adapters(); });
}

// A run that is resumed enters it at the step after its checkpoint. One that runs out of memory
// with no checkpoint to go on from leaves nothing behind, and neither does what ends the first
// step.
TrainResult Run::train() {
  begin_output();
  try {
    train_steps();
  } catch (const OutOfMemory&) {
    if (!saved_) take_back_output();
    throw;
  } catch (...) {
    if (state_.step == 0) take_back_output();
    throw;
  }
  return result_;
}

void Run::train_steps() {
  if (eval_due(state_.step) && state_.last_eval_step < state_.step) evaluate(state_.step);

  bool stopped = interrupted();
  for (int64_t step = first_step_; step <= schedule_.total_steps && !stopped; ++step) {
    const auto start = Clock::now();
    const StepOutcome outcome = train_step(step);
    const double seconds = seconds_since(start);

    train_seconds_ += seconds;
    unlogged_seconds_ += seconds;
    state_.step = step;
    state_.epoch = loader_.epoch_of(step);
    state_.position = loader_.position_after(step);
    log_step(step, outcome);
    if (eval_due(step)) evaluate(step);

    stopped = interrupted();
    if (stopped || (options_.save_steps > 0 && step % options_.save_steps == 0)) save();
  }

  result_.steps = state_.step;
  result_.interrupted = stopped;
  result_.first_eval_loss = state_.first_eval_loss;
  result_.last_eval_loss = state_.last_eval_loss;
  if (!stopped) {
    save_model(*model_, options_, model_dir_, options_.output_dir);
    report_->line("saved " + options_.output_dir);
  } else if (state_.step > 0) {
    report_->line(concat("interrupted after step ", state_.step, "; go on with resume: true"));
  } else {
    report_->line("interrupted before the first step; nothing was saved");
    take_back_output();
  }
}

void Run::take_back_output() {
  namespace fs = std::filesystem;
  const fs::path output = options_.output_dir;
  std::error_code error;  // there is one already, and it is that which is told
  fs::remove(output / "metrics.jsonl", error);
  fs::remove(output / "train_config.yaml", error);
  if (!had_plan_) fs::remove(output / kGemmPlanName, error);
  if (made_.empty()) return;
  fs::path directory = fs::absolute(output).lexically_normal();
  if (!directory.has_filename()) directory = directory.parent_path();
  // One that somebody else has put something into stays.
  while (fs::remove(directory, error) && directory != made_) directory = directory.parent_path();
}

// One optimizer step. The one place of it where we wait for the device is outcome().
StepOutcome Run::train_step(int64_t step) {
  const StepInputs inputs =
      step_inputs(data_.train, loader_.step(step), model_->config().vocab_size);
  const AdamWStep adamw{.learning_rate = schedule_.at(step),
                        .beta1 = options_.adam_beta1,
                        .beta2 = options_.adam_beta2,
                        .epsilon = options_.adam_epsilon,
                        .weight_decay = options_.weight_decay,
                        .step = step,
                        .lr_ratio = options_.loraplus_lr_ratio};
  if (graphs_) {
    graphs_->run(inputs, adamw,
                 {.step = [&](const StepInputs& here) { compute_step(here, adamw); },
                  .publish = [&] { parameters_.publish(); }});
  } else {
    compute_step(to_device(inputs, model_->device()), adamw);
    parameters_.publish();
  }

  const auto [loss, grad_norm] = parameters_.outcome();
  CHECK(std::isfinite(loss) && std::isfinite(grad_norm), "training: step ", step, " gave loss ",
        loss, " and gradient norm ", grad_norm, " at learning rate ", adamw.learning_rate,
        "; checkpoints are as they were; try a lower learning_rate or more warm-up");
  result_.losses.push_back(loss);
  result_.grad_norms.push_back(grad_norm);
  return {loss, grad_norm, inputs.num_tokens, inputs.num_label_tokens};
}

// Forward and backward of every micro-batch, weighted by token over all of them, then clipping and
// AdamW, which does nothing where loss or gradient are not finite. publish() has to follow.
void Run::compute_step(const StepInputs& inputs, const AdamWStep& adamw) {
  ForwardContext context;
  context.training = true;
  context.dropout.seed = options_.seed;
  context.dropout.step = uint32_t(adamw.step);
  parameters_.begin_step();
  for (const PackedBatch& batch : inputs.batches) {
    const Variable loss = model_->loss(batch, context, 1.0 / double(inputs.num_label_tokens),
                                       options_.gradient_checkpointing);
    parameters_.add_loss(loss.value());
    backward(loss);
    context.dropout.first_row += batch.num_tokens();
  }
  parameters_.update(adamw, options_.max_grad_norm);
}

// Before the first and after the last step, and every eval_steps.
bool Run::eval_due(int64_t step) const {
  return step == 0 || step == schedule_.total_steps ||
         (options_.eval_steps > 0 && step % options_.eval_steps == 0);
}

// Of each token, 0 where it has no label.
std::vector<double> Run::eval_losses(const std::vector<int64_t>& rows) {
  const NoRecord no_record;
  const StepInputs inputs =
      to_device(step_inputs(data_.eval, {rows}, model_->config().vocab_size), model_->device());
  Tensor losses;
  model_->loss(inputs.batches[0], ForwardContext{}, 1.0, false, &losses);
  return losses.to_doubles();
}

// eval_loss: the sum over all labelled tokens, divided by their number. No dropout.
void Run::evaluate(int64_t step) {
  const int64_t rows = int64_t(data_.eval.rows.size());
  if (rows == 0) return;
  double sum = 0;
  for (int64_t begin = 0; begin < rows; begin += options_.per_device_train_batch_size) {
    if (interrupted()) return;
    std::vector<int64_t> batch_rows;
    for (int64_t i = begin; i < std::min(begin + options_.per_device_train_batch_size, rows); ++i)
      batch_rows.push_back(i);
    std::vector<double> losses;
    const auto compute = [&] { losses = eval_losses(batch_rows); };
    graphs_ ? graphs_->run_beside(compute) : compute();
    for (double loss : losses) sum += loss;
  }
  const double eval_loss = sum / double(data_.eval.num_label_tokens());
  if (!state_.first_eval_loss) state_.first_eval_loss = eval_loss;
  state_.last_eval_loss = eval_loss;
  state_.last_eval_step = step;
  report_->eval(step, loader_.epochs_after(step), eval_loss);
}

void Run::log_step(int64_t step, const StepOutcome& outcome) {
  state_.num_tokens += outcome.num_tokens;
  state_.num_label_tokens += outcome.num_label_tokens;
  state_.unlogged_loss += outcome.loss * double(outcome.num_label_tokens);
  state_.unlogged_label_tokens += outcome.num_label_tokens;
  unlogged_tokens_ += outcome.num_tokens;
  if (step % options_.logging_steps != 0 && step != schedule_.total_steps) return;

  StepMetrics metrics;
  metrics.step = step;
  metrics.total_steps = schedule_.total_steps;
  metrics.epoch = loader_.epochs_after(step);
  metrics.loss = state_.unlogged_loss / double(state_.unlogged_label_tokens);
  metrics.learning_rate = schedule_.at(step);
  metrics.grad_norm = outcome.grad_norm;
  metrics.num_tokens = state_.num_tokens;
  metrics.num_label_tokens = state_.num_label_tokens;
  metrics.tokens_per_second = double(unlogged_tokens_) / unlogged_seconds_;
  metrics.peak_memory_bytes = model_->device() == Device::CUDA
                                  ? allocator_of(Device::CUDA).stats().reserved_peak
                                  : peak_memory_bytes();
  metrics.seconds_left =
      train_seconds_ / double(step - first_step_ + 1) * double(schedule_.total_steps - step);
  report_->step(metrics);
  state_.unlogged_loss = 0;
  state_.unlogged_label_tokens = unlogged_tokens_ = 0;
  unlogged_seconds_ = 0;
}

// Takes up a checkpoint, if one is asked for, and only then writes into output_dir.
void Run::begin_output() {
  const std::string metrics = options_.output_dir + "/metrics.jsonl";
  Report console(control_.console, "");
  console.line(result_.trainable_line);
  const auto keys = run_result_keys(options_, model_dir_, data_);
  std::optional<std::string> checkpoint;
  if (options_.resume) {
    checkpoint = newest_checkpoint(options_.output_dir,
                                   [&](const std::string& text) { console.line(text); });
    if (checkpoint) {
      state_ = load_trainer_state(*checkpoint);
      check_same_run(state_, keys, *checkpoint);
      load_optimizer(parameters_, *checkpoint);
    }
    for (const char* name : {"adapter_model.safetensors", "model.safetensors"})
      CHECK(checkpoint || !std::filesystem::exists(options_.output_dir + "/" + name),
            "resume: ", options_.output_dir, " holds a result (", name,
            ") but no whole checkpoint; train into another output_dir");
    console.line(checkpoint ? concat("resume: going on from ", *checkpoint)
                            : concat("resume: no whole checkpoint in ", options_.output_dir,
                                     ", starting at the first step"));
  }
  state_.result_keys = keys;
  first_step_ = state_.step + 1;

  saved_ = checkpoint.has_value();
  had_plan_ = std::filesystem::exists(std::filesystem::path(options_.output_dir) / kGemmPlanName);
  made_ = first_missing(options_.output_dir);

  std::error_code error;
  std::filesystem::create_directories(options_.output_dir, error);
  CHECK(!error, "output_dir: ", options_.output_dir, " cannot be created: ", error.message());
  if (options_.resume) truncate_metrics(metrics, checkpoint ? state_.step : -1);
  write_file_atomically(options_.output_dir + "/train_config.yaml", resolved_yaml(options_));
  report_ = std::make_unique<Report>(control_.console, metrics);
}

void Run::save() {
  save_checkpoint(
      options_.output_dir, state_, parameters_, options_.save_total_limit,
      [&](const std::string& folder) { save_model(*model_, options_, model_dir_, folder); });
  saved_ = true;
}

TrainResult run(TrainOptions options, TrainData data, const RunControl& control,
                const std::string& model_dir) {
  if (options.eval_split > 0 && data.eval.rows.empty())
    data.eval = split_off(data.train, options.eval_split, options.seed);
  const ModelConfig config = ModelConfig::load(model_dir);
  check_token_ids(data, config);
  Report console(control.console, "");
  console.line("train: " + data.train.summary(options.max_seq_length));
  if (!data.eval.rows.empty()) console.line("eval: " + data.eval.summary(options.max_seq_length));
  if (const int64_t longest = data.train.longest_row(); longest > config.max_position_embeddings)
    console.line(concat("note: rows of up to ", longest, " tokens, but the model was made for ",
                        config.max_position_embeddings, " positions; see max_seq_length"));
  const Device device =
      choose_device(options.device, [&](const std::string& text) { console.line(text); });
  if (device == Device::CUDA) console.line("device: " + backend_of(device).describe());
  CHECK(!options.cuda_graph || device == Device::CUDA,
        "cuda_graph: the device is cpu, which has no graphs; leave cuda_graph out");
  const UseGemmPlan plan(options, device, [&](const std::string& text) { console.line(text); });
  return Run(options, data, control, model_dir, device).train();
}

}  // namespace

TrainResult finetune(const TrainOptions& options, const RunControl& control) {
  validate(options);
  check_output_dir(options);
  set_num_threads(int(options.threads));
  const std::string model_dir = resolve_model(options.model);
  return run(options, load_data(options, model_dir), control, model_dir);
}

TrainResult finetune(const TrainOptions& options, TrainData data, const RunControl& control) {
  validate(options);
  check_output_dir(options);
  set_num_threads(int(options.threads));
  return run(options, std::move(data), control, resolve_model(options.model));
}

}  // namespace graft
