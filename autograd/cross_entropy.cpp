// linear_cross_entropy: the language-model head and its loss, without the logits ever existing.
#include <algorithm>

#include "autograd/lora_parts.h"
#include "autograd/tape.h"

namespace graft::ops {

LabelledRows labelled_rows(const Tensor& labels, int64_t vocabulary) {
  const int32_t* label = labels.data<int32_t>();
  std::vector<int32_t> rows, kept;
  for (int64_t t = 0; t < labels.size(0); ++t) {
    if (label[t] == kIgnoreLabel) continue;
    CHECK(label[t] >= 0 && label[t] < vocabulary, "linear_cross_entropy: label ", label[t],
          " of row ", t, " is not below the vocabulary of ", vocabulary);
    rows.push_back(int32_t(t));
    kept.push_back(label[t]);
  }
  const int64_t count = int64_t(rows.size());
  return {Tensor::from_ints({count}, rows), Tensor::from_ints({count}, kept)};
}

namespace {

// An adapter on the head. Its narrow product is made for all rows at once.
struct HeadAdapter {
  LoraArguments lora;
  Tensor in;      // (T, H), what A sees: hidden, dropped
  Tensor u;       // (T, r) = in A^T
  Tensor du;      // (T, r), undefined where neither A nor hidden want a gradient
  Tensor da, db;  // undefined where not wanted
};

struct Loss {
  const Tensor& hidden;  // (T, H)
  const Tensor& weight;  // (V, H)
  double scale;
  Tensor dhidden, dweight;  // undefined where not wanted
  Tensor token_losses;      // (T), undefined where not wanted
  Tensor total;             // one F64: scale times the sum of the losses
  std::vector<HeadAdapter> adapters;
};

HeadAdapter make_adapter(const Loss& loss, const LoraArguments& lora, bool hidden_needs_grad) {
  HeadAdapter adapter{lora, dropped(loss.hidden, lora.dropout_p, lora.key), {}, {}, {}, {}};
  const Shape narrow{loss.hidden.size(0), lora.a.shape()[0]};
  const Tensor& like = loss.hidden;
  adapter.u = Tensor::empty(narrow, low_rank_dtype(like), like.device(), Scope::Scratch);
  product(adapter.u, {.a = adapter.in, .b = lora.a.value(), .transpose_b = true});
  if (!recording()) return adapter;
  if (needs_grad(lora.b)) adapter.db = zeros_like(lora.b.value(), wide(like.dtype()));
  if (needs_grad(lora.a) || hidden_needs_grad)
    adapter.du = zeros_like(adapter.u, adapter.u.dtype());
  return adapter;
}

// d: dlogits of a chunk, u its rows of adapter.u.
void add_gradients(HeadAdapter& adapter, const Tensor& d, const Tensor& u, const Tensor& rows) {
  const double scaling = adapter.lora.scaling;
  if (adapter.db.defined())
    product(adapter.db, {.a = d, .b = u, .transpose_a = true, .alpha = scaling}, adapter.db);
  if (!adapter.du.defined()) return;
  Tensor du = empty_like(u, Scope::Scratch);
  product(du, {.a = d, .b = adapter.lora.b.value(), .alpha = scaling});
  backend_of(du).scatter_add_rows(adapter.du, du, rows);
}

// What all chunks left in du: dA, and what the adapter adds to dhidden.
void finish(HeadAdapter& adapter, Tensor& dhidden) {
  const Tensor& a = adapter.lora.a.value();
  if (needs_grad(adapter.lora.a) && adapter.du.defined()) {
    adapter.da = Tensor::empty(a.shape(), wide(adapter.in.dtype()), a.device());
    product(adapter.da, {.a = adapter.du, .b = adapter.in, .transpose_a = true});
  }
  if (!dhidden.defined()) return;
  const GemmTerm term{.a = adapter.du, .b = a};
  if (adapter.lora.dropout_p == 0) return product(dhidden, term, dhidden);
  Tensor low_rank = empty_like(dhidden, Scope::Scratch);
  product(low_rank, term);
  backend_of(dhidden).dropout(dhidden, low_rank, adapter.lora.dropout_p, adapter.lora.key, true);
}

// dlogits (n, V) of a chunk: the gradients that come from them. us: the chunk's rows of each u.
void add_gradients(Loss& loss, const Tensor& dlogits, Tensor& h, const std::vector<Tensor>& us,
                   const Tensor& rows) {
  Backend& backend = backend_of(loss.hidden);
  // In BF16 they are rounded as every other gradient of an activation is (PyTorch does the same),
  // and the product then runs at the speed of BF16: a quarter of a small model's work. Each error
  // is at most 2^-9 of its element, dhidden's own rounding is as large, and the sum over V evens
  // them out.
  const bool narrow = h.dtype() == DType::BF16 && loss.weight.dtype() == DType::BF16;
  Tensor d = dlogits;
  if (narrow) {
    d = Tensor::empty(dlogits.shape(), DType::BF16, dlogits.device(), Scope::Scratch);
    backend.copy(d, dlogits);
  }
  if (loss.dweight.defined())
    product(loss.dweight, {.a = d, .b = h, .transpose_a = true}, loss.dweight);
  for (size_t i = 0; i < us.size(); ++i) add_gradients(loss.adapters[i], d, us[i], rows);
  if (loss.dhidden.defined()) {
    product(h, {.a = d, .b = loss.weight});  // h has done its work
    backend.scatter_add_rows(loss.dhidden, h, rows);
  }
}

// One chunk: logits, losses, and while the logits are there the gradients that come from them.
void add_chunk(Loss& loss, const Tensor& rows, const Tensor& labels) {
  Backend& backend = backend_of(loss.hidden);
  const int64_t n = rows.size(0);
  const Device device = loss.hidden.device();
  const DType dtype = loss.hidden.dtype();
  Tensor h = Tensor::empty({n, loss.hidden.size(1)}, dtype, device, Scope::Scratch);
  backend.gather_rows(h, loss.hidden, rows);
  // On the GPU logits have the dtype of the activations, as in PyTorch: their gradient is then
  // multiplied on tensor cores as it lies.
  const DType logits_dtype = device == Device::CUDA ? dtype : wide(dtype);
  Tensor logits = Tensor::empty({n, loss.weight.size(0)}, logits_dtype, device, Scope::Scratch);
  product(logits, {.a = h, .b = loss.weight, .transpose_b = true});
  std::vector<Tensor> us;
  for (const HeadAdapter& adapter : loss.adapters) {
    us.push_back(Tensor::empty({n, adapter.u.size(1)}, adapter.u.dtype(), device, Scope::Scratch));
    backend.gather_rows(us.back(), adapter.u, rows);
    const LoraArguments& lora = adapter.lora;
    product(logits, {us.back(), lora.b.value(), false, true, lora.scaling}, logits);
  }
  Tensor losses = Tensor::empty({n}, wide(dtype), device, Scope::Scratch);
  bool with_gradient = loss.dhidden.defined() || loss.dweight.defined();
  for (const HeadAdapter& adapter : loss.adapters)
    with_gradient = with_gradient || adapter.db.defined() || adapter.du.defined();
  backend.cross_entropy(losses, logits, labels, loss.scale, with_gradient);
  if (with_gradient) add_gradients(loss, logits, h, us, rows);
  if (loss.token_losses.defined()) {
    Tensor as_rows = loss.token_losses.reshape({loss.token_losses.size(0), 1});
    backend.scatter_add_rows(as_rows, losses.reshape({n, 1}), rows);
  }
  backend.add_sum(loss.total, losses, loss.scale);
}

// The gradients made in the forward, times dy: 1 where the loss itself is what backward() starts
// from.
Tensor times(const Tensor& grad, const Tensor& dy) {
  if (!grad.defined() || dy.device() == Device::Meta) return grad;
  if (dy.device() == Device::CPU && dy.item() == 1) return grad;
  Tensor scaled = reuse_or_empty(grad);
  backend_of(grad).scale_by(scaled, grad, dy);
  return scaled;
}

}  // namespace

Variable linear_cross_entropy(const Variable& hidden, const Variable& weight, const Tensor& labels,
                              double scale, Tensor* token_losses, int64_t chunk_rows,
                              const std::vector<LoraArguments>& adapters) {
  const char* op = "linear_cross_entropy";
  check_activation(op, "hidden", hidden, 2);
  CHECK(weight.defined() && weight.value().rank() == 2, op, ": weight must be (V, H)");
  CHECK(labels.defined() && labels.dtype() == DType::I32 && labels.rank() == 1 &&
            labels.device() == Device::CPU,
        op, ": labels must be I32 of rank 1 on the CPU");
  CHECK(labels.size(0) == hidden.shape()[0], op, ": hidden is ", hidden.shape(), " but labels is ",
        labels.shape());
  return linear_cross_entropy(hidden, weight, labelled_rows(labels, weight.shape()[0]), scale,
                              token_losses, chunk_rows, adapters);
}

Variable linear_cross_entropy(const Variable& hidden, const Variable& weight,
                              const LabelledRows& labelled, double scale, Tensor* token_losses,
                              int64_t chunk_rows, const std::vector<LoraArguments>& adapters) {
  const char* op = "linear_cross_entropy";
  check_activation(op, "hidden", hidden, 2);
  check_dense(op, "hidden", hidden);
  CHECK(weight.defined() && weight.value().rank() == 2, op, ": weight must be (V, H)");
  check_weight(op, "weight", weight, Shape{weight.shape()[0], hidden.shape()[1]}, hidden);
  check_indices(op, "rows", labelled.rows, hidden.value());
  check_indices(op, "labels", labelled.labels, hidden.value());
  CHECK(labelled.rows.size(0) == labelled.labels.size(0), op, ": ", labelled.rows.size(0),
        " rows but ", labelled.labels.size(0), " labels");
  if (chunk_rows == 0)
    chunk_rows = hidden.value().device() == Device::CUDA ? kLossChunkRowsGpu : kLossChunkRows;
  CHECK(chunk_rows > 0, op, ": chunk_rows is ", chunk_rows, ", wanted at least 1");
  const DType dtype = wide(hidden.value().dtype());
  for (const LoraArguments& lora : adapters) check_lora(op, hidden, weight, lora);
  Loss loss{hidden.value(), weight.value(), scale, {}, {}, {}, {}, {}};
  loss.total = Tensor::empty({}, DType::F64, hidden.value().device());
  backend_of(loss.total).fill(loss.total, 0);
  if (recording() && needs_grad(hidden))
    loss.dhidden = zeros_like(hidden.value(), hidden.value().dtype());
  if (recording() && needs_grad(weight)) loss.dweight = zeros_like(weight.value(), dtype);
  if (token_losses) {
    loss.token_losses = Tensor::empty({hidden.shape()[0]}, dtype, hidden.value().device());
    backend_of(hidden.value()).fill(loss.token_losses, 0);
    *token_losses = loss.token_losses;
  }
  for (const LoraArguments& lora : adapters)
    loss.adapters.push_back(make_adapter(loss, lora, loss.dhidden.defined()));
  // On the GPU once for all chunks; elsewhere row numbers stay on the CPU.
  const bool gpu = loss.hidden.device() == Device::CUDA;
  const Tensor rows = gpu ? labelled.rows.to(Device::CUDA, Scope::Scratch) : labelled.rows;
  const Tensor ids = gpu ? labelled.labels.to(Device::CUDA, Scope::Scratch) : labelled.labels;
  for (int64_t begin = 0; begin < rows.size(0); begin += chunk_rows) {
    const int64_t end = std::min(rows.size(0), begin + chunk_rows);
    add_chunk(loss, rows.slice_rows(begin, end), ids.slice_rows(begin, end));
  }
  std::vector<Variable> inputs = {hidden, weight};
  std::vector<Tensor> grads = {loss.dhidden, loss.dweight};
  for (HeadAdapter& adapter : loss.adapters) {
    finish(adapter, loss.dhidden);
    inputs.insert(inputs.end(), {adapter.lora.a, adapter.lora.b});
    grads.insert(grads.end(), {adapter.da, adapter.db});
  }
  return record(op, loss.total.to(dtype), std::move(inputs),
                [grads = std::move(grads)](const Tensor& dy, const Needs&) {
                  std::vector<Tensor> scaled;
                  for (const Tensor& grad : grads) scaled.push_back(times(grad, dy));
                  return scaled;
                });
}

}  // namespace graft::ops
