#include "models/adapter_stack.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "autograd/tape.h"
#include "models/replaced_parameters.h"

namespace graft {
namespace {

// Biases and whole modules of an adapter stand in the place of the base's: alone and as they are.
void check_replaced(const Decoder& model, const AdapterFile& file, double weight) {
  CHECK(weight == 1 || file.replaced.empty(), file.directory, ": has its own '",
        file.replaced.empty() ? "" : file.replaced[0].first, "' in the place of the base's, so ",
        "its weight must be 1, and is ", weight);
  for (const auto& [name, own] : file.replaced)
    for (const ReplacedParameter& other : model.replaced)
      CHECK(other.name != name, file.directory, ": has its own '", name,
            "', and so has another adapter on the model; take one of the two");
}

// From one number of an adapter to another.
void renumber(Decoder& model, int64_t from, int64_t to) {
  for (ReplacedParameter& one : model.replaced)
    if (one.adapter == from) one.adapter = to;
}
constexpr int64_t kAside = -1;

}  // namespace

int64_t AdapterStack::attach(const std::string& directory, double weight,
                             const AdapterChecks& checks) {
  return put_on(read_adapter(directory), weight, checks);
}

int64_t AdapterStack::put_on(const AdapterFile& file, double weight, const AdapterChecks& checks) {
  CHECK(std::isfinite(weight), file.directory, ": the adapter's weight is ", weight,
        ", expected a number");
  check_replaced(model_, file, weight);
  // attach_adapter puts it where the trained one is; that one steps aside for a moment.
  const std::vector<NamedLinear> layers = adaptable_layers(model_);
  std::vector<std::unique_ptr<LoraPair>> trained;
  for (const NamedLinear& layer : layers) trained.push_back(std::move(layer.linear->lora));
  std::optional<TokenRows> trained_tokens = std::move(model_.embed_tokens.tokens);
  model_.embed_tokens.tokens.reset();
  renumber(model_, 0, kAside);
  const auto put_back = [&] {
    for (size_t i = 0; i < layers.size(); ++i) layers[i].linear->lora = std::move(trained[i]);
    model_.embed_tokens.tokens = std::move(trained_tokens);
    renumber(model_, kAside, 0);
  };
  try {
    attach_adapter(model_, file, checks);
  } catch (...) {
    put_back();
    throw;
  }
  const int64_t id = next_id_++;
  const auto freeze = [&](Linear& linear, LoraPair pair) {
    pair.dropout_p = 0;
    pair.a = Variable(pair.a.value());  // constants from now on
    pair.b = Variable(pair.b.value());
    if (pair.magnitude.defined()) pair.magnitude = Variable(pair.magnitude.value());
    linear.stack.push_back({id, std::move(pair), weight});
    linear.restack();
  };
  for (const NamedLinear& layer : layers)
    if (layer.linear->lora) freeze(*layer.linear, std::move(*layer.linear->lora));
  if (model_.embed_tokens.tokens) {
    const NoRecord off;
    const ops::LoraArguments rows = model_.embed_tokens.tokens->pair();
    LoraPair pair;
    pair.a = rows.a;
    pair.b = rows.b;
    freeze(model_.embed_tokens, pair);
    if (model_.is_tied()) freeze(model_.lm_head, pair);
  }
  renumber(model_, 0, id);
  for (ReplacedParameter& one : model_.replaced)
    if (one.adapter == id) one.own = Variable(one.own.value());
  show_replaced(model_, id, true);
  put_back();
  return id;
}

template <class Change>
void AdapterStack::change(int64_t id, Change change) {
  bool found = false;
  for (const NamedLinear& layer : adaptable_layers(model_)) {
    auto& stack = layer.linear->stack;
    bool here = false;
    for (size_t i = stack.size(); i-- > 0;) {
      if (stack[i].id != id) continue;
      here = true;
      change(stack, i);
    }
    if (here) layer.linear->restack();
    found = found || here;
  }
  CHECK(found, "adapter stack: no adapter ", id, " is on the model");
}

void AdapterStack::set_weight(int64_t id, double weight) {
  CHECK(std::isfinite(weight), "adapter stack: the weight is ", weight, ", expected a number");
  for (const ReplacedParameter& one : model_.replaced)
    CHECK(one.adapter != id || weight == 0 || weight == 1, "adapter stack: adapter ", id,
          " has its own '", one.name, "', so its weight must be 1, or 0 for off, and is ", weight);
  change(id, [weight](auto& stack, size_t i) { stack[i].weight = weight; });
  show_replaced(model_, id, weight == 1);
}

void AdapterStack::detach(int64_t id) {
  change(id, [](auto& stack, size_t i) { stack.erase(stack.begin() + std::ptrdiff_t(i)); });
  restore_parameters(model_, id);
}

AdapterChoice parse_adapter_choice(const std::string& text) {
  namespace fs = std::filesystem;
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || fs::exists(text)) return {text, 1};
  const std::string path = text.substr(0, colon), number = text.substr(colon + 1);
  char* end = nullptr;
  const double weight = std::strtod(number.c_str(), &end);
  const bool is_number = !number.empty() && *end == '\0' && !std::isspace(uint8_t(number[0]));
  if (!is_number || !fs::exists(path)) return {text, 1};
  CHECK(std::isfinite(weight), "adapter: '", text, "' has the weight ", number,
        ", expected a finite number");
  return {path, weight};
}

}  // namespace graft
