#!/usr/bin/env bash
# make gpu, and run.sh of the GPU kit: what is to be run on a machine with an NVIDIA GPU, in parts of less than 9
# minutes each.
#   bench/gpu.sh [test] [bench] [step] [peers]       all four without arguments
#   BIN=build            the programs: graft, cuda_tests, graft_tests (if there), bench/...
#   OUT=bench/results    where <gpu>.json goes     LOG=build/gpu    where all output goes
#   LIMIT=520            seconds for each part     COMMIT=...       what is recorded beside the numbers
#   PEERS_PYTHON=python3 COMPILE=0 ROUNDS=2        the comparison with PEFT
#   METHODS="lora dora qlora" of the step
#   MODELS="qwen3-4b ..." SEQUENCE=2048 BENCH_ARGS="--sustained 60" STEP_ARGS="--steps 7"    other shapes
# Exit status: 0, 1 where something failed, 2 where there is no usable GPU.
set -u
cd "$(dirname "$0")/.." || exit 1
bin=${BIN:-build}
out=${OUT:-bench/results}
log=${LOG:-build/gpu}
limit=${LIMIT:-520}
python=${PEERS_PYTHON:-python3}
commit=${COMMIT:-$(git describe --always --dirty 2>/dev/null)}
date=$(date -u +%F)
models=${MODELS:-qwen2.5-0.5b qwen3-0.6b qwen3-4b llama-3.1-8b}
methods=${METHODS:-lora dora qlora}
sequence=${SEQUENCE:-2048}
failed=0

device=$("$bin/bench/cuda_kernels" --device-info 2>&1) || {
  echo "gpu: $(printf '%s' "$device" | head -n 1); nothing was run"
  exit 2
}
mkdir -p "$log"

# limited SECONDS COMMAND: at most so long, and not past the part's end (status 124).
limited() {
  local seconds=$1 left=$((end - SECONDS))
  shift
  if [ "$left" -lt "$seconds" ]; then seconds=$left; fi
  if [ "$seconds" -lt 5 ]; then
    echo "no time left for: $*" >&2
    return 124
  fi
  timeout -k 5 "$seconds" "$@"
}
outcome() {  # WHAT TEXT: a row of the section test
  echo "$1: $2"
  printf '{"what": "%s", "outcome": "%s"}\n' "$1" "$(printf '%s' "$2" | tr -d '"\\' | tr -d '\000-\037' | cut -c1-200)" >>"$rows"
}

run_tests() {  # WHAT PROGRAM ARGUMENTS
  local what=$1 text="$log/$1.log" status
  shift
  limited "$limit" "$@" >"$text" 2>&1
  status=$?
  if [ $status = 124 ]; then
    outcome "$what" "not finished in time"
  else
    outcome "$what" "$(grep -E '^[0-9]+ passed, ' "$text" || echo "ended with status $status: $(tail -n 1 "$text")")"
  fi
  if [ $status != 0 ] || ! grep -qE '^[1-9][0-9]* passed, ' "$text"; then
    failed=1
    grep -E 'Failure|FAILED|error' "$text" | head -n 20
    echo "  all of it: $text"
  fi
}
# The checkers slow kernels down a hundredfold: the table of ops alone, which has every kernel in it.
sanitize() {  # TOOL
  local what="compute-sanitizer $1" text="$log/$1.log" status
  limited 150 "$sanitizer" --tool "$1" --error-exitcode 9 "$bin/cuda_tests" --gtest_brief=1 \
    --gtest_filter='*EveryOp*' >"$text" 2>&1
  status=$?
  # A tool that does not work says so too where it runs and finds something: what it found comes first.
  if [ $status = 9 ] || grep -qE 'SUMMARY: [1-9]|^\[  FAILED  \]' "$text"; then
    outcome "$what" "found errors: $(grep -E 'SUMMARY|FAILED' "$text" | tail -n 1 | sed 's/^=* *//')"
    failed=1
  elif [ $status = 0 ]; then
    outcome "$what" "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$text" | tail -n 1 | sed 's/^=* *//')"
  elif [ $status = 124 ]; then
    outcome "$what" "not finished in time"
  elif grep -qE 'Internal Sanitizer Error|not supported|Unable to' "$text"; then
    outcome "$what" "does not work here: $(grep -E 'Internal Sanitizer Error|not supported|Unable to' "$text" | head -n 1 | sed 's/^=* *//')"
  else
    outcome "$what" "ended with status $status: $(tail -n 1 "$text")"
    failed=1
  fi
}
part_test() {
  run_tests cuda_tests "$bin/cuda_tests" --gtest_brief=1
  if [ -x "$bin/graft_tests" ]; then
    export GRAFT_BINARY="$bin/graft"
    run_tests graft_tests "$bin/graft_tests" --gtest_brief=1
  fi
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
  if [ -n "$sanitizer" ]; then
    sanitize memcheck
    sanitize racecheck
  else
    outcome compute-sanitizer "is not on this machine"
  fi
}

part_bench() {
  if [ -x "$bin/bench/cuda_ladder" ]; then
    limited 150 "$bin/bench/cuda_ladder" --time "$out" --commit "$commit" >"$log/ladder.log" 2>&1 || {
      echo "cuda_ladder ended with status $?: $(tail -n 1 "$log/ladder.log")"
      failed=1
    }
  fi
  limited "$limit" "$bin/bench/cuda_kernels" --models "${models// /,}" ${BENCH_ARGS:---sustained 60} 2>"$log/bench.err" >>"$rows" || {
    echo "cuda_kernels ended with status $?: $(tail -n 1 "$log/bench.err")"
    failed=1
  }
  echo "$(wc -l <"$rows") rows, among them:"
  grep roofline "$rows" | sed '/"kernel"/d'
}

# step_row SECONDS COMMAND: its line of JSON; the status says whether it measured.
step_row() {
  local line
  line=$(limited "$@" 2>>"$log/$part.err" | tail -n 1)
  if [ -z "$line" ]; then
    echo "  no result from: ${*:2}" | tee -a "$log/$part.err"
    return 1
  fi
  echo "  $line"
  printf '%s\n' "$line" >>"$rows"
  case $line in *'"error"'*) return 1 ;; esac
}
graft_step() {  # MODEL BATCH METHOD: without checkpointing, and with it where memory does not suffice
  local command="$bin/bench/train_step bench/models/$1.json --device cuda --seq $sequence --batch $2 --method $3 ${STEP_ARGS:---steps 7}"
  step_row 90 $command && return
  case $(tail -n 1 "$rows") in *"out of memory"*) step_row 90 $command --checkpoint && return ;; esac
  failed=1
}
part_step() {
  for method in $methods; do
    for batch in 8 1; do
      for model in $models; do graft_step $model $batch $method; done
    done
  done
}

# In turn, in one run: graft and PEFT in its settings, round after round, until the time is used up.
part_peers() {
  if ! "$python" -c 'import torch, transformers, peft; assert torch.cuda.is_available()' 2>"$log/peers.err"; then
    echo "no comparison: $python has no torch with CUDA, transformers and peft ($(tail -n 1 "$log/peers.err"))"
    return
  fi
  local settings="sdpa" setting round command
  "$python" -c 'import flash_attn' 2>/dev/null && settings="sdpa flash_attention_2"
  for round in $(seq "${ROUNDS:-2}"); do
    for method in $methods; do
      if [ "$method" = qlora ] && ! "$python" -c 'import bitsandbytes' 2>/dev/null; then
        echo "no comparison of qlora: $python has no bitsandbytes"
        continue
      fi
      for batch in 8 1; do
        for model in $models; do
          [ $((end - SECONDS)) -gt 60 ] || { echo "no time left from round $round, $model, $method, batch $batch on"; return; }
          graft_step $model $batch $method
          command="$python bench/peft_step.py bench/models/$model.json --device cuda --seq $sequence --batch $batch --method $method --steps 5"
          for setting in $settings; do
            [ $method = lora ] || [ $setting = sdpa ] || continue
            step_row 90 $command --attn $setting
            if [ "${COMPILE:-0}" = 1 ]; then step_row 200 $command --attn $setting --compile; fi
          done
        done
      done
    done
  done
}

echo "gpu: $device"
case $device in *'"cublas":false'*) echo "no cuBLAS was found: products are graft's own, and utilisations are shares of their rate" ;; esac
for part in $*; do
  case $part in
    test | bench | step | peers) ;;
    *) echo "gpu: unknown part $part; there are test, bench, step and peers" >&2 && exit 1 ;;
  esac
done
for part in ${*:-test bench step peers}; do
  echo "== $part"
  end=$((SECONDS + limit))
  rows=$log/$part.jsonl
  : >"$rows"
  : >"$log/$part.err"
  part_$part
  if [ -s "$rows" ]; then
    "$bin/bench/gpu_results" collect "$out" "$part" "$commit" "$date" "$device" <"$rows" || failed=1
  fi
done
exit $failed
