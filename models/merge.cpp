#include "models/merge.h"

#include <algorithm>
#include <cmath>
#include <map>

#include <span>

#include "autograd/tape.h"
#include "models/adapter_delta.h"
#include "models/model_files.h"
#include "models/weights.h"
#include "tensor/backend.h"
#include "tensor/finite.h"
#include "tensor/nf4.h"
#include "tensor/thread_pool.h"

namespace graft {
namespace {

// The parameters of the base in order, each with what adapters add to it.
struct Collect : Visitor {
  struct One {
    std::string name;
    Tensor weight;
    std::vector<std::pair<const AdapterModule*, double>> deltas;
    std::vector<std::pair<const AdapterFile*, double>>
        tokens;  // rows that take the place of its own
  };
  std::vector<One> all;
  Tensor head;  // of lm_head, tied or not

  void parameter(const std::string& name, Variable& value) override {
    all.push_back({name, value.value(), {}, {}});
  }
  void linear(const std::string& name, Linear& module) override {
    if (name == "lm_head") head = module.weight.value();
  }
  One* find(const std::string& name) {
    const auto at =
        std::find_if(all.begin(), all.end(), [&](const One& one) { return one.name == name; });
    return at == all.end() ? nullptr : &*at;
  }
};

// sum[id] += weight (row - w[id]).
void add_token_rows(Tensor& sum, const Tensor& w, const AdapterFile& file, double weight) {
  const std::vector<int64_t>& ids = file.config.trainable_token_indices;
  CHECK(file.token_rows.size(1) == w.size(1), file.directory, ": the rows of tokens are ",
        file.token_rows.size(1), " wide, the embedding ", w.size(1));
  for (size_t i = 0; i < ids.size(); ++i) {
    CHECK(ids[i] < w.size(0), file.directory, ": token ", ids[i], " has no place in this model of ",
          w.size(0), " tokens");
    const Tensor from = w.slice_rows(ids[i], ids[i] + 1).to(DType::F32, Scope::Scratch);
    const float* row = file.token_rows.data<float>() + int64_t(i) * w.size(1);
    float* to = sum.data<float>() + ids[i] * w.size(1);
    for (int64_t c = 0; c < w.size(1); ++c)
      to[c] += float(weight * (double(row[c]) - from.data<float>()[c]));
  }
}

Tensor merged(const Collect::One& one) {
  if (one.deltas.empty() && one.tokens.empty()) return one.weight;
  Tensor sum = Tensor::empty(one.weight.shape(), DType::F32, Device::CPU, Scope::Scratch);
  backend_of(sum).copy(sum, one.weight);
  for (const auto& [module, weight] : one.deltas) add_delta(sum, one.weight, *module, weight);
  for (const auto& [file, weight] : one.tokens) add_token_rows(sum, one.weight, *file, weight);
  return sum;
}

// Rounded to what the file will have.
Tensor as_written(const Collect::One& one, const Tensor& sum, DType dtype) {
  const Tensor written = sum.to(dtype, Scope::Scratch);
  CHECK(all_finite(written), "merge: '", one.name, "' has values that ", dtype_name(dtype),
        " cannot hold; take ", dtype == DType::F16 ? "--dtype float32 or bfloat16, or " : "",
        "smaller weights for the adapters");
  return written;
}

// got and wanted (out, in), F32. By rows, so that the sums do not depend on the threads.
void add_distance(Distance& total, const Tensor& got, const Tensor& wanted) {
  const int64_t rows = wanted.size(0), columns = wanted.size(1);
  std::vector<Distance> of_rows(size_t(rows), Distance{});
  thread_pool().run(rows, [&](int64_t row, int) {
    Distance mine;
    for (int64_t i = row * columns; i < (row + 1) * columns; ++i) {
      const double w = wanted.data<float>()[i], difference = std::abs(got.data<float>()[i] - w);
      mine.largest = std::max(mine.largest, difference);
      mine.squares += difference * difference;
      mine.wanted_squares += w * w;
    }
    of_rows[size_t(row)] = mine;
  });
  for (const Distance& one : of_rows) {
    total.largest = std::max(total.largest, one.largest);
    total.squares += one.squares;
    total.wanted_squares += one.wanted_squares;
  }
}

// The weight as the file will have it; what that costs goes to `loss`.
Tensor merged_nf4(const Collect::One& one, DType dtype, Nf4Loss& loss) {
  Tensor wide = merged(one);
  if (is_nf4(wide.dtype())) wide = wide.to(DType::F32, Scope::Scratch);
  const Tensor written = as_written(one, wide, dtype);
  ++loss.weights;
  loss.bytes_before += one.weight.num_bytes();
  loss.bytes_after += written.num_bytes();
  add_distance(loss.rounded, written.to(DType::F32, Scope::Scratch), wide);
  const bool double_quant = one.weight.dtype() == DType::NF4;
  const Tensor quantised = nf4_quantise(written, double_quant, Scope::Scratch);
  add_distance(loss.quantised, quantised.to(DType::F32, Scope::Scratch), wide);
  return written;
}

// log sum exp of a row, and the place of its largest.
struct Row {
  double lse = 0;
  size_t best = 0;
  explicit Row(std::span<const double> logits) {
    best = size_t(std::max_element(logits.begin(), logits.end()) - logits.begin());
    double sum = 0;
    for (const double x : logits) sum += std::exp(x - logits[best]);
    lse = logits[best] + std::log(sum);
  }
};

void compare_rows(Certificate& total, std::span<const double> p, std::span<const double> q) {
  const Row wanted(p), got(q);
  double kl = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    const double difference = std::abs(p[i] - q[i]);
    if (!(difference <= total.largest_difference)) total.largest_difference = difference;
    total.largest_logit = std::max(total.largest_logit, std::abs(p[i]));
    kl += std::exp(p[i] - wanted.lse) * ((p[i] - wanted.lse) - (q[i] - got.lse));
  }
  total.mean_kl += kl;
  if (!(kl <= total.largest_kl)) total.largest_kl = kl;
  total.agreement += wanted.best == got.best;
  ++total.tokens;
}

}  // namespace

double Distance::share() const {
  return wanted_squares > 0 ? std::sqrt(squares / wanted_squares) : 0;
}

Nf4Loss write_merged(Decoder& base, const std::string& model_dir,
                     const std::vector<WeightedAdapter>& adapters, DType dtype,
                     const std::string& folder) {
  CHECK(dtype == DType::F32 || dtype == DType::BF16 || dtype == DType::F16, "merge: dtype ",
        dtype_name(dtype), ", wanted F32, BF16 or F16");
  Collect collect;
  base.visit("", collect);
  bool tied = base.is_tied();
  const auto untie = [&](const std::string& name) {
    if (!tied || (name != "lm_head.weight" && name != "model.embed_tokens.weight")) return;
    tied = false;
    collect.all.push_back({"lm_head.weight", collect.head, {}, {}});
  };
  for (const WeightedAdapter& adapter : adapters) {
    for (const AdapterModule& module : adapter.file.modules) {
      untie(module.name + ".weight");
      Collect::One* one = collect.find(module.name + ".weight");
      CHECK(one, adapter.file.directory, ": '", module.name, "' has no place in this model");
      one->deltas.emplace_back(&module, adapter.weight);
    }
    CHECK(adapter.weight == 1 || adapter.file.replaced.empty(), adapter.file.directory,
          ": has biases or modules of its own, so its weight must be 1, and is ", adapter.weight);
    for (const auto& [name, own] : adapter.file.replaced) {
      untie(name);
      Collect::One* one = collect.find(name);
      CHECK(one && one->weight.shape() == own.shape(), adapter.file.directory, ": '", name,
            "' has no place in this model");
      one->weight = own;
    }
  }
  for (const WeightedAdapter& adapter : adapters) {
    if (!adapter.file.token_rows.defined()) continue;
    collect.find("model.embed_tokens.weight")->tokens.emplace_back(&adapter.file, adapter.weight);
    if (base.is_tied() && !tied)
      collect.find("lm_head.weight")->tokens.emplace_back(&adapter.file, adapter.weight);
  }
  Nf4Loss loss;
  std::vector<TensorToMake> tensors;
  for (const Collect::One& one : collect.all)
    tensors.push_back({one.name, one.weight.shape(), dtype, [&one, &loss, dtype] {
                         return is_nf4(one.weight.dtype()) ? merged_nf4(one, dtype, loss)
                                                           : as_written(one, merged(one), dtype);
                       }});
  write_shards(folder, std::move(tensors));
  copy_model_files(model_dir, folder, dtype, tied);
  return loss;
}

Certificate compare_models(Decoder& wanted, Decoder& got,
                           const std::vector<std::vector<int32_t>>& rows) {
  constexpr int64_t kRows = 64;  // logits of so many positions at once
  const NoRecord off;
  Certificate total;
  for (const std::vector<int32_t>& row : rows) {
    const PackedBatch batch = pack({row});
    const Tensor a = wanted.forward(batch, {}).value(), b = got.forward(batch, {}).value();
    for (int64_t begin = 0; begin < a.size(0); begin += kRows) {
      const int64_t end = std::min(a.size(0), begin + kRows);
      const std::vector<double> p = wanted.logits(a.slice_rows(begin, end)).to_doubles();
      const std::vector<double> q = got.logits(b.slice_rows(begin, end)).to_doubles();
      CHECK(p.size() == q.size(), "certificate: vocabularies differ");
      const size_t vocab = p.size() / size_t(end - begin);
      for (size_t at = 0; at < p.size(); at += vocab)
        compare_rows(total, {p.data() + at, vocab}, {q.data() + at, vocab});
    }
  }
  CHECK(total.tokens > 0, "certificate: the text has no tokens");
  total.mean_kl /= double(total.tokens);
  total.agreement /= double(total.tokens);
  return total;
}

// F32 has the difference of two orders of summation; BF16 rounds each weight by up to 0.4 %, F16 by
// 0.05 %.
CertificateLimits CertificateLimits::of(DType dtype) {
  if (dtype == DType::BF16) return {0.1, 2e-2, 0.95};
  if (dtype == DType::F16) return {0.02, 2e-3, 0.98};
  return {};
}

std::string violations(const Certificate& certificate, const CertificateLimits& limits) {
  std::string text;
  const auto check = [&](bool holds, const auto&... parts) {
    if (!holds) text += (text.empty() ? "" : ", ") + concat(parts...);
  };
  const double difference = certificate.largest_difference / certificate.largest_logit;
  if (!std::isfinite(difference) || !std::isfinite(certificate.mean_kl))
    return "logits are not finite, or all 0; are weights of the base or an adapter out of range?";
  check(difference <= limits.difference, "logits differ by ", difference, " of the largest (limit ",
        limits.difference, ")");
  check(certificate.mean_kl <= limits.mean_kl, "KL is ", certificate.mean_kl, " (limit ",
        limits.mean_kl, ")");
  check(certificate.agreement >= limits.agreement, "the most probable token agrees in ",
        100 * certificate.agreement, " % (limit ", 100 * limits.agreement, " %)");
  return text;
}

}  // namespace graft
