# Training by PEFT, step by step: what graft has to give from the same model, adapter and batches.
# Loss and gradient are sums over the labelled tokens of both micro-batches, over their number.
import sys

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
from transformers import get_scheduler

from adapters import factors, save, wrap
from common import MODELS, fresh_folder, generator, load_model, write_json
from make_adapters import PATTERNS

STEPS, WARMUP, MICRO_BATCHES, ROWS = 20, 3, 2, 2
RECIPE = {"learning_rate": 1e-2, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
          "weight_decay": 0.0, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine",
          "warmup_steps": WARMUP, "max_steps": STEPS}

SOME = ["q_proj", "v_proj", "up_proj"]

# case: (model, seed, keys of LoraConfig, changes to the recipe)
CASES = {
    "llama_gqa": ("llama_gqa", 201, {}, {"max_grad_norm": 10.0}),
    "qwen2_tied": ("qwen2_tied", 202, {}, {}),
    "qwen3_tied": ("qwen3_tied", 203, {}, {"weight_decay": 0.01, "max_grad_norm": 14.0}),
    "patterns": ("qwen3_tied", 204, {**PATTERNS, "lora_alpha": 4}, {}),
    "layers_to_transform": ("llama_gqa", 205, {"layers_to_transform": [1]}, {}),
    "loraplus": ("qwen3_tied", 209, {}, {"loraplus_lr_ratio": 4.0, "learning_rate": 5e-3,
                                         "weight_decay": 0.05}),
    # Biases of the adapted layers, and all; whole modules, also where the base ties the two.
    "bias_lora_only": ("qwen2_tied", 210, {"bias": "lora_only", "target_modules": SOME}, {}),
    "bias_all": ("llama_bias", 211, {"bias": "all", "target_modules": SOME}, {}),
    "bias_dora": ("llama_bias", 216, {"bias": "all", "use_dora": True, "target_modules": SOME}, {}),
    "whole_head": ("llama_gqa", 212, {"modules_to_save": ["lm_head"], "target_modules": SOME}, {}),
    "whole_both": ("qwen2_untied", 213, {"modules_to_save": ["embed_tokens", "lm_head"],
                                         "target_modules": SOME}, {}),
    "whole_head_of_tied": ("qwen2_tied", 214, {"modules_to_save": ["lm_head"],
                                               "target_modules": SOME}, {}),
    "whole_norms": ("qwen3_tied", 215, {"modules_to_save": ["norm"], "target_modules": SOME}, {}),
    "head": ("llama_gqa", 210, {"target_modules": ["q_proj", "v_proj", "lm_head"]}, {}),
    "embedding": ("qwen2_tied", 211, {"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
                  {}),
    "embedding_and_head": ("llama_gqa", 218,
                           {"target_modules": ["embed_tokens", "up_proj", "lm_head"],
                            "use_rslora": True, "lora_alpha": 4},
                           {"weight_decay": 0.05, "learning_rate": 5e-3}),
    "tokens": ("llama_gqa", 213, {"target_modules": ["q_proj", "down_proj"],
                                  "trainable_token_indices": [40, 5, 17, 41, 62]}, {}),
    "tokens_tied": ("qwen2_tied", 214, {"target_modules": ["v_proj", "up_proj"],
                                        "trainable_token_indices": [50, 51, 9, 30]},
                    {"weight_decay": 0.05}),
}
# Eight seeds in a row, for how far bfloat16 is off on average.
CASES |= {f"seeds/bias_dora_{seed}": ("llama_bias", seed, *CASES["bias_dora"][2:])
          for seed in range(321, 329)}
SOME_CLIPPED = ("llama_gqa", "qwen3_tied")  # here the norm crosses the bound


def make_batches(seed, steps):
    """batches[step][micro-batch][row] = {input_ids, labels}. A row counts upwards by a stride
    of its own, so there is something to learn; its first third, the prompt, has no labels."""
    gen = generator(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=gen))

    def row():
        length, start, stride = draw(6, 19), draw(0, 90), draw(1, 4)
        ids = [3 + (start + i * stride) % 90 for i in range(length)]
        masked = length // 3
        return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}

    return [[[row() for _ in range(ROWS)] for _ in range(MICRO_BATCHES)] for _ in range(steps)]


def pad(rows):
    longest = max(len(r["input_ids"]) for r in rows)

    def fill(key, value):
        return torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in rows])

    mask = torch.tensor([[int(i < len(r["input_ids"])) for i in range(longest)] for r in rows])
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100),
            "attention_mask": mask}


def train(model, recipe, batches, split_rows=False):
    """Losses, gradient norms before clipping and learning rates, one of each for every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    keys = {"lr": recipe["learning_rate"], "eps": recipe["adam_epsilon"],
            "betas": (recipe["adam_beta1"], recipe["adam_beta2"])}
    if "loraplus_lr_ratio" in recipe:
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, loraplus_lr_ratio=recipe["loraplus_lr_ratio"],
            loraplus_weight_decay=recipe["weight_decay"], **keys)
    else:
        optimizer = torch.optim.AdamW(trained, weight_decay=recipe["weight_decay"], **keys)
    schedule = get_scheduler(recipe["lr_scheduler_type"], optimizer,
                             num_warmup_steps=recipe["warmup_steps"],
                             num_training_steps=recipe["max_steps"])
    losses, norms, rates = [], [], []
    for batch in batches:
        micro = [[row] for rows in batch for row in rows] if split_rows else batch
        labelled = sum(l != -100 for rows in batch for r in rows for l in r["labels"][1:])
        loss = 0.0
        for rows in micro:
            part = model(**pad(rows), num_items_in_batch=labelled, use_cache=False).loss
            part.backward()
            loss += part.item()
        losses.append(loss)
        norms.append(torch.nn.utils.clip_grad_norm_(trained, recipe["max_grad_norm"]).item())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms, rates


def distance(values, reference):
    """Of two dictionaries of tensors: largest absolute difference, and relative L2."""
    a = torch.cat([values[k].detach().flatten().double() for k in sorted(reference)])
    b = torch.cat([reference[k].detach().flatten().double() for k in sorted(reference)])
    return {"max_abs": float((a - b).abs().max()),
            "relative_l2": float((a - b).norm() / b.norm())}


def loss_distance(losses, reference):
    a, b = torch.tensor(losses).double(), torch.tensor(reference).double()
    return {"max_relative": float(((a - b) / b).abs().max()),
            "relative_l2": float((a - b).norm() / b.norm())}


def detached(tensors):
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}


def make(case, name, seed, config, changes):
    folder = fresh_folder("trajectories", case)
    recipe, batches = {**RECIPE, **changes}, make_batches(1000 + seed, STEPS)
    start = wrap(load_model(name), seed, **config)
    for key, value in factors(start).items():
        if "embedding" in key:  # PEFT draws these by N(0, 1), which would drown the base's
            value.data.mul_(0.2)
    save(start, f"{folder}/start")

    def run(dtype=torch.float32, split_rows=False):
        model = PeftModel.from_pretrained(load_model(name, dtype), f"{folder}/start",
                                          is_trainable=True).train()
        assert all(p.dtype == torch.float32 for p in factors(model).values())
        curve = train(model, recipe, batches, split_rows)
        return model, curve, detached(get_peft_model_state_dict(model))

    model, (losses, norms, rates), final = run()
    save(model, f"{folder}/final")
    _, other, other_final = run(split_rows=True)
    _, half, half_final = run(dtype=torch.bfloat16)
    clipped = [n > recipe["max_grad_norm"] for n in norms]
    assert any(clipped) and (case not in SOME_CLIPPED or not all(clipped)), (case, norms)
    assert losses[-1] < losses[0], (case, losses)
    write_json(f"{folder}/golden.json", {
        "model": f"{MODELS}/{name}", "recipe": recipe, "batches": batches, "losses": losses,
        "grad_norms": norms, "learning_rates": rates,
        "noise": {"losses": loss_distance(other[0], losses),
                  "final": distance(other_final, final)},
        "losses_bf16": half[0], "grad_norms_bf16": half[1],
        "bf16_distance": {"losses": loss_distance(half[0], losses),
                          "final": distance(half_final, final)}})
    report(case, losses, norms, loss_distance(other[0], losses), distance(other_final, final),
           f"; bf16 in A and B {distance(half_final, final)['relative_l2']:.1e}")


def report(case, losses, norms, noise_losses, noise_final, more=""):
    print(f"{case}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, norms {min(norms):.2f} .. "
          f"{max(norms):.2f}; row by row differs in losses {noise_losses['max_relative']:.1e}, "
          f"final weights {noise_final['max_abs']:.1e}{more}")


def make_full():
    """All weights of a tiny model are trained; no PEFT. No weight decay: which weights it should
    spare is a matter of the trainer."""
    name, steps = "qwen3_tied", 10
    folder = fresh_folder("trajectories", "full_qwen3_tied")
    recipe = {**RECIPE, "learning_rate": 3e-3, "max_steps": steps}
    batches = make_batches(1206, steps)
    model = load_model(name).train()
    losses, norms, rates = train(model, recipe, batches)
    final = detached(dict(model.named_parameters()))
    save_file(final, f"{folder}/final.safetensors", metadata={"format": "pt"})
    other = load_model(name).train()
    other_losses, _, _ = train(other, recipe, batches, split_rows=True)
    noise = distance(detached(dict(other.named_parameters())), final)
    write_json(f"{folder}/golden.json", {
        "model": f"{MODELS}/{name}", "recipe": recipe, "batches": batches, "losses": losses,
        "grad_norms": norms, "learning_rates": rates,
        "noise": {"losses": loss_distance(other_losses, losses), "final": noise}})
    report("full_qwen3_tied", losses, norms, loss_distance(other_losses, losses), noise)


def main(only=None):
    if only:
        return make(only, *CASES[only])
    for case, arguments in CASES.items():
        make(case, *arguments)
    make_full()


if __name__ == "__main__":
    main(*sys.argv[1:])
