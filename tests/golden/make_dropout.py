# PEFT's forward and backward under graft's dropout masks, which tensor/random.h defines: each
# lora_dropout of the PEFT model is replaced by one that multiplies by the mask of its module.
import torch
from peft import PeftModel
from safetensors.torch import save_file

from adapters import adapted, factors, save, wrap
from common import MODELS, fresh_folder, generator, load_model, write_json

SEED, STEP, FIRST_ROW, P = 1234, 5, 0, 0.25
TOKENS, PROMPT = 12, 4
WORD = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 of Salmon et al., on Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


# The known answers of Random123 (kat_vectors, philox4x32 10).
assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
assert philox((WORD,) * 4, (WORD,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
assert philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
    0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def mask(rows, cols, module):
    """[rows, cols]: 1 / (1 - p) where the element is kept, else 0."""
    threshold = int(P * 2**32)
    out = torch.zeros(rows, cols)
    for i in range(rows):
        row = FIRST_ROW + i
        key = (SEED & WORD, (SEED >> 32) ^ (row >> 32))
        for col in range(cols):
            word = philox((col // 4, row & WORD, module, STEP), key)[col % 4]
            out[i, col] = 1 / (1 - P) if word >= threshold else 0
    return out


class MaskedDropout(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):  # [1, T, in]
        return x * mask(x.shape[1], x.shape[2], self.module)


def main():
    folder = fresh_folder("dropout")
    save(wrap(load_model("qwen3_tied"), 301, lora_dropout=P), f"{folder}/adapter")
    model = PeftModel.from_pretrained(load_model("qwen3_tied"), f"{folder}/adapter",
                                      is_trainable=True).train()
    names = []
    for number, (name, layer) in enumerate(adapted(model)):
        layer.lora_dropout["default"] = MaskedDropout(number)
        names.append(name)
    ids = torch.randint(3, 96, (TOKENS,), generator=generator(1301)).tolist()
    labels = [-100] * PROMPT + ids[PROMPT:]
    out = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad for name, p in factors(model).items()}
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
    save_file(gradients, f"{folder}/gradients.safetensors", metadata={"format": "pt"})
    first = mask(TOKENS, 32, 0)
    write_json(f"{folder}/golden.json", {
        "model": f"{MODELS}/qwen3_tied", "seed": SEED, "step": STEP, "first_row": FIRST_ROW,
        "p": P, "modules": names, "input_ids": ids, "labels": labels, "loss": out.loss.item(),
        "logits": out.logits[0],
        "kept_module_0": [[int(v > 0) for v in row] for row in first.tolist()]})
    print(f"{len(names)} modules, loss {out.loss.item():.4f}, kept "
          f"{float((first > 0).float().mean()):.3f}")


if __name__ == "__main__":
    main()
