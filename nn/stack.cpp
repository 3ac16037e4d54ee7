// Frozen adapters of a linear layer as one: with g_i = m_i / n_i by row for DoRA and 1 for LoRA,
//   sum_i w_i (W'_i - W) x = e W x + B A x,   e = sum_i w_i (g_i - 1)
//   B = [w_1 s_1 g_1 B_1 | w_2 s_2 g_2 B_2 | ...]   A = [A_1; A_2; ...]
// e and g being numbers of the rows. e is zero without DoRA.
#include "nn/linear.h"
#include "tensor/backend.h"

namespace graft {
namespace {

std::vector<float> floats_of(const Tensor& t) {
  const std::vector<double> values = t.to(Device::CPU).to_doubles();
  return {values.begin(), values.end()};
}

// g of every row; 0 where the norm is 0, as in ops::dora_linear.
std::vector<float> row_factors(const LoraPair& pair, int64_t rows) {
  if (!pair.magnitude.defined()) return std::vector<float>(size_t(rows), 1.0f);
  std::vector<float> g = floats_of(pair.magnitude.value());
  const std::vector<float> norm = floats_of(pair.norm);
  for (size_t i = 0; i < g.size(); ++i) g[i] = norm[i] == 0 ? 0 : g[i] / norm[i];
  return g;
}

ops::DoraFactor factor_on(const std::vector<float>& rows, double plus, Device device) {
  std::vector<double> values;
  for (const float e : rows) values.push_back(double(e) + plus);
  const auto on_device = [&](const std::vector<double>& numbers) {
    return Tensor::from_floats({int64_t(numbers.size())}, numbers, DType::F32)
        .to(device, Scope::Adapters);
  };
  return {Variable(on_device(values)), on_device(std::vector<double>(values.size(), 1))};
}

}  // namespace

void Linear::restack() {
  stacked_ = {};
  stacked_rows_ = stacked_excess_ = {};
  int64_t rank = 0, members = 0;
  bool dora = false;
  for (const StackedAdapter& one : stack) {
    if (one.weight == 0) continue;
    ++members;
    rank += one.pair.a.shape()[0];
    dora = dora || one.pair.magnitude.defined();
    stacked_ = one.pair;  // if it stays the only one, its bytes are used as they are
    stacked_.scaling *= one.weight;
  }
  if (members == 0 || (members == 1 && !dora)) return;
  const Device device = stacked_.a.value().device();
  const int64_t in = in_features(), out = out_features();
  Tensor a = Tensor::empty({rank, in}, DType::F32, Device::CPU, Scope::Adapters);
  Tensor b = Tensor::empty({out, rank}, DType::F32, Device::CPU, Scope::Adapters);
  std::vector<float> excess(size_t(out), 0.0f);
  int64_t begin = 0;
  for (const StackedAdapter& one : stack) {
    if (one.weight == 0) continue;
    const int64_t r = one.pair.a.shape()[0];
    Tensor rows = a.slice_rows(begin, begin + r);
    backend_of(a).copy(rows, one.pair.a.value().to(Device::CPU));
    const std::vector<float> from = floats_of(one.pair.b.value()), g = row_factors(one.pair, out);
    for (int64_t n = 0; n < out; ++n) {
      const double factor = one.weight * one.pair.scaling * g[size_t(n)];
      for (int64_t k = 0; k < r; ++k)
        b.data<float>()[n * rank + begin + k] = float(factor * from[size_t(n * r + k)]);
      excess[size_t(n)] += float(one.weight * (double(g[size_t(n)]) - 1));
    }
    begin += r;
  }
  stacked_ = {};
  stacked_.a = Variable(a.to(device, Scope::Adapters));
  stacked_.b = Variable(b.to(device, Scope::Adapters));
  if (!dora) return;
  stacked_rows_ = factor_on(excess, 1, device);
  stacked_excess_ = factor_on(excess, 0, device);
}

Variable Linear::stacked_forward(const Variable& x) const {
  if (!stacked_rows_.magnitude.defined())
    return ops::lora_linear(x, weight, bias, {stacked_.a, stacked_.b, stacked_.scaling, 0, {}});
  const Variable scaled = ops::scale_columns(ops::linear(x, weight), stacked_rows_, bias);
  return ops::add_low_rank(scaled, x, stacked_.a.value(), stacked_.b.value(), stacked_.scaling);
}

Variable Linear::add_stacked(const Variable& y, const Variable& x) const {
  const Variable sum =
      ops::add_low_rank(y, x, stacked_.a.value(), stacked_.b.value(), stacked_.scaling);
  if (!stacked_excess_.magnitude.defined()) return sum;
  return ops::add(sum, ops::scale_columns(ops::linear(x, weight), stacked_excess_));
}

}  // namespace graft
