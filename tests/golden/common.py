# What every make_*.py of this folder shares: where files go, how JSON is written, how models load.
# Nothing here draws a random number without a seed that its caller names.
import json
import os
import warnings
import shutil

import torch
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
MODELS = "tests/golden/models"  # relative to the repository root, where make_golden.py runs

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)


def round9(value):
    """Nine significant digits: enough to give every float32 back exactly."""
    if isinstance(value, torch.Tensor):
        value = value.detach().double().tolist()
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, (list, tuple)):
        return [round9(v) for v in value]
    if isinstance(value, dict):
        return {k: round9(v) for k, v in value.items()}
    return value


def write_json(path, value):
    """One key of the top level per line, no spaces inside: compact, and still fit for a diff."""
    value = round9(value)
    if isinstance(value, dict):
        rows = [f"{json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}" for k, v in value.items()]
        text = "{" + ",\n".join(rows) + "}\n"
    else:
        text = "[" + ",\n".join(json.dumps(v, separators=(",", ":")) for v in value) + "]\n"
    with open(path, "w", encoding="utf-8") as out:
        out.write(text)


def fresh_folder(*parts):
    path = os.path.join("tests/golden", *parts)
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    return path


def generator(seed):
    return torch.Generator().manual_seed(seed)


def load_model(name, dtype=torch.float32):
    path = name if os.path.isdir(name) else f"{MODELS}/{name}"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    )
    return model.eval()


def logits_of(model, ids):
    """[T, V] in float32, for one row without padding."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def largest_difference(a, b):
    """Of two lists of logits: the largest difference, relative to the largest logit."""
    a, b = torch.cat([x.flatten() for x in a]), torch.cat([x.flatten() for x in b])
    return float((a - b).abs().max() / b.abs().max())
