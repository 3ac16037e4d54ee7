# Makes every golden file of this folder with transformers and PEFT:
#   python tests/golden/make_golden.py [models adapters ...]
# README.md tells what each file is. Same versions, same machine: same bytes.
import importlib
import os
import sys

PARTS = ("models", "adapters", "targets", "trajectories", "pissa", "qlora", "nf4", "dropout", "dora", "stacks",
         "schedules", "sampling")


def main():
    # PEFT writes sets as lists, in the order of string hashes.
    if os.environ.get("PYTHONHASHSEED") != "0":
        env = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], env)
    here = os.path.dirname(os.path.abspath(__file__))
    os.chdir(os.path.join(here, "..", ".."))
    for part in sys.argv[1:] or PARTS:
        print(f"-- {part}")
        importlib.import_module(f"make_{part}").main()


if __name__ == "__main__":
    main()
