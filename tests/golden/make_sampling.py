# What transformers' logits processors leave of a row of logits, alone and together, in the order
# in which generate() runs them: repetition penalty, temperature, top-k, top-p, min-p.
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as lp

from common import generator, load_model, write_json

VOCAB = 50
SETTINGS = [
    {}, {"temperature": 0.7}, {"temperature": 1.8}, {"top_k": 1}, {"top_k": 10}, {"top_k": 500},
    {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 1e-6}, {"min_p": 0.05}, {"min_p": 0.5},
    {"min_p": 1.0}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
    {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"repetition_penalty": 1.2, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.1},
]


def processors(s):
    out = LogitsProcessorList()
    if "repetition_penalty" in s:
        out.append(lp.RepetitionPenaltyLogitsProcessor(s["repetition_penalty"]))
    if "temperature" in s:
        out.append(lp.TemperatureLogitsWarper(s["temperature"]))
    if "top_k" in s:
        out.append(lp.TopKLogitsWarper(s["top_k"]))
    if "top_p" in s:
        out.append(lp.TopPLogitsWarper(s["top_p"]))
    if "min_p" in s:
        out.append(lp.MinPLogitsWarper(s["min_p"]))
    return out


def check_order(settings):
    """generate() itself must build the same list."""
    model = load_model("llama_gqa")
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    theirs = model._get_logits_processor(config, input_ids_seq_length=3, device="cpu")
    assert [type(p) for p in theirs] == [type(p) for p in processors(settings)], theirs


def main():
    check_order(SETTINGS[-1])
    gen, rows = generator(401), []
    for scale in (1.0, 3.0, 0.2):
        rows.append({"logits": scale * torch.randn(VOCAB, generator=gen),
                     "previous_ids": torch.randint(0, VOCAB, (9,), generator=gen).tolist()})
    cases = []
    for row, data in enumerate(rows):
        for settings in SETTINGS:
            ids = torch.tensor([data["previous_ids"]])
            scores = processors(settings)(ids, data["logits"][None].clone())[0]
            kept = [None if v == float("-inf") else v for v in scores.tolist()]
            cases.append({"row": row, "settings": settings, "scores": kept,
                          "probabilities": scores.softmax(-1)})
    write_json("tests/golden/sampling.json", {"rows": rows, "cases": cases})
    kept = [sum(v is not None for v in c["scores"]) for c in cases]
    print(f"{len(cases)} cases, keeping {min(kept)} to {max(kept)} of {VOCAB} tokens")


if __name__ == "__main__":
    main()
