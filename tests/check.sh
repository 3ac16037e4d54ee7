#!/bin/sh
# What `make check` checks: a folder includes only what stands to its left (tensor <- autograd <- nn <- models
# <- train; cuda only tensor), sources are formatted, and the objects that are compiled for one instruction
# set share no code with the rest. Usage: tests/check.sh FOLDER_OF_KERNEL_OBJECTS
set -u
failed=0

allowed() {
  case $1 in
    tensor) echo "tensor" ;;
    cuda) echo "tensor cuda" ;;
    autograd) echo "tensor autograd" ;;
    nn) echo "tensor autograd nn" ;;
    models) echo "tensor autograd nn models" ;;
    train) echo "tensor autograd nn models train cuda" ;;
  esac
}
for folder in tensor cuda autograd nn models train; do
  pattern=$(allowed $folder | tr ' ' '|')
  bad=$(grep -rnE '^#include "' $folder --include='*.h' --include='*.cpp' --include='*.cu' --include='*.cuh' |
    grep -vE "#include \"($pattern)/")
  # tensor/backend.cpp is where the devices meet: it alone may name the CUDA backend.
  bad=$(printf '%s\n' "$bad" | grep -vE '^tensor/backend\.cpp:[0-9]+:#include "cuda/cuda_backend\.h"' | grep .)
  if [ -n "$bad" ]; then
    echo "$folder/ includes what it may not:"
    echo "$bad"
    failed=1
  fi
done

top=$(ls | grep -vxE 'Makefile|tensor|autograd|nn|cuda|models|train|tests|bench|README\.md|LICENSE|build')
if [ -n "$top" ]; then
  echo "the top level holds more than it should: $top"
  failed=1
fi

files=$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | while read -r f; do [ -f "$f" ] && echo "$f"; done)
if ! clang-format --dry-run -Werror $files 2>/dev/null; then
  echo "not formatted (make format mends it):"
  for f in $files; do clang-format --dry-run -Werror "$f" >/dev/null 2>&1 || echo "  $f"; done
  failed=1
fi

# A weak symbol (an inline function or a template of a library) in an object made for AVX-512 could be the
# copy that the linker keeps for everybody.
for object in "$1"/*.avx2.o "$1"/*.avx512.o "$1"/*.avx512_bf16.o "$1"/*.amx.o "$1"/*.wide16.o; do
  weak=$(nm -C "$object" | grep -E ' [WVu] ' | grep -vE 'graft::(avx2|avx512|avx512_bf16|amx|wide16)::|__gxx_personality')
  if [ -n "$weak" ]; then
    echo "$object shares code with other objects:"
    echo "$weak"
    failed=1
  fi
done

[ $failed = 0 ] && echo "check: layering, format and instruction-set objects are fine"
exit $failed
