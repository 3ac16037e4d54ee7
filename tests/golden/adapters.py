# PEFT as the other scripts use it: wrap a model, save the adapter as PEFT does, gather A and B.
# Kept apart from common.py, which needs only transformers.
import json
import os
import warnings

import torch
from peft import LoraConfig, get_peft_model

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def wrap(model, seed, **config):
    """init_lora_weights false: B is as random as A, so that nothing is hidden by a zero."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": SEVEN,
                "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**{**defaults, **config})).eval()


def save(peft_model, folder):
    """What PEFT writes, less its README and with the sets it holds in a fixed order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about two of the refused kinds
        peft_model.save_pretrained(folder)
    os.remove(f"{folder}/README.md")
    path = f"{folder}/adapter_config.json"
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config = {k: sorted(v) if k.endswith("_modules") and isinstance(v, list) else v
              for k, v in config.items()}
    with open(path, "w", encoding="utf-8") as out:
        out.write(json.dumps(config, indent=2, sort_keys=True))


def adapted(peft_model):
    """(name in the transformers model, module) of each adapted module, in the model's order."""
    for name, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and (len(module.lora_A) or len(module.lora_embedding_A)):
            yield name, module


def factors(peft_model):
    """A, B and, with DoRA, m by their names in the adapter file."""
    out = {}
    for name, module in adapted(peft_model):
        if len(module.lora_embedding_A):
            out[f"base_model.model.{name}.lora_embedding_A"] = module.lora_embedding_A["default"]
            out[f"base_model.model.{name}.lora_embedding_B"] = module.lora_embedding_B["default"]
            continue
        out[f"base_model.model.{name}.lora_A.weight"] = module.lora_A["default"].weight
        out[f"base_model.model.{name}.lora_B.weight"] = module.lora_B["default"].weight
        if len(module.lora_magnitude_vector):
            out[f"base_model.model.{name}.lora_magnitude_vector"] = (
                module.lora_magnitude_vector["default"].weight)
    for name, module in peft_model.base_model.model.named_modules():
        if name.endswith("embed_tokens.token_adapter"):
            out[f"base_model.model.{name}.trainable_tokens_delta"] = (
                module.trainable_tokens_delta["default"])
    return out


def describe(peft_model):
    return {name: {"r": m.r["default"], "lora_alpha": m.lora_alpha["default"],
                   "scaling": m.scaling["default"]} for name, m in adapted(peft_model)}


def parameters_line(peft_model):
    """The line that print_trainable_parameters prints."""
    trainable, total = peft_model.get_nb_trainable_parameters()
    return (f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}")
