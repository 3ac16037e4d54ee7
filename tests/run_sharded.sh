#!/usr/bin/env bash
# Runs a test program in as many processes at a time as JOBS says, at most eight. The tests are dealt out to four parts for
# each of them, so that none is idle for long while another ends. Shows what failed whole and why tests were skipped, and
# closes with the sum of the parts' last lines (tests/main.cpp).
#   JOBS=2 [LOG=path] tests/run_sharded.sh TITLE PROGRAM [gtest arguments]
set -u
title=$1
program=$2
shift 2
log=${LOG:-$program.log}
jobs=${JOBS:-1}
jobs=$((jobs < 1 ? 1 : jobs > 8 ? 8 : jobs))
parts=$((jobs * 4))
rm -f "$log".*
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM
for ((i = 0; i < parts; i++)); do
  ((i < jobs)) || wait -n
  GTEST_TOTAL_SHARDS=$parts GTEST_SHARD_INDEX=$i "$program" --gtest_brief=1 "$@" >"$log.$i" 2>&1 &
  pids+=($!)
done
failed=0
for ((i = 0; i < parts; i++)); do
  wait "${pids[$i]}" && grep -q '^[0-9]* passed, 0 failed, ' "$log.$i" && continue
  failed=1
  echo "$title, part $((i + 1)) of $parts, failed or did not end:"
  cat "$log.$i"
done
grep -h '^skipped ' "$log".*
awk -v title="$title" '/^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ { passed += $1; failed += $3; skipped += $5 }
  END { printf "%s: %d passed, %d failed, %d skipped\n", title, passed, failed, skipped }' "$log".*
exit $failed
