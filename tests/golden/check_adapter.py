# Does an adapter that graft wrote load in PEFT, and give the logits that graft printed?
#   python tests/golden/check_adapter.py DIR_MODEL DIR_ADAPTER LOGITS.json
# LOGITS.json: {"input_ids": [row, ...], "logits": [[[...] per position] per row]}.
import json
import sys

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from common import largest_difference, load_model, logits_of

LIMIT = 1e-5  # of the largest logit


def main():
    if len(sys.argv) != 4:
        sys.exit("usage: check_adapter.py DIR_MODEL DIR_ADAPTER LOGITS.json")
    model_dir, adapter_dir, logits_file = sys.argv[1:]
    with open(logits_file, encoding="utf-8") as file:
        ours = json.load(file)
    base = load_model(model_dir)
    before = [logits_of(base, row) for row in ours["input_ids"]]
    model = PeftModel.from_pretrained(base, adapter_dir).eval()

    # PEFT only warns about keys that it misses or does not know.
    with safe_open(f"{adapter_dir}/adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    wanted = set(get_peft_model_state_dict(model))
    if stored != wanted:
        sys.exit(f"tensors: missing {sorted(wanted - stored)}, unknown {sorted(stored - wanted)}")

    theirs = [logits_of(model, row) for row in ours["input_ids"]]
    graft = [torch.tensor(row, dtype=torch.float32) for row in ours["logits"]]
    if [tuple(g.shape) for g in graft] != [tuple(t.shape) for t in theirs]:
        sys.exit("logits: not one row of the vocabulary's size for each position")
    difference = largest_difference(graft, theirs)
    print(f"largest difference {difference:.2e} of the largest logit (limit {LIMIT:g}); the "
          f"adapter moves the logits by {largest_difference(before, theirs):.2e}")
    sys.exit(0 if difference <= LIMIT else 1)


if __name__ == "__main__":
    main()
