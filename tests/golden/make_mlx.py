# An adapter that mlx-lm made, with mlx-lm's logits. Needs mlx and mlx_lm (0.32, the CPU build will do)
# beside what the other scripts need; run it from the repository root:
#   python tests/golden/make_mlx.py
import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from common import fresh_folder, write_json

# case: (model, number of layers from the last, parameters)
CASES = {
    "all_layers": ("llama_gqa", 2, {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": None}),
    "last_layer": ("qwen2_tied", 1, {"rank": 3, "scale": 20.0, "dropout": 0.1,
                                     "keys": ["self_attn.q_proj", "mlp.down_proj"]}),
    "dora": ("qwen2_tied", 2, {"rank": 2, "scale": 4.0, "dropout": 0.0,
                               "keys": ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]}),
}
ROW = [5, 17, 80, 3, 44, 9, 61, 12]


def main():
    for i, (case, (name, layers, parameters)) in enumerate(CASES.items()):
        folder = fresh_folder("mlx", case)
        mx.random.seed(40 + i)
        model, _ = load_model(Path(f"tests/golden/models/{name}"))
        base = model(mx.array([ROW]))
        model.freeze()
        keys = parameters["keys"]
        linear_to_lora_layers(model, layers, {**parameters, "keys": keys and set(keys)},
                              use_dora=case == "dora")
        weights = dict(tree_flatten(model.trainable_parameters()))
        for key in weights:  # B begins as zero
            if key.endswith("lora_b"):
                weights[key] = mx.random.normal(weights[key].shape) * 0.1
            if key.endswith(".m"):
                weights[key] = weights[key] * mx.random.uniform(0.5, 1.5, weights[key].shape)
        model.load_weights(list(weights.items()), strict=False)
        model.eval()
        logits = model(mx.array([ROW]))
        assert mx.abs(logits - base).max() > 0.05 * mx.abs(base).max()
        mx.save_safetensors(f"{folder}/adapters.safetensors", weights)
        config = {"fine_tune_type": "dora" if case == "dora" else "lora", "num_layers": layers, "lora_parameters": parameters,
                  "model": f"tests/golden/models/{name}", "iters": 1000}
        Path(f"{folder}/adapter_config.json").write_text(json.dumps(config, indent=4))
        write_json(f"{folder}/golden.json", {"model": f"tests/golden/models/{name}",
                                             "input_ids": [ROW], "logits": logits.tolist()})
        print(case, len(weights))


if __name__ == "__main__":
    main()
