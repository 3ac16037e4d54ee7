"""NF4 and 8-bit quantisation as bitsandbytes does them on the CPU, into nf4.json and optim8.json.

    python tests/golden/make_nf4.py

Inputs are made by a formula that tests/nf4_test.cpp repeats, so that the files hold results alone.
"""
import json
import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import bitsandbytes as bnb
import bitsandbytes.functional as F
import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Blocks of 64 run across rows; the last may be short, odd, or the only one; more than one group of
# 256 blocks; enough of them for torch's sum to have several levels; a block of zeros.
CASES = [([64, 64], "F32"), ([128, 192], "F32"), ([5, 96], "F32"), ([7, 33], "F32"), ([1, 1], "F32"),
         ([3, 100], "BF16"), ([100, 200], "BF16"), ([40, 72], "F16"), ([3, 64], "F32"), ([520, 640], "BF16"),
         ([700, 1024], "F32")]


def values(n, seed):
    i = np.arange(n, dtype=np.int64)
    u = (i * 2654435761 + seed * 40503) & 0xFFFFFFFF
    x = (u >> 8).astype(np.float32) * np.float32(2**-24) - np.float32(0.5)
    block = i // 64
    scale = ((block * 37 % 101) + 1).astype(np.float32) * np.float32(2**-7)
    return torch.from_numpy(np.where(block == 2, np.float32(0), x * scale))


def fnv(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def raw(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def nf4_case(shape, dtype, seed):
    dense = values(int(np.prod(shape)), seed).to(DTYPES[dtype]).reshape(shape)
    codes, state = F.quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    single_codes, single = F.quantize_4bit(dense, blocksize=64, compress_statistics=False, quant_type="nf4")
    assert raw(codes) == raw(single_codes)
    return {
        "shape": shape, "dtype": dtype, "seed": seed,
        "codes": raw(codes).hex() if codes.numel() <= 4096 else None, "codes_fnv": fnv(raw(codes)),
        "absmax_codes": raw(state.absmax).hex(), "scales": raw(state.state2.absmax).hex(),
        "offset": raw(state.offset.reshape(1)).hex(), "absmax_fnv": fnv(raw(single.absmax)),
        "dense_f32_fnv": fnv(raw(dequantised(codes, state, torch.float32))),
        "dense_bf16_fnv": fnv(raw(dequantised(codes, state, torch.bfloat16))),
    }


def dequantised(codes, state, dtype):
    """What a compute dtype sees. bitsandbytes' own kernel agrees, but for rows of an odd number of 32s: there 0.50.2
    takes the scales of other blocks (largest error 0.55 on normal values of (5, 96))."""
    absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    code = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()[:state.shape.numel()]
    dense = (state.code[code] * absmax.repeat_interleave(64)[:len(code)]).reshape(state.shape).to(dtype)
    theirs = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, 64, "nf4", state.shape, dtype)
    assert state.shape[-1] % 64 == 32 or torch.equal(dense, theirs)
    return dense


def optimizer_case():
    """bitsandbytes.optim.AdamW8bit on one tensor of 5000 elements and one of 300, which is too small for 8 bits."""
    shapes = {"large": 5000, "small": 300}
    parameters = {name: torch.nn.Parameter(values(n, 3 + k)) for k, (name, n) in enumerate(shapes.items())}
    optimizer = bnb.optim.AdamW8bit(parameters.values(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        for k, (name, n) in enumerate(shapes.items()):
            parameters[name].grad = values(n, 100 * step + k) * (0.5 + step)
        optimizer.step()
    result = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1, "steps": 5}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        result[name] = {"values": raw(parameter).hex(), "state1": raw(state["state1"]).hex(),
                        "state2": raw(state["state2"]).hex()}
        if name == "large":
            result[name] |= {"absmax1": raw(state["absmax1"]).hex(), "absmax2": raw(state["absmax2"]).hex()}
    return result


def main():
    torch.set_num_threads(1)
    with open(os.path.join(HERE, "nf4.json"), "w") as file:
        json.dump({
            "bitsandbytes": bnb.__version__, "torch": torch.__version__,
            "signed_map": raw(F.create_dynamic_map(signed=True)).hex(),
            "unsigned_map": raw(F.create_dynamic_map(signed=False)).hex(),
            "cases": [nf4_case(shape, dtype, seed) for seed, (shape, dtype) in enumerate(CASES)],
        }, file, indent=1)
    with open(os.path.join(HERE, "optim8.json"), "w") as file:
        json.dump(optimizer_case(), file, indent=1)


if __name__ == "__main__":
    main()
