#include "models/adapter_stack.h"

#include "autograd/tape.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>

namespace graft {

int64_t AdapterStack::attach(const std::string& directory, double weight,
                             const AdapterChecks& checks) {
  return put_on(read_adapter(directory), weight, checks);
}

int64_t AdapterStack::put_on(const AdapterFile& file, double weight, const AdapterChecks& checks) {
  CHECK(std::isfinite(weight), file.directory, ": the adapter's weight is ", weight,
        ", expected a number");
  // attach_adapter puts it where the trained one is; that one steps aside for a moment.
  const std::vector<NamedLinear> layers = adaptable_layers(model_);
  std::vector<std::unique_ptr<LoraPair>> trained;
  for (const NamedLinear& layer : layers) trained.push_back(std::move(layer.linear->lora));
  std::optional<TokenRows> trained_tokens = std::move(model_.embed_tokens.tokens);
  model_.embed_tokens.tokens.reset();
  const auto put_back = [&] {
    for (size_t i = 0; i < layers.size(); ++i) layers[i].linear->lora = std::move(trained[i]);
    model_.embed_tokens.tokens = std::move(trained_tokens);
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
    if (model_.config().tie_word_embeddings) freeze(model_.lm_head, pair);
  }
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
  change(id, [weight](auto& stack, size_t i) { stack[i].weight = weight; });
}

void AdapterStack::detach(int64_t id) {
  change(id, [](auto& stack, size_t i) { stack.erase(stack.begin() + std::ptrdiff_t(i)); });
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
