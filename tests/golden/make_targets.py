# Which modules PEFT adapts for which target_modules, exclude_modules and so on, with r and scaling;
# and PEFT's trainable-parameters line for real configurations, on torch's meta device.
import os
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from adapters import SEVEN, describe, parameters_line
from common import MODELS, fresh_folder, load_model, write_json

CASES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": None},  # PEFT's choice by model_type
    {"target_modules": SEVEN},
    {"target_modules": ["self_attn.o_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["q_proj", "no_such_proj"]},
    {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"target_modules": "all-linear", "layers_to_transform": [1]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"(q|v)_proj"},
    {"target_modules": r"model\.layers\.\d+\.mlp\.(gate|up)_proj"},
    {"target_modules": r".*layers\.0\..*_proj$"},
    {"target_modules": r"(?i).*\.Q_PROJ"},
    {"target_modules": r".*(?<!down)_proj"},
    {"target_modules": r".*self_attn.*proj", "exclude_modules": r".*\.1\..*"},
    {"target_modules": SEVEN, "exclude_modules": ["o_proj", "mlp.down_proj"]},
    {"target_modules": SEVEN, "exclude_modules": r"model\.layers\.0\..*"},
    {"target_modules": SEVEN, "exclude_modules": "q_proj"},
    {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": SEVEN, "layers_to_transform": 0},
    {"target_modules": SEVEN, "layers_to_transform": [0, 1]},
    {"target_modules": SEVEN, "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": SEVEN, "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": SEVEN, "layers_to_transform": [1], "layers_pattern": "blocks"},
    {"target_modules": SEVEN, "layers_to_transform": [7]},
    {"target_modules": SEVEN, "layers_to_transform": []},
    {"target_modules": r".*q_proj", "layers_to_transform": [0]},
    {"target_modules": ["embed_tokens"], "layers_to_transform": [0]},
    {"target_modules": SEVEN, "rank_pattern": {"q_proj": 2, "down_proj": 6}},
    {"target_modules": SEVEN, "rank_pattern": {"proj": 2}},
    {"target_modules": SEVEN, "rank_pattern": {".*_proj": 2}},
    {"target_modules": SEVEN, "rank_pattern": {r"layers\.1\.self_attn\.(q|k)_proj": 3},
     "alpha_pattern": {r"model.layers.0.mlp.up_proj": 32, "k_proj": 5}},
    {"target_modules": SEVEN, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}},
    {"target_modules": SEVEN, "use_rslora": True, "rank_pattern": {"q_proj": 2},
     "alpha_pattern": {"v_proj": 3}},
    {"target_modules": ["q_proj"], "use_rslora": True, "r": 16, "lora_alpha": 32},
    {"target_modules": []},
    {"target_modules": ""},
]
REAL = {"Qwen2.5-0.5B": (8, 16, 32), "Qwen3-4B": (16, 32, 64), "Qwen3-0.6B": (16,),
        "Llama-3.2-1B-Instruct": (16,), "Llama-3.1-8B": (16,), "TinyLlama-1.1B-Chat-v1.0": (16,)}


def make_targets():
    folder = fresh_folder("targets")
    for name in ("llama_gqa", "qwen2_tied"):
        out = []
        for case in CASES:
            config = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **case}
            try:
                model = get_peft_model(load_model(name), LoraConfig(**config))
                result = {"modules": describe(model), "parameters_line": parameters_line(model)}
            except ValueError as error:
                result = {"error": str(error).split("{")[0].split(". ")[0]}
            out.append({"config": config, **result})
        write_json(f"{folder}/{name}.json", {"model": f"{MODELS}/{name}", "cases": out})
        print(f"{name}: {len(out)} cases, {sum('error' in c for c in out)} of them errors")


def make_counts():
    """The base is built without weights; only the shapes of config.json count."""
    configs = os.environ.get("GRAFT_SHARED_DATA", "../shared/data") + "/configs"
    if not os.path.isdir(configs):
        print(f"{configs}: not there, peft_counts.json is left as it is")
        return
    out = []
    for name, ranks in REAL.items():
        base = AutoConfig.from_pretrained(f"{configs}/{name}.json")
        for r in ranks:
            for targets in (SEVEN, ["q_proj", "v_proj"]):
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(base)
                    model = get_peft_model(model, LoraConfig(
                        r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM"))
                trainable, total = model.get_nb_trainable_parameters()
                out.append({"config": f"{name}.json", "r": r, "target_modules": targets,
                            "trainable": trainable, "all": total,
                            "line": parameters_line(model)})
                print(name, r, len(targets), out[-1]["line"])
    write_json("tests/golden/peft_counts.json", out)


def main():
    warnings.simplefilter("ignore")
    make_targets()
    make_counts()


if __name__ == "__main__":
    main()
