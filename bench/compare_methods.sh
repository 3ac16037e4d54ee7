#!/usr/bin/env bash
# make compare-methods: what full, LoRA, QLoRA and DoRA cost at the Qwen2.5-0.5B shape (random weights, BF16, 512 tokens, r 16, seven
# projections), in turn, medians; and what they reach with the bundled model on its three tasks. Writes the README's tables.
#   ROUNDS=2 STEPS=2 THREADS=0 RANKS=2,4,8,16,32 SEEDS=3 PART="cost quality table"
set -eu
step=$1
compare=$2
page=$3
work=${WORK:-build/compare}
threads=${THREADS:-$(nproc)}
part=${PART:-cost quality table}
mkdir -p "$work"
has() { case " $part " in *" $1 "*) true ;; *) false ;; esac }

if has cost; then
  model=$work/bfloat16
  [ -f "$model/model.safetensors" ] || "$step" --make bench/models/qwen2.5-0.5b.json "$model" bfloat16
  : >"$work/cost.jsonl"
  for round in $(seq "${ROUNDS:-2}"); do
    for method in full lora qlora dora; do
      "$step" "$model" --method $method --seq 512 --steps "${STEPS:-2}" --threads "$threads" | tail -n 1 | tee -a "$work/cost.jsonl" >&2 || true
    done
  done
fi
if has quality; then
  # Small products gain little from a second thread: as many processes, of one thread each.
  rm -f "$work"/quality.*.jsonl
  pids=
  for shard in $(seq 0 $((threads - 1))); do
    "$compare" quality models/demo "$work" --ranks "${RANKS:-2,4,8,16,32}" --seeds "${SEEDS:-3}" --shard "$shard/$threads" --threads 1 \
      >"$work/quality.$shard.jsonl" &
    pids="$pids $!"
  done
  for pid in $pids; do wait "$pid"; done
fi
if has table; then
  of_cpu() { sed -n "s/^$1[[:space:]]*: //p" /proc/cpuinfo | head -n 1; }
  cpu="$(of_cpu 'model name') (family $(of_cpu 'cpu family') model $(of_cpu model))"
  cat "$work"/cost.jsonl "$work"/quality.*.jsonl >"$work/results.jsonl"
  "$compare" table "$work/results.jsonl" "$page" --heading "$cpu, $threads threads, commit $(git rev-parse --short HEAD)."
fi
