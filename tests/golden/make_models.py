# Tiny random models of every family and rope type, and what transformers computes with them.
# config.json is written here by hand, in the old or the new spelling, never by transformers.
import json
import os
import tempfile

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from common import fresh_folder, generator, largest_difference, load_model, logits_of
from common import write_json

ROW_LENGTHS = (22, 13)
EMBEDDING, PROJECTION = 0.5, 0.12  # standard deviations
GREEDY_PROMPT, GREEDY_NEW = 5, 24

SHAPE = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.25,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 96,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
         "mlp_bias": False, "rms_norm_eps": 1e-5}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_window_layers": 2,
         "sliding_window": 64, "use_sliding_window": False}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
         "head_dim": 16, "max_window_layers": 2, "sliding_window": None,
         "use_sliding_window": False}

# name: (family, spelling of the rope and dtype keys, seed, stored as, other keys of config.json).
# `rope` holds rope_theta, and what scales it; it is spelled out by write_config.
MODELS_TO_MAKE = {
    "llama_mha": (LLAMA, "old", 1, "sharded", {"num_key_value_heads": 4}),
    "llama_gqa": (LLAMA, "new", 2, "F32", {}),
    "llama_mqa": (LLAMA, "old", 3, "BF16", {"num_key_value_heads": 1}),
    "llama_tied": (LLAMA, "new", 4, "F32", {"tie_word_embeddings": True}),
    "llama_tied_lm_head": (LLAMA, "old", 5, "lm_head only", {"tie_word_embeddings": True}),
    "llama_head_dim": (LLAMA, "new", 26, "F16", {"head_dim": 12}),
    "llama_bias": (LLAMA, "new", 7, "F32", {"attention_bias": True, "mlp_bias": True}),
    "llama_rope_linear": (LLAMA, "type", 8, "F32",
                          {"rope": {"rope_theta": 100.0, "rope_type": "linear", "factor": 4.0}}),
    "llama_rope_llama3": (LLAMA, "old", 9, "F32",
                          {"head_dim": 16,
                           "rope": {"rope_theta": 100.0, "rope_type": "llama3", "factor": 8.0,
                                    "low_freq_factor": 1.0, "high_freq_factor": 2.0,
                                    "original_max_position_embeddings": 16}}),
    # max_position_embeddings / original is 8 here: the factor that is written, 4, wins.
    "llama_rope_yarn": (LLAMA, "new", 10, "F32",
                        {"head_dim": 16,
                         "rope": {"rope_theta": 100.0, "rope_type": "yarn", "factor": 4.0,
                                  "original_max_position_embeddings": 16}}),
    "llama_rope_yarn_mscale": (LLAMA, "new", 11, "F32",
                               {"head_dim": 16,
                                "rope": {"rope_theta": 100.0, "rope_type": "yarn", "factor": 8.0,
                                         "original_max_position_embeddings": 16,
                                         "beta_fast": 1.0, "beta_slow": 0.1, "truncate": False,
                                         "mscale": 1.4, "mscale_all_dim": 0.6}}),
    "qwen2_tied": (QWEN2, "old", 12, "F32",
                   {"tie_word_embeddings": True, "rope": {"rope_theta": 1000000.0}}),
    "qwen2_untied": (QWEN2, "new", 13, "F32", {"num_key_value_heads": 4}),
    "qwen2_rope_yarn": (QWEN2, "type", 14, "F32",
                        {"rope": {"rope_theta": 1000.0, "rope_type": "yarn", "factor": 8.0,
                                  "original_max_position_embeddings": 16}}),
    "qwen3_tied": (QWEN3, "old", 15, "F32",
                   {"tie_word_embeddings": True, "rope": {"rope_theta": 1000000.0}}),
    "qwen3_rope_yarn": (QWEN3, "new", 36, "F32",
                        {"rope": {"rope_theta": 100.0, "rope_type": "yarn", "factor": 8.0,
                                  "attention_factor": 1.3,
                                  "original_max_position_embeddings": 16}}),
}
DTYPES = {"F32": "float32", "sharded": "float32", "lm_head only": "float32", "BF16": "bfloat16",
          "F16": "float16"}


def write_config(folder, family, spelling, dtype, extra):
    """new: rope_parameters and dtype; old: rope_theta, rope_scaling and torch_dtype; type: old,
    with `type` for `rope_type`, as the first Qwen2 models have it."""
    config = {**SHAPE, **family, **extra}
    rope = dict(config.pop("rope", {"rope_theta": 10000.0}))
    if spelling == "new":
        config["dtype"] = dtype
        config["rope_parameters"] = {"rope_type": "default", **rope}
    else:
        config["torch_dtype"] = dtype
        config["rope_theta"] = rope.pop("rope_theta")
        if spelling == "type" and rope:
            rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope or None
    with open(f"{folder}/config.json", "w", encoding="utf-8") as out:
        out.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def random_weights(folder, seed):
    """Every tensor of the model by name. Norm weights lie around 1, all else around 0. Projections
    are small enough beside the embedding that BF16 rounding is not blown up by the random net."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    gen, weights = generator(seed), {}
    for name, parameter in model.named_parameters():  # names a tied matrix once
        noise = torch.randn(parameter.shape, generator=gen)
        if "norm" in name:
            weights[name] = 1 + 0.25 * noise
        elif "embed" in name or "lm_head" in name:
            weights[name] = EMBEDDING * noise
        else:
            weights[name] = PROJECTION * noise
    if config.tie_word_embeddings:  # else each token would predict itself
        weights["model.norm.weight"] *= torch.randn(config.hidden_size, generator=gen).sign()
    return weights


def sort_metadata(path):
    """safetensors writes more than one entry of metadata in random order."""
    with open(path, "rb") as file:
        data = file.read()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text + data[end:])


def write_weights(folder, weights, storage):
    meta = {"format": "pt"}
    if storage == "lm_head only":
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        meta["model.embed_tokens.weight"] = "lm_head.weight"
    if storage in ("BF16", "F16"):
        half = torch.bfloat16 if storage == "BF16" else torch.float16
        weights = {k: v.to(half) for k, v in weights.items()}
    if storage != "sharded":
        save_file(weights, f"{folder}/model.safetensors", metadata=meta)
        sort_metadata(f"{folder}/model.safetensors")
        return
    names, shards, index = sorted(weights), 3, {}
    for i in range(shards):  # a round robin: each layer is spread over all files
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {k: weights[k] for k in names[i::shards]}
        save_file(part, f"{folder}/{file}", metadata=meta)
        index.update({k: file for k in part})
    total = sum(4 * w.numel() for w in weights.values())
    with open(f"{folder}/model.safetensors.index.json", "w", encoding="utf-8") as out:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        out.write(json.dumps(index, indent=2) + "\n")


def greedy(model, ids, count):
    """The ids, and the least gap between the two best logits on the way."""
    ids, new, margin = list(ids), [], float("inf")
    for _ in range(count):
        best = logits_of(model, ids)[-1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        new.append(int(best.indices[0]))
        ids.append(new[-1])
    return new, margin


def check_spellings(folder, family, storage, extra, want, rows):
    """transformers must read the same model from each spelling of its config."""
    for spelling in ("old", "type", "new"):
        with tempfile.TemporaryDirectory() as other:
            for file in os.listdir(folder):
                os.symlink(os.path.abspath(f"{folder}/{file}"), f"{other}/{file}")
            os.remove(f"{other}/config.json")
            write_config(other, family, spelling, DTYPES[storage], extra)
            model = load_model(other)
            assert all(torch.equal(logits_of(model, r), w) for r, w in zip(rows, want)), spelling


def check_rope_matters(folder, family, spelling, storage, extra, want, rows):
    """Without its rope scaling the model must give clearly other logits."""
    with tempfile.TemporaryDirectory() as other:
        os.symlink(os.path.abspath(f"{folder}/model.safetensors"), f"{other}/model.safetensors")
        plain = {**extra, "rope": {"rope_theta": extra["rope"]["rope_theta"]}}
        write_config(other, family, spelling, DTYPES[storage], plain)
        model = load_model(other)
        assert largest_difference([logits_of(model, r) for r in rows], want) > 0.02, folder


def make(name):
    family, spelling, seed, storage, extra = MODELS_TO_MAKE[name]
    folder = fresh_folder("models", name)
    write_config(folder, family, spelling, DTYPES[storage], extra)
    write_weights(folder, random_weights(folder, seed), storage)

    gen = generator(1000 + seed)
    rows = [torch.randint(3, 96, (n,), generator=gen).tolist() for n in ROW_LENGTHS]
    model = load_model(name)
    if family is QWEN3 or family is QWEN2:
        assert not any(k != "full_attention" for k in model.config.layer_types)
    logits = [logits_of(model, r) for r in rows]
    check_spellings(folder, family, storage, extra, logits, rows)
    if extra.get("rope", {}).get("rope_type"):
        check_rope_matters(folder, family, spelling, storage, extra, logits, rows)
    losses = [torch.nn.functional.cross_entropy(l[:-1], torch.tensor(r[1:]), reduction="none")
              for l, r in zip(logits, rows)]
    greedy_ids, margin = greedy(model, rows[0][:GREEDY_PROMPT], GREEDY_NEW)
    assert margin > 1e-3, (name, margin, "take another seed")
    half_model = load_model(name, torch.bfloat16)
    half = logits_of(half_model, rows[0])
    rounding = largest_difference([half], [logits_of(half_model.float(), rows[0])])

    rope = model.model.rotary_emb
    write_json(f"{folder}/golden.json", {
        "input_ids": rows, "logits": logits, "token_losses": losses, "logits_bf16": half,
        "greedy_prompt": rows[0][:GREEDY_PROMPT], "greedy_ids": greedy_ids,
        "greedy_margin": margin, "inv_freq": rope.inv_freq,
        "rope_attention_factor": float(rope.attention_scaling),
        "parameters": sum(p.numel() for p in model.parameters())})
    differs = largest_difference([half], logits[:1])
    print(f"{name}: largest logit {max(float(l.abs().max()) for l in logits):.2f}; bf16 differs by "
          f"{differs:.1e}, by arithmetic alone {rounding:.1e}; greedy margin {margin:.1e}, "
          f"{len(set(greedy_ids))} different ids")


def main():
    for name in MODELS_TO_MAKE:
        make(name)


if __name__ == "__main__":
    main()
