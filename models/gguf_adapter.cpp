// The format: ggml's docs/gguf.md, version 3, little endian. Magic, version, the numbers of tensors
// and of keys, the keys, what is said of each tensor, and their bytes, each on a multiple of 32.
#include "models/gguf_adapter.h"

#include <cstring>
#include <map>

#include "tensor/safetensors.h"

namespace graft {
namespace {

constexpr size_t kAlignment = 32;
constexpr uint32_t kVersion = 3, kTypeUint32 = 4, kTypeFloat32 = 6, kTypeString = 8, kGgmlF32 = 0;

class Bytes {
 public:
  template <class T>
  void number(T value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void string(const std::string& value) {
    number(uint64_t(value.size()));
    text_ += value;
  }
  void key(const std::string& name, const std::string& value) {
    string(name);
    number(kTypeString);
    string(value);
  }
  void key(const std::string& name, uint32_t value) {
    string(name);
    number(kTypeUint32);
    number(value);
  }
  void key(const std::string& name, float value) {
    string(name);
    number(kTypeFloat32);
    number(value);
  }
  void pad() { text_.resize((text_.size() + kAlignment - 1) / kAlignment * kAlignment, '\0'); }
  std::string& text() { return text_; }

 private:
  std::string text_;
};

std::string architecture(const ModelConfig& model) {
  static const std::map<std::string, std::string> names = {
      {"LlamaForCausalLM", "llama"}, {"Qwen2ForCausalLM", "qwen2"}, {"Qwen3ForCausalLM", "qwen3"}};
  return names.at(model.architecture);
}

// "blk.3.attn_q.weight" for model.layers.3.self_attn.q_proj.
std::string gguf_name(const std::string& module) {
  static const std::map<std::string, std::string> names = {
      {"self_attn.q_proj", "attn_q"}, {"self_attn.k_proj", "attn_k"},
      {"self_attn.v_proj", "attn_v"}, {"self_attn.o_proj", "attn_output"},
      {"mlp.gate_proj", "ffn_gate"},  {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"}};
  const std::string prefix = "model.layers.";
  const size_t dot = module.find('.', prefix.size());
  const auto found = module.starts_with(prefix) && dot != std::string::npos
                         ? names.find(module.substr(dot + 1))
                         : names.end();
  CHECK(found != names.end(), "convert: ", module,
        " has no name in GGUF; the seven projections of ", "the layers have");
  return "blk." + module.substr(prefix.size(), dot - prefix.size()) + "." + found->second +
         ".weight";
}

// Rows (out, r) in the order in which llama.cpp rotates: row 2 i + half of a head is Hugging Face's
// row half * D / 2 + i.
Tensor permuted_heads(const Tensor& b, int64_t heads) {
  const int64_t head = b.size(0) / heads, r = b.size(1);
  Tensor result = Tensor::empty(b.shape(), DType::F32, Device::CPU, Scope::Adapters);
  for (int64_t row = 0; row < b.size(0); ++row) {
    const int64_t within = row % head, from = row - within + within % 2 * (head / 2) + within / 2;
    std::memcpy(result.data<float>() + row * r, b.data<float>() + from * r,
                size_t(r) * sizeof(float));
  }
  return result;
}

Tensor scaled(const Tensor& t, double factor) {
  if (factor == 1) return t;
  Tensor result = Tensor::empty(t.shape(), DType::F32, Device::CPU, Scope::Adapters);
  for (int64_t i = 0; i < t.num_elements(); ++i)
    result.data<float>()[i] = float(factor * t.data<float>()[i]);
  return result;
}

// B as llama.cpp wants it.
Tensor gguf_b(const AdapterModule& module, const ModelConfig& model, float alpha) {
  const double own = module.scaling * double(module.a.size(0));
  const Tensor b = scaled(module.b, float(own) == alpha ? 1 : own / double(alpha));
  if (model.architecture != "LlamaForCausalLM") return b;
  if (module.name.ends_with(".q_proj")) return permuted_heads(b, model.num_attention_heads);
  if (module.name.ends_with(".k_proj")) return permuted_heads(b, model.num_key_value_heads);
  return b;
}

}  // namespace

void write_gguf_adapter(const AdapterFile& file, const ModelConfig& model,
                        const std::string& path) {
  check_pairs_alone(file, "a GGUF adapter");
  const AdapterModule& first = file.modules.at(0);
  const float alpha = float(first.scaling * double(first.a.size(0)));
  Bytes head, data;
  head.text() = "GGUF";
  head.number(kVersion);
  head.number(uint64_t(2 * file.modules.size()));
  head.number(uint64_t(6));
  head.key("general.architecture", architecture(model));
  head.key("general.type", std::string("adapter"));
  head.key("adapter.type", std::string("lora"));
  head.key("adapter.lora.alpha", alpha);
  head.key("general.file_type", uint32_t(0));             // all F32
  head.key("general.quantization_version", uint32_t(2));  // of ggml, as its converters write it
  const auto add = [&](const std::string& name, const Tensor& tensor) {
    head.string(name);
    head.number(uint32_t(2));
    head.number(uint64_t(tensor.size(1)));  // the dimension that lies densest comes first
    head.number(uint64_t(tensor.size(0)));
    head.number(kGgmlF32);
    head.number(uint64_t(data.text().size()));
    data.text().append(static_cast<const char*>(tensor.raw()), size_t(tensor.num_bytes()));
    data.pad();
  };
  for (const AdapterModule& module : file.modules) {
    CHECK(!module.magnitude.defined(), "convert: ", module.name,
          " is DoRA, which llama.cpp does not load; make a LoRA adapter of it first, with --to "
          "lora");
    const std::string name = gguf_name(module.name);
    add(name + ".lora_a", module.a);
    add(name + ".lora_b", gguf_b(module, model, alpha));
  }
  head.pad();
  write_file_atomically(path, head.text() + data.text());
}

}  // namespace graft
