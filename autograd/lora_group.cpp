// lora_linear_group: linear layers that share their input, as one product; in the bordered layout
// the low-rank products are inside it. linear.cpp has the same for one layer, in plain terms.
#include <array>

#include "autograd/lora_parts.h"
#include "autograd/tape.h"

namespace graft::ops {

int64_t border_columns(const LoraGroup& group) {
  int64_t rank = 0;
  for (const LoraGroup::Layer& layer : group.layers)
    if (layer.lora.a.defined()) rank += layer.lora.a.shape()[0];
  return (rank + 7) / 8 * 8;
}

namespace {

// Where a layer with an adapter lies: its columns of y and rows of W, and its columns of S.
struct Place {
  int64_t out_begin, out_end, rank_begin, rank_end;
  LoraArguments lora;
};

// What the backward keeps. Of activations only those that a gradient is made from.
struct GroupSaved {
  Tensor weight, bordered;
  std::vector<Place> places;  // layers that have an adapter, in order
  int64_t rank = 0;           // of all adapters
  Tensor x;                   // (T, K)
  Tensor s;                   // bordered: (T, R), x A^T
  std::vector<Tensor> u;      // else, by place: (T, r_i), drop(x) A_i^T
};

std::vector<Place> places_of(const LoraGroup& group) {
  std::vector<Place> places;
  int64_t out = 0, rank = 0;
  for (const LoraGroup::Layer& layer : group.layers) {
    const int64_t begin = out;
    out += layer.out_features;
    if (!layer.lora.a.defined()) continue;
    const int64_t r = layer.lora.a.shape()[0];
    places.push_back({begin, out, rank, rank + r, layer.lora});
    rank += r;
  }
  return places;
}

void check_group(const Variable& x, const LoraGroup& group, const std::vector<Place>& places) {
  const char* op = "lora_linear_group";
  check_activation(op, "x", x, 2);
  const Variable weight(group.weight);
  CHECK(group.weight.defined() && group.weight.rank() == 2, op, ": weight must be (out, in)");
  const int64_t out = group.weight.size(0), in = group.weight.size(1);
  CHECK(x.shape()[1] == in, op, ": x is ", x.shape(), " but weight (out, in) is ",
        group.weight.shape());
  check_weight(op, "weight", weight, group.weight.shape(), x);
  if (group.bias.defined()) check_weight(op, "bias", Variable(group.bias), Shape{out}, x);
  int64_t rows = 0;
  for (const LoraGroup::Layer& layer : group.layers) rows += layer.out_features;
  CHECK(rows == out, op, ": the layers have ", rows, " rows but weight is ", group.weight.shape());
  for (const Place& place : places) {
    const LoraArguments& lora = place.lora;
    check_weight(op, "A", lora.a, Shape{place.rank_end - place.rank_begin, in}, x);
    check_weight(op, "B", lora.b,
                 Shape{place.out_end - place.out_begin, place.rank_end - place.rank_begin}, x);
    CHECK(lora.dropout_p >= 0 && lora.dropout_p < 1, op, ": dropout_p is ", lora.dropout_p,
          ", wanted 0 <= p < 1");
    CHECK(!group.bordered.defined() || lora.dropout_p == 0, op, ": dropout_p is ", lora.dropout_p,
          " but the layout is bordered, wanted 0");
  }
  if (!group.bordered.defined()) return;
  const int64_t border = border_columns(group);
  check_weight(op, "bordered", Variable(group.bordered), Shape{out + border, in + border}, x);
  CHECK(group.bordered.dtype() == x.value().dtype(), op, ": bordered is ",
        dtype_name(group.bordered.dtype()), " but x is ", dtype_name(x.value().dtype()));
}

// --- the bordered layout: every product reads a slice of one buffer
// --------------------------------

struct Border {
  Tensor whole;  // (N + R, K + R)
  int64_t out, in, columns;
  Tensor w() const { return whole.slice_rows(0, out).slice_cols(0, in); }              // (N, K)
  Tensor a() const { return whole.slice_rows(out, out + columns).slice_cols(0, in); }  // (R, K)
  Tensor b() const { return whole.slice_rows(0, out).slice_cols(in, in + columns); }   // (N, R)
  Tensor w_and_b() const { return whole.slice_rows(0, out); }                          // forward
  Tensor w_and_a() const { return whole.slice_cols(0, in); }                           // dX
};
Border border_of(const GroupSaved& saved) {
  const int64_t out = saved.weight.size(0), in = saved.weight.size(1);
  return {saved.bordered, out, in, saved.bordered.size(1) - in};
}

// The matrix with its spare columns: [m | spare]; undefined where it has too few.
Tensor widened(const Tensor& m, int64_t columns) {
  return m.spare_cols() >= columns ? m.widen_cols(columns) : Tensor();
}
Tensor last_columns(const Tensor& m, int64_t columns) {
  return m.slice_cols(m.cols() - columns, m.cols());
}
Tensor new_columns(const Tensor& like, int64_t columns) {
  return Tensor::empty({like.size(0), columns}, like.dtype(), like.device());
}

// S = x A^T;  y = [x | S] [W | B]^T + bias.
void bordered_forward(GroupSaved& saved, Tensor& y, const Tensor& x, const Tensor& bias) {
  const Border border = border_of(saved);
  const Tensor wide = widened(x, border.columns);
  saved.s = wide.defined() ? last_columns(wide, border.columns) : new_columns(x, border.columns);
  product(saved.s, {.a = x, .b = border.a(), .transpose_b = true});
  if (wide.defined()) {
    product(y, {.a = wide, .b = border.w_and_b(), .transpose_b = true}, {}, bias);
    return;
  }
  const std::array<GemmTerm, 2> terms{GemmTerm{.a = x, .b = border.w(), .transpose_b = true},
                                      GemmTerm{.a = saved.s, .b = border.b(), .transpose_b = true}};
  backend_of(y).gemm(y, terms, {}, bias);
}

// dS = dY B;  dX = [dY | dS] [W; A].
struct BorderedGrads {
  Tensor ds, dx;
};
BorderedGrads bordered_backward(const GroupSaved& saved, const Tensor& dy, bool needs_dx) {
  const Border border = border_of(saved);
  Tensor wide = widened(dy, border.columns), from = dy;
  if (!wide.defined() && border.out < border.in) {
    // To copy dY costs 2 N elements a row; to add the second product to dX, 2 K.
    from = Tensor::with_spare_cols(dy.size(0), border.out, border.columns, dy.dtype(), dy.device(),
                                   Scope::Scratch);
    backend_of(dy).copy(from, dy);
    wide = widened(from, border.columns);
  }
  BorderedGrads grads;
  grads.ds = wide.defined() ? last_columns(wide, border.columns) : new_columns(dy, border.columns);
  product(grads.ds, {.a = from, .b = border.b()});
  if (!needs_dx) return grads;
  grads.dx = Tensor::empty({dy.size(0), border.in}, dy.dtype(), dy.device());
  if (wide.defined()) {
    product(grads.dx, {.a = wide, .b = border.w_and_a()});
  } else {
    const std::array<GemmTerm, 2> terms{GemmTerm{.a = dy, .b = border.w()},
                                        GemmTerm{.a = grads.ds, .b = border.a()}};
    backend_of(dy).gemm(grads.dx, terms);
  }
  return grads;
}

// dA of all layers is one product, rows of which are theirs; dB one of which the blocks of the
// diagonal are. Gradients come in the order x, A_0, B_0, A_1, ...
std::vector<Tensor> bordered_gradients(const GroupSaved& saved, const Tensor& dy,
                                       const Needs& needs) {
  bool needs_a = false, needs_b = false;
  for (size_t i = 0; i < saved.places.size(); ++i) {
    needs_a = needs_a || needs[1 + 2 * i];
    needs_b = needs_b || needs[2 + 2 * i];
  }
  std::vector<Tensor> grads(needs.size());
  Backend& backend = backend_of(dy);
  BorderedGrads low_rank;
  if (needs[0] || needs_a) low_rank = bordered_backward(saved, dy, needs[0]);
  grads[0] = low_rank.dx;
  Tensor da, db;
  if (needs_a) {
    da = Tensor::empty({saved.rank, saved.weight.size(1)}, wide(dy.dtype()), dy.device());
    product(da, {.a = low_rank.ds.slice_cols(0, saved.rank), .b = saved.x, .transpose_a = true});
  }
  const double scaling = saved.places.empty() ? 1 : saved.places[0].lora.scaling;
  if (needs_b) {
    db = Tensor::empty({saved.weight.size(0), saved.rank}, wide(dy.dtype()), dy.device());
    product(
        db,
        {.a = dy, .b = saved.s.slice_cols(0, saved.rank), .transpose_a = true, .alpha = scaling});
  }
  for (size_t i = 0; i < saved.places.size(); ++i) {
    const Place& p = saved.places[i];
    if (needs[1 + 2 * i]) grads[1 + 2 * i] = da.slice_rows(p.rank_begin, p.rank_end);
    if (!needs[2 + 2 * i]) continue;
    Tensor block = db.slice_rows(p.out_begin, p.out_end).slice_cols(p.rank_begin, p.rank_end);
    if (p.lora.scaling != scaling) backend.scale(block, block, p.lora.scaling / scaling);
    grads[2 + 2 * i] = block;
  }
  return grads;
}

// --- the merged layout: one base product, the low-rank ones of each layer beside it
// ---------------

// y = x W^T + bias;  u_i = drop(x) A_i^T;  the columns of layer i += s_i u_i B_i^T.
void merged_forward(GroupSaved& saved, Tensor& y, const Tensor& x, const Tensor& bias) {
  product(y, {.a = x, .b = saved.weight, .transpose_b = true}, {}, bias);
  for (const Place& p : saved.places) {
    Tensor u = Tensor::empty({x.size(0), p.rank_end - p.rank_begin}, low_rank_dtype(x), x.device());
    product(u, {.a = dropped(x, p.lora.dropout_p, p.lora.key),
                .b = p.lora.a.value(),
                .transpose_b = true});
    Tensor columns = y.slice_cols(p.out_begin, p.out_end);
    product(columns, {.a = u, .b = p.lora.b.value(), .transpose_b = true, .alpha = p.lora.scaling},
            columns);
    saved.u.push_back(needs_grad(p.lora.b) ? u : Tensor());
  }
}

// dx += drop'(du A).
void add_low_rank_grad(Tensor& dx, const Tensor& du, const LoraArguments& lora) {
  const GemmTerm term{.a = du, .b = lora.a.value()};
  if (lora.dropout_p == 0) return product(dx, term, dx);
  Tensor low_rank = empty_like(dx, Scope::Scratch);
  product(low_rank, term);
  backend_of(dx).dropout(dx, low_rank, lora.dropout_p, lora.key, true);
}

std::vector<Tensor> merged_gradients(const GroupSaved& saved, const Tensor& dy,
                                     const Needs& needs) {
  std::vector<Tensor> grads(needs.size());
  if (needs[0]) {
    grads[0] = Tensor::empty({dy.size(0), saved.weight.size(1)}, dy.dtype(), dy.device());
    product(grads[0], {.a = dy, .b = saved.weight});
  }
  for (size_t i = 0; i < saved.places.size(); ++i) {
    const Place& p = saved.places[i];
    const Tensor dy_i = dy.slice_cols(p.out_begin, p.out_end);
    const auto parameter = [&](const Variable& like) {
      return Tensor::empty(like.shape(), wide(dy.dtype()), dy.device());
    };
    if (needs[2 + 2 * i]) {
      grads[2 + 2 * i] = parameter(p.lora.b);
      product(grads[2 + 2 * i],
              {.a = dy_i, .b = saved.u[i], .transpose_a = true, .alpha = p.lora.scaling});
    }
    if (!needs[0] && !needs[1 + 2 * i]) continue;
    Tensor du = Tensor::empty({dy.size(0), p.rank_end - p.rank_begin}, low_rank_dtype(dy),
                              dy.device(), Scope::Scratch);
    product(du, {.a = dy_i, .b = p.lora.b.value(), .alpha = p.lora.scaling});
    if (needs[1 + 2 * i]) {
      grads[1 + 2 * i] = parameter(p.lora.a);
      product(grads[1 + 2 * i],
              {.a = du, .b = dropped(saved.x, p.lora.dropout_p, p.lora.key), .transpose_a = true});
    }
    if (needs[0]) add_low_rank_grad(grads[0], du, p.lora);
  }
  return grads;
}

}  // namespace

Variable lora_linear_group(const Variable& x, const LoraGroup& group) {
  GroupSaved saved;
  saved.places = places_of(group);
  check_group(x, group, saved.places);
  saved.weight = group.weight;
  saved.rank = saved.places.empty() ? 0 : saved.places.back().rank_end;
  if (saved.rank > 0) saved.bordered = group.bordered;
  const bool bordered = saved.bordered.defined();
  const Tensor& in = x.value();
  Tensor y = Tensor::with_spare_cols(in.size(0), group.weight.size(0),
                                     bordered && group.wide_output ? border_columns(group) : 0,
                                     in.dtype(), in.device());
  if (bordered)
    bordered_forward(saved, y, in, group.bias);
  else
    merged_forward(saved, y, in, group.bias);

  std::vector<Variable> inputs{x};
  bool needs_a = false, needs_b = false;
  for (Place& p : saved.places) {
    inputs.push_back(p.lora.a);
    inputs.push_back(p.lora.b);
    needs_a = needs_a || needs_grad(p.lora.a);
    needs_b = needs_b || needs_grad(p.lora.b);
  }
  if (needs_a) saved.x = in;
  if (!needs_b) saved.s = Tensor();
  return record("lora_linear_group", std::move(y), std::move(inputs),
                [saved = std::move(saved)](const Tensor& dy, const Needs& needs) {
                  return saved.bordered.defined() ? bordered_gradients(saved, dy, needs)
                                                  : merged_gradients(saved, dy, needs);
                });
}

}  // namespace graft::ops
