#!/usr/bin/env bash
# make gpu-kit and make dist: puts what was built into a folder that runs elsewhere, and refuses to when the
# programs need more than the C library.
#   bench/pack.sh kit  BUILT FOLDER     FOLDER is the kit: run.sh and all that it runs, at most 50 MB
#   bench/pack.sh dist BUILT FOLDER     FOLDER/graft-VERSION-linux-x86_64.tar.gz: graft and the bundled model
set -eu
what=$1 built=$2 folder=$3
version=$(sed -n 's/.*kVersion = "\(.*\)".*/\1/p' train/main.cpp)
commit=$(git describe --always --dirty 2>/dev/null || echo unknown)

# The C library, the loader, and nothing of NVIDIA's: graft looks for the driver and cuBLAS when it runs.
check_needed() {
  local needed
  needed=$(readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | grep -vxE 'lib(c|m|dl|rt|pthread)\.so\.[0-9]+|ld-linux-x86-64\.so\.2' || true)
  if [ -n "$needed" ]; then
    echo "$1 needs" $needed", wanted nothing but the C library" >&2
    exit 1
  fi
}
# What the libraries inside ask to be passed on with them.
licences() {
  local package
  for package in libyaml-cpp-dev libpcre2-dev libutf8proc-dev nlohmann-json3-dev libcxxopts-dev libeigen3-dev libstdc++-12-dev "$@"; do
    if [ -f "/usr/share/doc/$package/copyright" ]; then
      printf '==== %s\n\n' "$package"
      cat "/usr/share/doc/$package/copyright"
    fi
  done
  printf '==== cudart\n\nThis software contains source code provided by NVIDIA Corporation.\n'
}
bundle() {  # FOLDER: the model that graft demo trains, and the licences
  mkdir -p "$1/models"
  cp -r models/demo "$1/models/"
  cp LICENSE "$1/"
}

if [ "$what" = kit ]; then
  rm -rf "$folder"
  mkdir -p "$folder/bin/bench" "$folder/bench/models"
  for program in graft cuda_tests bench/train_step bench/cuda_kernels bench/cuda_ladder bench/gpu_results; do
    check_needed "$built/$program"
    cp "$built/$program" "$folder/bin/$program"
  done
  cp bench/gpu.sh bench/peft_step.py "$folder/bench/"
  cp bench/models/*.json "$folder/bench/models/"
  cp bench/run_kit.sh "$folder/run.sh"
  echo "$commit" >"$folder/COMMIT"
  # What the tests on the device read.
  for data in models adapters stacks quantised trajectories/qlora trajectories/qdora; do
    mkdir -p "$folder/tests/golden/$(dirname "$data")"
    cp -r "tests/golden/$data" "$folder/tests/golden/$data"
  done
  rm -f "$folder"/tests/golden/models/*/golden.json
  bundle "$folder"
  licences libgtest-dev >"$folder/LICENSES.txt"
  megabytes=$(($(du -s --apparent-size -B 1 "$folder" | cut -f 1) / 1000000 + 1))
  echo "$folder: $megabytes MB, commit $commit"
  [ "$megabytes" -le 50 ] || { echo "$folder: wanted at most 50 MB" >&2 && exit 1; }
else
  name=graft-$version-linux-x86_64
  check_needed "$built/graft"
  rm -rf "${folder:?}/$name"
  mkdir -p "$folder/$name"
  cp "$built/graft" README.md "$folder/$name/"
  bundle "$folder/$name"
  licences >"$folder/$name/LICENSES.txt"
  tar -C "$folder" --owner=0 --group=0 -czf "$folder/$name.tar.gz" "$name"
  du -h --apparent-size "$folder/$name.tar.gz"
fi
