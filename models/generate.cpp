#include "models/generate.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>
#include <set>

#include "autograd/tape.h"
#include "models/json_file.h"
#include "tensor/backend.h"
#include "tensor/finite.h"

namespace graft {
namespace {

constexpr float kFiltered = -std::numeric_limits<float>::infinity();

// eos_token_id is a number, a list of numbers, or absent.
std::vector<int32_t> read_eos(const JsonReader& reader) {
  std::vector<int32_t> ids;
  if (!reader.has("eos_token_id")) return ids;
  const nlohmann::json& value = reader.object()["eos_token_id"];
  const auto add = [&](const nlohmann::json& id) {
    CHECK(id.is_number_integer() && id.get<double>() >= 0 && id.get<double>() < 2147483648.0,
          reader.path(), ": eos_token_id is ", value.dump(), ", wanted token ids");
    ids.push_back(id.get<int32_t>());
  };
  if (value.is_array())
    std::for_each(value.begin(), value.end(), add);
  else
    add(value);
  return ids;
}

// Ids by falling logit, equal ones by id, so that the order is the same on every machine.
std::vector<int32_t> by_falling_logit(const std::vector<float>& logits) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](int32_t id) { return logits[size_t(id)] == kFiltered; });
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return logits[size_t(a)] > logits[size_t(b)]; });
  return order;
}

// exp(logit - largest) and their sum.
double exponentials(const std::vector<float>& logits, std::vector<double>& weights) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  weights.resize(logits.size());
  double sum = 0;
  for (size_t i = 0; i < logits.size(); ++i)
    sum += weights[i] = logits[i] == kFiltered ? 0 : std::exp(double(logits[i]) - largest);
  return sum;
}

void keep_top_k(std::vector<float>& logits, int64_t top_k) {
  if (top_k >= int64_t(logits.size())) return;
  std::vector<float> sorted = logits;
  std::nth_element(sorted.begin(), sorted.begin() + (top_k - 1), sorted.end(), std::greater<>());
  const float least = sorted[size_t(top_k - 1)];  // its equals stay, as in transformers
  for (float& logit : logits)
    if (logit < least) logit = kFiltered;
}

// Keeps the most probable tokens up to the one that takes their sum to top_p: from the least
// probable on, a token goes while the sum of it and all below is at most 1 - top_p.
void keep_top_p(std::vector<float>& logits, double top_p) {
  std::vector<double> weights;
  const double sum = exponentials(logits, weights);
  const std::vector<int32_t> order = by_falling_logit(logits);
  double below = 0;
  for (size_t i = order.size(); i-- > 1;) {  // the best one always stays
    below += weights[size_t(order[i])] / sum;
    if (below > 1 - top_p) break;
    logits[size_t(order[i])] = kFiltered;
  }
}

void keep_min_p(std::vector<float>& logits, double min_p) {
  std::vector<double> weights;  // that of the best is 1
  exponentials(logits, weights);
  for (size_t i = 0; i < logits.size(); ++i)
    if (weights[i] < min_p) logits[i] = kFiltered;
}

// Room for more tokens behind those that are there. The cache starts small and doubles, since
// max_new_tokens may be far more than a text has.
void grow(Decoder& model, KvCache& cache, int64_t tokens) {
  if (cache.length + tokens <= cache.capacity) return;
  KvCache larger = model.make_cache(std::max(2 * cache.capacity, cache.length + tokens + 128));
  for (size_t i = 0; i < cache.k.size(); ++i)
    for (auto [to, from] : {std::pair{&larger.k[i], &cache.k[i]}, {&larger.v[i], &cache.v[i]}}) {
      Tensor room = to->slice_rows(0, cache.length);
      backend_of(room).copy(room, from->slice_rows(0, cache.length));
    }
  larger.length = cache.length;
  cache = std::move(larger);
}

bool is_greedy(const GenerationConfig& config) {
  return !config.do_sample || config.temperature == 0;
}

int32_t pick(const std::vector<float>& logits, const GenerationConfig& config, Random& random) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (is_greedy(config)) return int32_t(best - logits.begin());
  std::vector<double> weights;
  double left = exponentials(logits, weights) * random.uniform();
  int32_t last = int32_t(best - logits.begin());
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0) continue;
    last = int32_t(i);
    left -= weights[i];
    if (left < 0) break;
  }
  return last;
}

// The next id from the logits (1, V) of the last token. A greedy choice is made where they are, and
// one number comes to the host; else the row does.
int32_t next_id(const Tensor& logits, const std::vector<int32_t>& all,
                const GenerationConfig& config, Random& random) {
  if (is_greedy(config) && config.repetition_penalty == 1) {
    Tensor id = Tensor::empty({1}, DType::I32, logits.device());
    backend_of(logits).argmax_rows(id, logits);
    return *id.to(Device::CPU).data<int32_t>();
  }
  const Tensor row = logits.to(DType::F32).to(Device::CPU);
  std::vector<float> values(row.data<float>(), row.data<float>() + row.num_elements());
  process_logits(values, all, config);
  return pick(values, config, random);
}

}  // namespace

GenerationConfig GenerationConfig::load(const std::string& model_dir) {
  GenerationConfig config;
  config.do_sample = false;  // transformers' default, where a model does not ask for sampling
  const std::filesystem::path directory(model_dir);
  const std::string path = (directory / "generation_config.json").string();
  if (std::filesystem::exists(path)) {
    const nlohmann::json json = read_json_object(path);
    const JsonReader reader(path, json);
    config.do_sample = reader.boolean("do_sample", config.do_sample);
    config.temperature = reader.number("temperature", config.temperature);
    config.top_k = int64_t(reader.number("top_k", double(config.top_k)));
    config.top_p = reader.number("top_p", config.top_p);
    config.min_p = reader.number("min_p", config.min_p);
    config.repetition_penalty = reader.number("repetition_penalty", config.repetition_penalty);
    if (reader.has("max_new_tokens")) config.max_new_tokens = reader.size("max_new_tokens");
    config.eos_token_ids = read_eos(reader);
    CHECK(config.temperature >= 0 && config.top_k >= 0 && config.top_p >= 0 && config.min_p >= 0 &&
              config.repetition_penalty > 0,
          path, ": temperature, top_k, top_p, min_p or repetition_penalty is out of range");
  }
  const std::string model_config = (directory / "config.json").string();
  if (config.eos_token_ids.empty() && std::filesystem::exists(model_config)) {
    const nlohmann::json json = read_json_object(model_config);
    config.eos_token_ids = read_eos(JsonReader(model_config, json));
  }
  return config;
}

void process_logits(std::vector<float>& logits, const std::vector<int32_t>& previous_ids,
                    const GenerationConfig& config) {
  if (config.repetition_penalty != 1) {
    const float penalty = float(config.repetition_penalty);
    for (const int32_t id : std::set<int32_t>(previous_ids.begin(), previous_ids.end())) {
      CHECK(id >= 0 && size_t(id) < logits.size(), "generate: token id ", id, " of ",
            logits.size());
      float& logit = logits[size_t(id)];
      logit = logit < 0 ? logit * penalty : logit / penalty;
    }
  }
  if (is_greedy(config)) return;  // the largest stays the largest
  if (config.temperature != 1)
    for (float& logit : logits) logit /= float(config.temperature);
  if (config.top_k > 0) keep_top_k(logits, config.top_k);
  if (config.top_p < 1) keep_top_p(logits, config.top_p);
  if (config.min_p > 0) keep_min_p(logits, config.min_p);
}

std::vector<int32_t> generate(Decoder& model, const std::vector<int32_t>& prompt_ids,
                              const GenerationConfig& config,
                              const std::function<bool(int32_t)>& on_token) {
  CHECK(!prompt_ids.empty(), "generate: the prompt has no tokens");
  NoRecord off;
  Random random(config.seed);
  std::vector<int32_t> all = prompt_ids, next = prompt_ids, made;
  KvCache cache;
  while (int64_t(made.size()) < config.max_new_tokens) {
    grow(model, cache, int64_t(next.size()));
    const Tensor hidden = model.forward_cached(next, cache);
    const int64_t last = hidden.size(0) - 1;
    const Tensor logits = model.logits(hidden.slice_rows(last, last + 1));
    // Weights out of range give NaN, of which any token might be called the best.
    CHECK(!made.empty() || all_finite(logits.to(Device::CPU)),
          "generate: the model gives logits that are not finite; are its weights, or those of the "
          "adapters (DIR:WEIGHT), out of range?");
    const int32_t id = next_id(logits, all, config, random);
    all.push_back(id);
    made.push_back(id);
    next = {id};
    const bool on = !on_token || on_token(id);
    const auto& eos = config.eos_token_ids;
    if (!on || std::find(eos.begin(), eos.end(), id) != eos.end()) break;
  }
  return made;
}

}  // namespace graft
