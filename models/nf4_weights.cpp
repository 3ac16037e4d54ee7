#include "models/nf4_weights.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "tensor/backend.h"
#include "tensor/blockwise8.h"
#include "tensor/finite.h"
#include "tensor/nf4.h"

namespace graft {
namespace {

constexpr const char* kState = ".quant_state.bitsandbytes__nf4";

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scales in 8 bits have scales of their own. Any of the parts tells, lest one that is missing make
// the others look wrong.
bool scales_are_quantised(const BitsandbytesWeight::Files& files, const std::string& name) {
  return files.has(name + ".nested_absmax") || files.has(name + ".nested_quant_map") ||
         (files.has(name + ".absmax") && files.tensor(name + ".absmax").dtype() == DType::U8);
}

}  // namespace

bool BitsandbytesWeight::is_there(const Files& files, const std::string& name) {
  const std::string fp4 = name + ".quant_state.bitsandbytes__fp4";
  CHECK(!files.has(fp4), files.has(fp4) ? files.path(fp4) : "", ": tensor '", name,
        "' is quantised to fp4; nf4 is supported, or take the unquantised model");
  const std::string int8 = name.substr(0, name.rfind('.')) + ".SCB";
  CHECK(!files.has(int8), files.has(int8) ? files.path(int8) : "", ": tensor '", name,
        "' is quantised to int8; nf4 is supported, or take the unquantised model");
  if (files.has(name + kState)) return true;
  const std::string absmax = name + ".absmax";
  CHECK(!files.has(absmax), files.has(absmax) ? files.path(absmax) : "", ": tensor '", name, kState,
        "' is missing, but '", absmax, "' is there; nf4 is supported, or download the file again");
  return false;
}

BitsandbytesWeight::BitsandbytesWeight(const Files& files, const std::string& name, Shape shape)
    : files_(files), name_(name), shape_(shape) {
  const int64_t elements = shape.num_elements(), blocks = divide_up(elements, kNf4Block);
  codes_ = part("", DType::U8, divide_up(elements, 2));
  nested_ = scales_are_quantised(files, name);
  absmax_ = part(".absmax", nested_ ? DType::U8 : DType::F32, blocks);
  const Tensor values = part(".quant_map", DType::F32, 16);
  CHECK(std::memcmp(values.raw(), kNf4Values, sizeof kNf4Values) == 0, files.path(name),
        ": tensor '", name, ".quant_map' is not the map of nf4");
  if (nested_) {
    scales_ = part(".nested_absmax", DType::F32, num_blocks8(blocks));
    map_ = part(".nested_quant_map", DType::F32, 256);
  }
  read_state(part(kState, DType::U8, -1));
  for (const Tensor& floats : {nested_ ? scales_ : absmax_, map_})
    CHECK(!floats.defined() || all_finite(floats), files.path(name), ": the scales of '", name,
          "' hold NaN or infinity; the file is damaged, download it again");
}

// elements -1: any number.
Tensor BitsandbytesWeight::part(const std::string& suffix, DType dtype, int64_t elements) {
  const std::string name = name_ + suffix;
  CHECK(files_.has(name), files_.path(name_ + kState), ": tensor '", name,
        "' is missing, a part of the NF4 weight '", name_, "'");
  const Tensor tensor = files_.tensor(name);
  CHECK(tensor.dtype() == dtype, files_.path(name), ": tensor '", name, "' has the dtype ",
        dtype_name(tensor.dtype()), ", a part of an NF4 weight wants ", dtype_name(dtype));
  CHECK(elements < 0 || tensor.num_elements() == elements, files_.path(name), ": tensor '", name,
        "' has ", tensor.num_elements(), " elements, an NF4 weight of ", shape_,
        " in blocks of 64 wants ", elements);
  parts_.push_back(name);
  return tensor;
}

void BitsandbytesWeight::read_state(const Tensor& text) {
  const auto* bytes = text.data<char>();
  const auto state = nlohmann::json::parse(bytes, bytes + text.num_elements(), nullptr,
                                           /*allow_exceptions=*/false);
  const std::string where = files_.path(name_ + kState) + ": tensor '" + name_ + kState + "'";
  CHECK(state.is_object(), where, " is not a JSON object");
  const auto want = [&](const char* key, const nlohmann::json& wanted) {
    CHECK(state.contains(key) && state[key] == wanted, where, " has ", key, " ",
          state.contains(key) ? state[key].dump() : "missing", ", wanted ", wanted.dump());
  };
  want("quant_type", "nf4");
  want("blocksize", kNf4Block);
  nlohmann::json sizes = nlohmann::json::array();
  for (int i = 0; i < shape_.rank(); ++i) sizes.push_back(shape_[i]);
  want("shape", sizes);
  if (!nested_) return;
  want("nested_blocksize", kBlock8);
  CHECK(state.contains("nested_offset") && state["nested_offset"].is_number(), where,
        " has no nested_offset");
  const double offset = state["nested_offset"].get<double>();
  CHECK(std::fabs(offset) <= std::numeric_limits<float>::max(), where, " has nested_offset ",
        offset, ", wanted the mean of the scales; the file is damaged, download it again");
  offset_ = float(offset);
}

int64_t BitsandbytesWeight::num_bytes() const {
  return nf4_bytes(shape_.num_elements(), nested_ ? DType::NF4 : DType::NF4Single);
}

Tensor BitsandbytesWeight::load() const {
  Tensor weight =
      Tensor::zeros(shape_, nested_ ? DType::NF4 : DType::NF4Single, Device::CPU, Scope::Weights);
  const Nf4View view = nf4_view(weight);
  const auto copy = [](void* to, const Tensor& from) {
    std::memcpy(to, from.raw(), size_t(from.num_bytes()));
  };
  copy(view.codes, codes_);
  if (!nested_) {
    copy(view.absmax, absmax_);
    return weight;
  }
  copy(view.absmax_codes, absmax_);
  copy(view.scales, scales_);
  copy(view.map, map_);
  view.map[256] = offset_;
  return weight;
}

void quantise_model(Decoder& model, bool double_quant) {
  for (auto& [name, linear] : linear_layers(model)) {
    if (name == "lm_head") continue;
    const Tensor& dense = linear->weight.value();
    const Device device = dense.device();
    const Device made_on = device == Device::CUDA ? Device::CPU : device;
    linear->weight.set_value(
        nf4_quantise(dense.to(made_on, Scope::Weights), double_quant).to(device, Scope::Weights));
  }
}

bool has_nf4_weights(Decoder& model) {
  bool found = false;
  for (auto& [name, linear] : linear_layers(model))
    found = found || is_nf4(linear->weight.value().dtype());
  return found;
}

}  // namespace graft
