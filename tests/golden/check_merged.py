# Does a model that graft merged load in transformers, and give the golden logits of the sum?
#   python tests/golden/check_merged.py DIR_MERGED tests/golden/stacks/CASE.json
import json
import sys

import torch

from common import largest_difference, load_model, logits_of

LIMIT = 1e-5  # of the largest logit


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: check_merged.py DIR_MERGED STACK.json")
    with open(sys.argv[2], encoding="utf-8") as file:
        golden = json.load(file)
    model = load_model(sys.argv[1])
    got = [logits_of(model, row) for row in golden["input_ids"]]
    wanted = [torch.tensor(row) for row in golden["logits"]]
    difference = largest_difference(got, wanted)
    print(f"largest difference {difference:.2e} of the largest logit (limit {LIMIT:g})")
    sys.exit(0 if difference <= LIMIT else 1)


if __name__ == "__main__":
    main()
