#!/usr/bin/env bash
# Runs what this folder holds on a machine with an NVIDIA Hopper GPU and its driver; bash and coreutils are the
# only programs that it needs. cuBLAS is that of the CUDA toolkit or of python3's torch, or the file that
# GRAFT_CUBLAS names; where there is none (or GRAFT_CUBLAS=none), products are graft's own, and it says so.
#   run.sh [test] [bench] [step] [peers]    each less than 9 minutes; all four without arguments
#   OUT=./results                           where the results go: <gpu>.json, and all output in log/
# Exit status: 0, 1 where something failed, 2 where there is no usable GPU. The other settings: bench/gpu.sh.
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-results}
case $out in /*) ;; *) out=$PWD/$out ;; esac
BIN=bin OUT=$out LOG=$out/log COMMIT=$(cat "$here/COMMIT") exec bash "$here/bench/gpu.sh" "$@"
