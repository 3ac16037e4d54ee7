#!/usr/bin/env bash
# make bench-peers: the same training step in graft and in PEFT, in turn, several rounds in one run, medians.
# Qwen2.5-0.5B's shape, random weights, LoRA r 16 on the seven projections, no dropout.
#   ROUNDS=3 STEPS=3 THREADS=0 COMPILE=0   COMPILE=1 adds torch.compile, two minutes to its first step
#   CASES="float32:512 bfloat16:512 bfloat16:2048" also bfloat16:512:qlora, against bitsandbytes   SETTINGS="default tuned"   KEEP=1 adds to the last run's log
#   PEERS_PYTHON=path/to/python             an environment that has torch, transformers and peft; else one is made
set -eu
step=$1
rounds=${ROUNDS:-3}
steps=${STEPS:-3}
threads=${THREADS:-$(nproc)}
work=${WORK:-build/peers}
mkdir -p "$work"

python=${PEERS_PYTHON:-$work/venv/bin/python}
if ! "$python" -c 'import torch, transformers, peft' 2>/dev/null; then
  echo "making a Python environment in $work/venv (6 GB)"
  python3 -m venv "$work/venv"
  "$work/venv/bin/pip" install -q torch transformers peft
  python=$work/venv/bin/python
fi

for dtype in float32 bfloat16; do
  [ -f "$work/$dtype/model.safetensors" ] ||
    "$step" --make bench/models/qwen2.5-0.5b.json "$work/$dtype" $dtype
done

log=$work/results.jsonl
[ "${KEEP:-0}" = 1 ] || : >"$log"
settings=${SETTINGS:-default tuned}
run() { echo "  $*" >&2; "$@" 2>>"$work/errors.log" | tail -n 1 | tee -a "$log" >&2; }
tuned() {  # glibc told to keep memory instead of giving it back: the fastest setting of eager PyTorch on the CPU
  echo "  tuned malloc: $*" >&2
  MALLOC_MMAP_THRESHOLD_=34359738368 MALLOC_TRIM_THRESHOLD_=34359738368 "$@" 2>>"$work/errors.log" |
    tail -n 1 | sed 's/"who": "peft/"who": "peft+malloc/' | tee -a "$log" >&2
}
for round in $(seq "$rounds"); do
  echo "round $round of $rounds" >&2
  for case in ${CASES:-float32:512 bfloat16:512 bfloat16:2048}; do
    IFS=: read -r dtype seq method <<<"$case"
    common="$work/$dtype --dtype $dtype --seq $seq --steps $steps --threads $threads --method ${method:-lora}"
    run "$step" $common
    case " $settings " in *" default "*) run "$python" bench/peft_step.py $common ;; esac
    case " $settings " in *" tuned "*) tuned "$python" bench/peft_step.py $common ;; esac
    if [ "${COMPILE:-0}" = 1 ]; then tuned "$python" bench/peft_step.py $common --compile; fi
  done
done
"$python" bench/peers_table.py "$log" | tee "$work/table.md"
