# QLoRA by PEFT on bitsandbytes' NF4, on the CPU: a base whose rows are multiples of 64 (its kernels
# there want that), the same quantised and saved by transformers, and 20 steps of training.
# bitsandbytes computes in F32 here; in eval mode it would repack weights for BF16, so models stay in
# train mode, in which nothing is drawn.
import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

from adapters import factors, save, wrap
from common import fresh_folder, generator, load_model, logits_of, round9, write_json
from make_dora import wrap_dora
from make_trajectories import RECIPE, STEPS, detached, distance, loss_distance, make_batches, train

SEED = 301
QUANTISED = "tests/golden/quantised"
CONFIG = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
          "max_position_embeddings": 128, "initializer_range": 0.125, "tie_word_embeddings": True,
          "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 2}
ROW = [3 + i * 7 % 90 for i in range(24)]


def make_base(name):
    folder = fresh_folder("quantised", name)
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator(SEED)).bfloat16()
    model.save_pretrained(folder)
    os.remove(f"{folder}/generation_config.json")
    return folder


def load_4bit(path, double_quant, dtype=torch.float32, quantise=True):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=dtype)
    more = {"quantization_config": config} if quantise else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager",
                                                 device_map="cpu", **more)
    return model.train()


def logits(path, double_quant, quantise, dtype=torch.float32):
    model = load_4bit(path, double_quant, dtype, quantise)
    return logits_of(model, ROW)


def make_saved(name, base, double_quant):
    folder = fresh_folder("quantised", name)
    load_4bit(base, double_quant).save_pretrained(folder)
    for file in os.listdir(folder):
        if file not in ("config.json", "model.safetensors"):
            os.remove(f"{folder}/{file}")
    write_json(f"{folder}/golden.json", {
        "input_ids": ROW, "logits": logits(folder, double_quant, quantise=False).tolist()})
    return folder


def make_trajectory(base, double_quant, case="qlora", wrap=wrap):
    folder = fresh_folder("trajectories", case)
    recipe, batches = dict(RECIPE), make_batches(1000 + SEED, STEPS)
    save(wrap(load_model(base), SEED), f"{folder}/start")

    def run(split_rows=False, dtype=torch.float32):
        model = PeftModel.from_pretrained(load_4bit(base, double_quant, dtype), f"{folder}/start",
                                          is_trainable=True).train()
        assert all(p.dtype == torch.float32 for p in factors(model).values())
        curve = train(model, recipe, batches, split_rows)
        return model, curve, detached(factors(model))

    model, (losses, norms, rates), final = run()
    save(model, f"{folder}/final")
    _, other, other_final = run(split_rows=True)
    _, half, half_final = run(dtype=torch.bfloat16)
    assert losses[-1] < losses[0], losses
    write_json(f"{folder}/golden.json", {
        "model": f"{QUANTISED}/base", "recipe": recipe, "batches": batches, "losses": losses,
        "grad_norms": norms, "learning_rates": rates,
        "noise": {"losses": loss_distance(other[0], losses), "final": distance(other_final, final)},
        "losses_bf16": half[0],
        "bf16_distance": {"losses": loss_distance(half[0], losses),
                          "final": distance(half_final, final)}})
    print(f"{case}: loss {losses[0]:.3f} -> {losses[-1]:.3f}; row by row differs "
          f"{loss_distance(other[0], losses)['max_relative']:.1e}, {distance(other_final, final)}; "
          f"bf16 {distance(half_final, final)}")


def make_merged(base):
    """What the files of a merge must say: the trained adapter on the quantised base, not merged."""
    folder = "tests/golden/trajectories/qlora"
    rows = [ROW, [5, 17, 80, 3, 44, 61, 9]]
    golden = {"base": base, "adapter": f"{folder}/final", "input_ids": rows}
    for name, double_quant in (("logits", True), ("logits_single", False)):
        model = PeftModel.from_pretrained(load_4bit(base, double_quant), f"{folder}/final").train()
        golden[name] = [logits_of(model, row).tolist() for row in rows]
    write_json(f"{folder}/merged.json", golden)


def main():
    base = make_base("base")
    dense = logits_of(load_model(base), ROW)
    double = logits(base, True, quantise=True)
    write_json(f"{base}/golden.json", {"input_ids": ROW, "logits": dense.tolist(),
                                       "logits_nf4": double.tolist(),
                                       "logits_nf4_single": logits(base, False, True).tolist()})
    print("nf4 changes logits by", float((dense - double).abs().max() / dense.abs().max()))
    make_saved("nf4_double", base, True)
    make_saved("nf4_single", base, False)
    make_trajectory(base, True)
    make_trajectory(base, True, "qdora", wrap_dora)
    make_merged(base)


if __name__ == "__main__":
    main()
