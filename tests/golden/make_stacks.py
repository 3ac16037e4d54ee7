# Several adapters on one base: logits of W + sum_i w_i (W'_i - W), where PEFT makes each W'_i by
# merging it alone; and the singular values of those sums, by torch.
from adapters import adapted
from common import MODELS, fresh_folder, generator, largest_difference, load_model, logits_of
from common import write_json

import torch
from peft import PeftModel

# case: (model, [(adapter, weight), ...])
CASES = {
    "mixed_ranks": ("qwen3_tied", [("qwen3_tied", 0.7), ("patterns", -0.4)]),
    "mixed_rslora": ("qwen2_tied", [("qwen2_tied", 1.0), ("patterns_all_layers", 0.5)]),
    "three": ("llama_gqa", [("llama_gqa", 0.5), ("regex", 1.5), ("llama_gqa", 0.25)]),
    "one": ("qwen2_tied", [("patterns_all_layers", 1.0)]),
    "dora": ("llama_bias", [("dora_bias", 0.6)]),
    "dora_and_lora": ("qwen2_tied", [("qwen2_tied", 0.5), ("dora_qwen2_tied", 0.7)]),
    "dora_patterns": ("qwen3_tied", [("dora_patterns", 1.0), ("qwen3_tied", -0.3)]),
}
RANK = 3


def deltas(name, adapter):
    """W' - W in float64 of every module that the adapter changes, by PEFT's own merge."""
    base = load_model(name, torch.float64)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    peft = PeftModel.from_pretrained(base, f"tests/golden/adapters/{adapter}",
                                     autocast_adapter_dtype=False)
    for _, module in adapted(peft):
        module.lora_A.double(), module.lora_B.double()
    after = peft.merge_and_unload().state_dict()
    return {k: after[k] - before[k] for k in before if not torch.equal(after[k], before[k])}


def total(name, adapters):
    result = {}
    for adapter, weight in adapters:
        for key, delta in deltas(name, adapter).items():
            result[key] = result.get(key, 0) + weight * delta
    return result


def with_deltas(name, change):
    model = load_model(name, torch.float64)
    state = model.state_dict()
    for key, delta in change.items():
        state[key] += delta
    return model


def cut(delta, rank):
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    energy = float((s[:rank] ** 2).sum() / (s**2).sum())
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank], energy


def check_against_peft(name, adapters):
    """PEFT's own cat, where it is right: plain scaling, no patterns."""
    model = PeftModel.from_pretrained(load_model(name), f"tests/golden/adapters/{adapters[0][0]}",
                                      adapter_name="a0")
    for i, (adapter, _) in enumerate(adapters[1:], 1):
        model.load_adapter(f"tests/golden/adapters/{adapter}", adapter_name=f"a{i}")
    model.add_weighted_adapter([f"a{i}" for i in range(len(adapters))], [w for _, w in adapters],
                               "all", combination_type="cat")
    model.set_adapter("all")
    return model.eval()


def main():
    folder = fresh_folder("stacks")
    for case, (name, adapters) in CASES.items():
        gen = generator(3000 + list(CASES).index(case))
        rows = [torch.randint(3, 96, (n,), generator=gen).tolist() for n in (15, 8)]
        change = total(name, adapters)
        logits = [logits_of(with_deltas(name, change), r) for r in rows]
        short = {key: cut(delta, RANK) for key, delta in change.items()}
        cut_model = with_deltas(name, {key: value for key, (value, _) in short.items()})
        base = [logits_of(load_model(name), r) for r in rows]
        effect = largest_difference(base, logits)
        assert effect > 0.02, (case, effect)
        write_json(f"{folder}/{case}.json", {
            "model": f"{MODELS}/{name}",
            "adapters": [[f"tests/golden/adapters/{a}", w] for a, w in adapters],
            "input_ids": rows, "logits": logits, "rank": RANK,
            "energy": {key.removesuffix(".weight"): e for key, (_, e) in short.items()},
            "svd_logits": [logits_of(cut_model, r) for r in rows]})
        print(f"{case}: moves the logits by {effect:.2f} of the largest")
    # The sum that PEFT itself makes of two plain adapters.
    plain = [("llama_gqa", 0.6), ("llama_gqa", -0.9)]
    row = [5, 17, 80, 3, 44, 9, 61]
    ours = logits_of(with_deltas("llama_gqa", total("llama_gqa", plain)), row)
    theirs = logits_of(check_against_peft("llama_gqa", plain), row)
    difference = largest_difference([theirs], [ours])
    assert difference < 1e-5, difference
    print(f"PEFT's cat of two plain adapters: the same to {difference:.1e}")


if __name__ == "__main__":
    main()
