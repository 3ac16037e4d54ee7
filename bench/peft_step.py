"""The peer of train_step: one LoRA training step with PEFT, on the CPU or a GPU. Prints one line of JSON.

    peft_step.py MODEL --device cpu --dtype bfloat16 --seq 512 --batch 1 --rank 16 --steps 4 --threads 2
                 [--attn sdpa|flash_attention_2] [--compile] [--checkpoint] [--method lora|qlora|dora]

MODEL is a directory, or a config.json: then weights are random, made on the device.
"""
import argparse
import contextlib
import json
import os
import pathlib
import resource
import statistics
import sys
import time


def since_process_start():
    ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
    return float(open("/proc/uptime").read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--seq", type=int, default=512)
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--threads", type=int, default=0)
parser.add_argument("--attn", default="sdpa")
parser.add_argument("--method", default="lora", choices=["lora", "qlora", "dora"])
parser.add_argument("--compile", action="store_true")
parser.add_argument("--checkpoint", action="store_true")
args = parser.parse_args()

import peft  # noqa: E402  (the clock above started with the process)
import torch  # noqa: E402
import transformers  # noqa: E402

on_gpu = args.device == "cuda"
if args.threads:
    torch.set_num_threads(args.threads)
torch.manual_seed(0)
row = {"who": "peft" + ("" if args.attn == "sdpa" else "+" + args.attn) + ("+compile" if args.compile else ""),
       "method": args.method, "model": pathlib.Path(args.model).stem, "device": args.device, "dtype": args.dtype, "seq": args.seq,
       "batch": args.batch, "checkpoint": args.checkpoint,
       "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"}


def quantised(model):
    """Linear layers but lm_head as Linear4bit: what from_pretrained with BitsAndBytesConfig gives."""
    import bitsandbytes as bnb
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        with torch.device("meta"):
            linear = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None,
                                       compute_dtype=getattr(torch, args.dtype), compress_statistics=True,
                                       quant_type="nf4")
        linear.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, compress_statistics=True,
                                          quant_type="nf4")
        linear.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear.to(args.device))
    return model


def make_model():
    options = {"dtype": getattr(torch, args.dtype), "attn_implementation": args.attn}
    with torch.device(args.device) if on_gpu else contextlib.nullcontext():
        if args.model.endswith(".json"):
            config = transformers.AutoConfig.from_pretrained(args.model)
            model = transformers.AutoModelForCausalLM.from_config(config, **options)
            if args.method == "qlora":
                model = quantised(model)
        else:
            if args.method == "qlora":
                options["device_map"] = args.device
                options["quantization_config"] = transformers.BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=options["dtype"])
            model = transformers.AutoModelForCausalLM.from_pretrained(args.model, **options)
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, task_type="CAUSAL_LM",
            use_dora=args.method == "dora",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]))
    model.to(args.device)
    model.config.use_cache = False
    model.train()
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def train(model):
    step_model = torch.compile(model) if args.compile else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    # On a GPU its fastest form, one kernel for all parameters; on the CPU the default.
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, **({"fused": True} if on_gpu else {}))
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq)).to(args.device)
    times, first = [], None
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        loss = step_model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if first is None:
            first = since_process_start()
    step = statistics.median(times[1:])
    row.update({
        "threads": torch.get_num_threads(), "loss": round(value, 4), "step_s": round(step, 5),
        "tok_s": round(args.batch * args.seq / step, 1), "first_step_s": round(times[0], 3),
        "start_to_first_step_s": round(first, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)})
    if on_gpu:
        row["peak_gpu_gib"] = {"at_once": round(torch.cuda.max_memory_allocated() / 2**30, 3),
                               "reserved": round(torch.cuda.max_memory_reserved() / 2**30, 3)}


try:
    train(make_model())
except (ImportError, RuntimeError) as error:  # out of memory is a RuntimeError, a missing flash-attn an ImportError
    row["error"] = (str(error).splitlines() or [type(error).__name__])[0]
print(json.dumps(row))
sys.exit("error" in row)
