# The learning rates that transformers' get_scheduler gives. values[i] is the one of step i + 1.
import torch
from transformers import get_scheduler

from common import write_json

STEPS, RATE = 40, 2e-4
KINDS = {"constant": {}, "constant_with_warmup": {}, "linear": {}, "cosine": {},
         "cosine_with_min_lr": {"min_lr_rate": 0.1}}


def values(kind, warmup, extra):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS,
                             scheduler_specific_kwargs=extra or None)
    out = []
    for _ in range(STEPS):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def main():
    cases = [{"lr_scheduler_type": kind, "learning_rate": RATE, "max_steps": STEPS,
              "warmup_steps": warmup, **extra, "values": values(kind, warmup, extra)}
             for kind, extra in KINDS.items() for warmup in (0, 5)]
    write_json("tests/golden/schedules.json", cases)
    print(f"{len(cases)} schedules")


if __name__ == "__main__":
    main()
