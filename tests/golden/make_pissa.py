# PiSSA and OLoRA by PEFT: training from where they begin, step by step, and the adapter converted
# for the untouched base, as save_pretrained writes it. The signs of singular vectors are whoever
# computed them's, so what can be compared is losses and deltas: beside the adapter as trained lies
# what A and B began as.
import os
import shutil

import torch
from peft import PeftModel

from adapters import factors, save, wrap
from common import MODELS, fresh_folder, largest_difference, load_model, logits_of, write_json
from make_trajectories import (RECIPE, detached, loss_distance, make_batches, report, train)

STEPS = 12
SEEDS = range(521, 529)  # eight in a row

# case: (model, seed, keys of LoraConfig, changes to the recipe)
CASES = {
    "pissa_llama_gqa": ("llama_gqa", 501, {"init_lora_weights": "pissa"}, {}),
    "pissa_rslora": ("qwen2_tied", 502, {"init_lora_weights": "pissa", "use_rslora": True}, {}),
    "pissa_patterns": ("qwen3_tied", 503, {
        "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.down_proj": 6},
        "alpha_pattern": {"v_proj": 3}}, {"weight_decay": 0.01}),
    "olora_qwen3_tied": ("qwen3_tied", 504, {"init_lora_weights": "olora"}, {}),
    "pissa_dora": ("llama_gqa", 505, {"init_lora_weights": "pissa", "use_dora": True}, {}),
}


def save_with_init(model, folder, init):
    """PEFT wants the adapter that a conversion starts from to say that it was begun as usual."""
    config = model.peft_config["default"]
    before, config.init_lora_weights = config.init_lora_weights, init
    save(model, folder)
    config.init_lora_weights = before


def save_converted(model, folder, start):
    """Writes what save_pretrained writes of a trained model, and leaves the model as it was."""
    config = model.peft_config["default"]
    keep = {k: getattr(config, k) for k in ("init_lora_weights", "r", "lora_alpha", "rank_pattern",
                                            "alpha_pattern")}
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=start)
    os.remove(f"{folder}/README.md")
    for key, value in keep.items():
        setattr(config, key, value)


def differences(before, after):
    return max(float((before[k] - after[k]).abs().max()) for k in before)


def make(case, name, seed, config, changes):
    folder = fresh_folder("trajectories", case)
    recipe, batches = {**RECIPE, "max_steps": STEPS, **changes}, make_batches(1000 + seed, STEPS)
    row = batches[0][0][0]["input_ids"]

    def run(dtype=torch.float32, split_rows=False):
        model = wrap(load_model(name, dtype), seed, **config).train()
        save_with_init(model, f"{folder}/start", True)
        return model, train(model, recipe, batches, split_rows)

    base = logits_of(load_model(name), row)
    begun = wrap(load_model(name), seed, **config)
    assert largest_difference([base], [logits_of(begun, row)]) < 1e-5, case
    model, (losses, norms, rates) = run()
    assert losses[-1] < losses[0], (case, losses)
    logits = logits_of(model.eval(), row)
    if not config.get("use_dora"):  # PEFT's conversion loses m
        save_converted(model, f"{folder}/final", f"{folder}/start")
        loaded = PeftModel.from_pretrained(load_model(name), f"{folder}/final").eval()
        off = largest_difference([logits], [logits_of(loaded, row)])
        assert off < 1e-5, (case, off)
    shutil.rmtree(f"{folder}/start")
    final = detached(factors(model))
    other, other_curve = run(split_rows=True)
    _, half = run(dtype=torch.bfloat16)
    shutil.rmtree(f"{folder}/start")
    write_json(f"{folder}/golden.json", {
        "model": f"{MODELS}/{name}", "lora": {k: v for k, v in {
            "r": 4, "lora_alpha": 8, **config}.items()},
        "recipe": recipe, "batches": batches, "losses": losses, "grad_norms": norms,
        "learning_rates": rates, "input_ids": row, "logits": logits,
        "noise": {"losses": loss_distance(other_curve[0], losses)}, "losses_bf16": half[0],
        "bf16_distance": {"losses": loss_distance(half[0], losses)}})
    report(case, losses, norms, loss_distance(other_curve[0], losses),
           {"max_abs": differences(final, detached(factors(other)))},
           f"; bf16 losses {loss_distance(half[0], losses)['relative_l2']:.1e}")


def main():
    for case, arguments in CASES.items():
        make(case, *arguments)
    for seed in SEEDS:  # for how far bfloat16 is off on average: losses alone
        make(f"seeds/pissa_llama_gqa_{seed}", "llama_gqa", seed, {"init_lora_weights": "pissa"}, {})
        shutil.rmtree(f"tests/golden/trajectories/seeds/pissa_llama_gqa_{seed}/final")


if __name__ == "__main__":
    main()
