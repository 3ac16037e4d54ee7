# Adapters that PEFT wrote, with PEFT's logits; and adapters that graft must refuse.
from adapters import describe, factors, parameters_line, save, wrap
from common import MODELS, fresh_folder, generator, largest_difference, load_model, logits_of
from common import write_json

import torch
from peft import PeftModel

ROW_LENGTHS = (17, 9)

PATTERNS = {"use_rslora": True, "rank_pattern": {"q_proj": 2, r"model.layers.1.mlp.down_proj": 6},
            "alpha_pattern": {"v_proj": 3, r"layers\.1\.self_attn\.q_proj": 5}}

# case: (model, seed, other keys of LoraConfig)
CASES = {
    "llama_gqa": ("llama_gqa", 101, {}),
    "qwen2_tied": ("qwen2_tied", 102, {}),
    "qwen3_tied": ("qwen3_tied", 103, {}),
    "patterns": ("qwen3_tied", 104, {**PATTERNS, "layers_to_transform": [1]}),
    "patterns_all_layers": ("qwen2_tied", 105, PATTERNS),
    "regex": ("llama_gqa", 106, {"target_modules": r".*\.1\.(self_attn\.[qv]_proj|mlp\.\w+_proj)"}),
    "embedding_and_head": ("llama_gqa", 115,
                           {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "embedding_tied": ("qwen2_tied", 116, {"target_modules": ["embed_tokens", "up_proj"]}),
    "tokens": ("llama_gqa", 118, {"target_modules": ["k_proj"],
                                  "trainable_token_indices": [7, 3, 90]}),
    "tokens_tied": ("qwen2_tied", 119, {"target_modules": ["o_proj"],
                                        "trainable_token_indices": [33, 4, 5, 71]}),
    "head_tied": ("qwen2_tied", 117, {"target_modules": ["lm_head", "v_proj"]}),
}
# case: the same, with biases and whole modules, moved away from the base's.
REPLACING = {
    "bias_lora_only": ("qwen2_tied", 107, {"bias": "lora_only"}),
    "bias_all": ("llama_bias", 108, {"bias": "all", "target_modules": ["q_proj", "down_proj"]}),
    "whole_head": ("llama_gqa", 109, {"modules_to_save": ["lm_head"]}),
    "whole_embeddings_of_tied": ("qwen2_tied", 110, {"modules_to_save": ["embed_tokens"]}),
    "whole_head_of_tied": ("qwen3_tied", 111, {"modules_to_save": ["lm_head", "norm"]}),
}
# Sound in PEFT; graft knows none of them yet and has to say so, by name.
REFUSED = {
    "refused_whole_projection": ("llama_gqa", 113, {"modules_to_save": ["o_proj"]}),
    "refused_lora_bias": ("llama_bias", 114, {"lora_bias": True}),
}


def make(case, name, seed, config, wrap=wrap, more=lambda folder, rows, loaded: {}):
    """more: what else is written of the loaded adapter, and what golden.json says of it."""
    folder = fresh_folder("adapters", case)
    gen = generator(1000 + seed)
    rows = [torch.randint(3, 96, (n,), generator=gen).tolist() for n in ROW_LENGTHS]
    base = [logits_of(load_model(name), r) for r in rows]
    model = wrap(load_model(name), seed, **config)
    for key, value in factors(model).items():
        if "tokens_delta" in key:  # they begin as the base has them
            value.data.add_(torch.randn(value.shape, generator=gen))
    save(model, folder)

    loaded = PeftModel.from_pretrained(load_model(name), folder, is_trainable=True).eval()
    logits = [logits_of(loaded, r) for r in rows]
    assert all(torch.equal(logits_of(model, r), l) for r, l in zip(rows, logits)), case
    half = PeftModel.from_pretrained(load_model(name, torch.bfloat16), folder).eval()
    effect = largest_difference(base, logits)
    assert effect > 0.05, (case, effect)
    write_json(f"{folder}/golden.json", {
        "model": f"{MODELS}/{name}", "input_ids": rows, "logits": logits,
        "logits_bf16": logits_of(half, rows[0]), "modules": describe(loaded),
        "parameters_line": parameters_line(model), **more(folder, rows, loaded)})
    print(f"{case}: the adapter moves the logits by {effect:.2f} of the largest")


def moved(model, seed, **config):
    """wrap, and what is trained beside A and B is no longer the base's."""
    wrapped, gen = wrap(model, seed, **config), generator(3000 + seed)
    for name, p in wrapped.named_parameters():
        if p.requires_grad and "lora_" not in name:
            p.data += 0.3 * p.std() * torch.randn(p.shape, generator=gen)
    return wrapped


def main():
    for case, (name, seed, config) in CASES.items():
        make(case, name, seed, config)
    for case, (name, seed, config) in REPLACING.items():
        make(case, name, seed, config, wrap=moved)
    for case, (name, seed, config) in REFUSED.items():
        save(wrap(load_model(name), seed, **config), fresh_folder("adapters", case))
        print(case)


if __name__ == "__main__":
    main()
