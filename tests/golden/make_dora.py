# DoRA by PEFT: adapters with its logits, gradients, and training step by step, without dropout and
# under graft's masks. The files lie beside those of LoRA, in folders dora_*.
import torch
from peft import PeftModel
from safetensors.torch import save_file

from adapters import adapted, factors, save, wrap
from common import MODELS, fresh_folder, generator, load_model, write_json
from make_adapters import PATTERNS
from make_adapters import make as make_adapter
from make_dropout import P, mask
import make_dropout
import make_trajectories as trajectories

# case: (model, seed, other keys of LoraConfig)
ADAPTERS = {
    "dora_llama_gqa": ("llama_gqa", 401, {}),
    "dora_bias": ("llama_bias", 402, {}),
    "dora_qwen2_tied": ("qwen2_tied", 403, {"use_rslora": True}),
    "dora_patterns": ("qwen3_tied", 404, {**PATTERNS, "layers_to_transform": [1]}),
}
# case: (model, seed, other keys of LoraConfig, changes to the recipe)
TRAJECTORIES = {
    "dora_llama_gqa": ("llama_gqa", 411, {}, {"max_grad_norm": 10.0}),
    "dora_qwen2_rslora": ("qwen2_tied", 412, {"use_rslora": True, "lora_alpha": 3}, {}),
    "dora_patterns": ("qwen3_tied", 413, {**PATTERNS, "lora_alpha": 4}, {"weight_decay": 0.01}),
    "dora_loraplus": ("llama_gqa", 414, {}, {"loraplus_lr_ratio": 8.0, "learning_rate": 2e-3,
                                             "weight_decay": 0.05}),
}
DROPOUT_SEED = 42  # graft's default


def wrap_dora(model, seed, **config):
    """PEFT sets m to the norms, so that m / norm is 1: move it away from that."""
    wrapped = wrap(model, seed, use_dora=True, **config)
    gen = generator(2000 + seed)
    for _, module in adapted(wrapped):
        m = module.lora_magnitude_vector["default"].weight
        m.data *= 0.5 + torch.rand(m.shape, generator=gen)
    return wrapped


def loss_and_gradients(model, ids, labels):
    out = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad for name, p in factors(model).items()}
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
    return out, gradients


def gradients_of(folder, rows, loaded):
    labels = [-100] * 4 + rows[0][4:]
    out, gradients = loss_and_gradients(loaded, rows[0], labels)
    save_file(gradients, f"{folder}/gradients.safetensors", metadata={"format": "pt"})
    return {"labels": labels, "loss": out.loss.item()}


class MaskedDropout(torch.nn.Module):
    """step and first_row are those of the row that is being trained on."""
    step, first_row = 0, 0

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):  # [1, T, in]
        make_dropout.SEED, make_dropout.STEP = DROPOUT_SEED, MaskedDropout.step
        make_dropout.FIRST_ROW = MaskedDropout.first_row
        return x * mask(x.shape[1], x.shape[2], self.module)


def with_masks(folder, name):
    model = PeftModel.from_pretrained(load_model(name), folder, is_trainable=True).train()
    for number, (_, layer) in enumerate(adapted(model)):
        layer.lora_dropout["default"] = MaskedDropout(number)
    return model


def make_dropout_gradients():
    """llama_bias: with dropout the bias stands outside both products."""
    folder = fresh_folder("dora_dropout")
    save(wrap_dora(load_model("llama_bias"), 421, lora_dropout=P), f"{folder}/adapter")
    model = with_masks(f"{folder}/adapter", "llama_bias")
    MaskedDropout.step, MaskedDropout.first_row = 5, 0
    ids = torch.randint(3, 96, (12,), generator=generator(1421)).tolist()
    labels = [-100] * 4 + ids[4:]
    out, gradients = loss_and_gradients(model, ids, labels)
    save_file(gradients, f"{folder}/gradients.safetensors", metadata={"format": "pt"})
    write_json(f"{folder}/golden.json", {
        "model": f"{MODELS}/llama_bias", "seed": DROPOUT_SEED, "step": 5, "first_row": 0, "p": P,
        "input_ids": ids, "labels": labels, "loss": out.loss.item()})
    print(f"dora_dropout: loss {out.loss.item():.4f}")


class RowByRow:
    """A model as trajectories.train calls it, that tells the masks which row comes: graft packs the
    rows of a step one after the other, so the rows of its masks count the tokens before."""

    def __init__(self, model, lengths):
        self.model, self.lengths, self.calls = model, lengths, 0

    def parameters(self):
        return self.model.parameters()

    def __call__(self, **batch):
        step, row = divmod(self.calls, len(self.lengths[0]))
        MaskedDropout.step = step + 1
        MaskedDropout.first_row = sum(self.lengths[step][:row])
        self.calls += 1
        return self.model(**batch)


def make_dropout_trajectory():
    name, case = "qwen2_tied", "dora_dropout"
    folder = fresh_folder("trajectories", case)
    batches = trajectories.make_batches(1431, trajectories.STEPS)
    save(wrap_dora(load_model(name), 431, lora_dropout=P), f"{folder}/start")
    model = with_masks(f"{folder}/start", name)
    lengths = [[len(row["input_ids"]) for rows in step for row in rows] for step in batches]
    losses, norms, rates = trajectories.train(RowByRow(model, lengths), trajectories.RECIPE,
                                              batches, split_rows=True)
    save(model, f"{folder}/final")
    write_json(f"{folder}/golden.json", {
        "model": f"{MODELS}/{name}", "recipe": trajectories.RECIPE, "batches": batches,
        "losses": losses, "grad_norms": norms, "learning_rates": rates})
    print(f"{case}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


def main():
    for case, arguments in ADAPTERS.items():
        make_adapter(case, *arguments, wrap=wrap_dora, more=gradients_of)
    make_dropout_gradients()
    trajectories.wrap = wrap_dora
    for case, arguments in TRAJECTORIES.items():
        trajectories.make(case, *arguments)
    make_dropout_trajectory()


if __name__ == "__main__":
    main()
