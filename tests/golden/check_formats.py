# Do the adapters of other formats that graft wrote (tests/golden/written/mlx, gguf) say what PEFT's
# originals say? mlx-lm loads and runs the one; gguf-py reads the other, whose names and numbers are
# compared with its own tables and with A and B as PEFT has them. Needs mlx, mlx_lm and gguf; run from
# the repository root.
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from gguf import GGUFReader, MODEL_ARCH, get_tensor_name_map
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from safetensors.numpy import load_file

WRITTEN = "tests/golden/written"
ARCH = {"LlamaForCausalLM": (MODEL_ARCH.LLAMA, "llama"), "Qwen2ForCausalLM": (MODEL_ARCH.QWEN2, "qwen2"),
        "Qwen3ForCausalLM": (MODEL_ARCH.QWEN3, "qwen3")}


def check_mlx(case):
    golden = json.load(open(f"tests/golden/adapters/{case}/golden.json"))
    model, _ = load_model(Path(golden["model"]))
    load_adapters(model, f"{WRITTEN}/mlx/{case}").eval()
    worst, largest = 0.0, 0.0
    for ids, logits in zip(golden["input_ids"], golden["logits"]):
        got, wanted = np.array(model(mx.array([ids]))[0]), np.array(logits)
        worst, largest = max(worst, np.abs(got - wanted).max()), max(largest, np.abs(wanted).max())
    assert worst < 1e-5 * largest, (case, worst, largest)
    return f"mlx-lm gives PEFT's logits: largest difference {worst / largest:.2e} of the largest"


def permute(weights, heads):
    """llama.cpp's convert_hf_to_gguf: LlamaModel.permute."""
    return (weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
            .swapaxes(1, 2).reshape(weights.shape))


def check_gguf(case):
    folder = f"tests/golden/adapters/{case}"
    golden = json.load(open(f"{folder}/golden.json"))
    config = json.load(open(f"{golden['model']}/config.json"))
    arch, arch_name = ARCH[config["architectures"][0]]
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    stored = load_file(f"{folder}/adapter_model.safetensors")
    reader = GGUFReader(f"{WRITTEN}/gguf/{case}.gguf")
    tensors = {t.name: t for t in reader.tensors}
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    alpha = fields["adapter.lora.alpha"]
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == arch_name
    worst, lines = 0.0, []
    for module, what in golden["modules"].items():
        key = "base_model.model." + module
        name = names.get_name(module + ".weight", try_suffixes=(".weight",))
        a, b = tensors.pop(name + ".lora_a"), tensors.pop(name + ".lora_b")
        assert a.data_offset % 32 == 0 and b.data_offset % 32 == 0
        # ggml's order of dimensions: the densest first
        assert list(a.shape) == list(stored[key + ".lora_A.weight"].shape[::-1])
        got = alpha / b.shape[0] * (b.data.astype(np.float64) @ a.data.astype(np.float64))
        wanted = what["scaling"] * (stored[key + ".lora_B.weight"].astype(np.float64)
                                    @ stored[key + ".lora_A.weight"].astype(np.float64))
        if arch == MODEL_ARCH.LLAMA and module.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            assert np.abs(got - wanted).max() > 1e-3 * np.abs(wanted).max()  # so that it is a test
            wanted = permute(wanted, heads)
        worst = max(worst, np.abs(got - wanted).max() / np.abs(wanted).max())
        lines += [f"{t.name} {t.tensor_type.name} {'x'.join(map(str, t.shape))}" for t in (a, b)]
    assert not tensors, tensors
    assert worst < 1e-6, (case, worst)
    head = [f"{k} = {v}" for k, v in fields.items()]
    return "\n".join(head + lines + [f"largest difference of a delta {worst:.1e} of the largest"])


def main():
    for case in ("llama_gqa", "patterns", "patterns_all_layers", "dora_patterns"):
        for kind, check in (("mlx", check_mlx), ("gguf", check_gguf)):
            if (kind, case) == ("gguf", "dora_patterns"):
                continue  # llama.cpp knows no DoRA
            text = check(case)
            Path(f"{WRITTEN}/{kind}/{case}.txt").write_text(text + "\n")
            print(f"-- {kind} {case}\n{text}")


if __name__ == "__main__":
    main()
