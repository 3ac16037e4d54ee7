# Included by the Makefile: what is for machines with a GPU, and the programs that are packed for other machines.

# --- programs for this machine's card ----------------------------------------------------------------
# The tests that also run on a real device: all but those of the emulator itself.
GPU_TESTS := $(filter-out tests/cuda/faults_test.cpp tests/cuda/cublas_test.cpp,$(wildcard tests/cuda/*_test.cpp)) \
             tests/op_cases.cpp tests/main.cpp bench/cuda_ladder_table.cpp
GPU_TEST_OBJ := $(GPU_TESTS:%.cpp=build/nvcc/%.o)
LADDER_OBJ   := build/nvcc/bench/cuda_ladder.o build/nvcc/bench/cuda_ladder_table.o
GPU_PROGRAMS := graft cuda_tests bench/train_step bench/cuda_kernels bench/cuda_ladder bench/gpu_results

build/cuda_tests: $(GPU_TEST_OBJ) $(GRAFT)
	$(CXX) $(ALLFLAGS) -o $@ $(GPU_TEST_OBJ) $(GRAFT_LIBS) -lgtest

build/bench/cuda_kernels: build/nvcc/bench/cuda_kernels.o $(GRAFT)
build/bench/cuda_ladder: $(LADDER_OBJ) $(GRAFT)
build/bench/cuda_kernels build/bench/cuda_ladder:
	@mkdir -p $(@D)
	$(CXX) $(ALLFLAGS) -o $@ $(filter %.o,$^) $(GRAFT_LIBS)

build/bench/gpu_results: build/obj/bench/gpu_results.o build/obj/tensor/check.o
	@mkdir -p $(@D)
	$(CXX) $(ALLFLAGS) -o $@ $^

# The same programs over emulated kernels, at a toy shape: that they run, not how fast.
EMU_BENCH := $(EMU)/fast/bench/train_step $(EMU)/fast/bench/cuda_kernels
$(EMU_BENCH): $(EMU)/fast/bench/%: $(EMU)/fast/bench/%.o $(call emu_backend,fast) build/libgraft.a
	$(CXX) -o $@ $^ -lboost_context -lopenblas $(LIBS)
-include $(EMU_BENCH:=.d)

# --- programs for other machines: non-CUDA libraries linked statically, device code for $(2) ----------
STATIC_LIBS := $(patsubst -l%,-l:lib%.a,$(filter -l%,$(LIBS))) -static-libstdc++ -static-libgcc -pthread
HOST_OBJ    := build/obj/train/main.o build/obj/bench/train_step.o build/obj/bench/gpu_results.o \
               build/nvcc/bench/cuda_kernels.o $(LADDER_OBJ)

define packed_rules
build/$(1)/nvcc/%.o: %.cu
	@mkdir -p $$(@D)
	$(NVCC) -std=c++20 -O3 -I. -t 2 --compress-mode=size $(2) -Werror all-warnings -Xcompiler -Wall -MMD -MP -MF $$(@:.o=.d) -c -o $$@ $$<
build/$(1)/libgraft_cuda.a: $(patsubst %.cu,build/$(1)/nvcc/%.o,$(wildcard cuda/*.cu)) $(CUDA_SRC:%.cpp=build/nvcc/%.o)
	@rm -f $$@
	ar rcs $$@ $$^
build/$(1)/graft: build/obj/train/main.o
build/$(1)/bench/train_step: build/obj/bench/train_step.o
build/$(1)/bench/gpu_results: build/obj/bench/gpu_results.o
build/$(1)/bench/cuda_kernels: build/nvcc/bench/cuda_kernels.o
build/$(1)/bench/cuda_ladder: $(LADDER_OBJ)
build/$(1)/cuda_tests: $(GPU_TEST_OBJ)
build/$(1)/cuda_tests: EXTRA_LIBS := -l:libgtest.a
$(GPU_PROGRAMS:%=build/$(1)/%): build/libgraft.a build/$(1)/libgraft_cuda.a
	@mkdir -p $$(@D)
	$$(CXX) -s -Wl,--gc-sections -o $$@ $$(filter %.o,$$^) -Wl,--start-group $$(filter %.a,$$^) -Wl,--end-group \
	  $$(EXTRA_LIBS) $$(CUDA_LIBS) $$(STATIC_LIBS)
-include $(patsubst %.cu,build/$(1)/nvcc/%.d,$(wildcard cuda/*.cu))
endef

# sm_90a: the kit's machine. The distribution runs on every card from sm_80 on; PTX is for those to come.
DIST_ARCH := 80 86 89 90a 100 120
gencode = $(foreach a,$(1),-gencode arch=compute_$(a),code=sm_$(a))
DIST_CODE := $(call gencode,$(DIST_ARCH)) -gencode arch=compute_80,code=compute_80
$(eval $(call packed_rules,packed-kit,$(call gencode,90a)))
$(eval $(call packed_rules,packed-dist,$(DIST_CODE)))

-include $(GPU_TEST_OBJ:.o=.d) $(HOST_OBJ:.o=.d)

# --- what people run -----------------------------------------------------------------------------------
.PHONY: gpu gpu-test gpu-bench gpu-step gpu-peers gpu-rehearsal gpu-tables gpu-kit dist gpu-build gpu-card need-nvcc new-nvcc

gpu: gpu-build  ## on a machine with an NVIDIA GPU: all four parts below, results into bench/results
	@bench/gpu.sh
	@$(MAKE) --no-print-directory gpu-tables
gpu-test: gpu-build  ## every test on the GPU, and the ops under compute-sanitizer
	@bench/gpu.sh test
gpu-bench: gpu-build  ## each CUDA kernel against the roofline of this GPU
	@bench/gpu.sh bench
gpu-step: gpu-build  ## a training step at the shapes of four models
	@bench/gpu.sh step
gpu-peers: gpu-build  ## the same step here and in PEFT, in turn [PEERS_PYTHON=python3 COMPILE=1]
	@bench/gpu.sh peers
gpu-rehearsal:  ## gpu-bench and gpu-step on emulated kernels at a toy shape, for machines without a GPU
	@$(MAKE) --no-print-directory -j$(JOBS) $(EMU_BENCH) build/bench/gpu_results
	@mkdir -p build/rehearsal/bin && ln -sfn ../../emu/fast/bench build/rehearsal/bin/bench && \
	  ln -sf ../../../bench/gpu_results $(EMU)/fast/bench/
	@OPENBLAS_NUM_THREADS=1 MODELS=rehearsal SEQUENCE=64 STEP_ARGS="--steps 1 --matmul-size 64" \
	  BENCH_ARGS="--tokens 128 --repeats 1 --matmul-size 64 --sustained 0.1" \
	  BIN=build/rehearsal/bin OUT=build/rehearsal LOG=build/rehearsal/log bench/gpu.sh bench step
gpu-tables:  ## renew the README's tables from bench/results
	@$(MAKE) --no-print-directory -j$(JOBS) build/bench/gpu_results
	build/bench/gpu_results tables bench/results README.md bench/README.md

# 2, as bench/gpu.sh has it, is also make's own status for any failure.
gpu-card:
	@[ -e /proc/driver/nvidia/version ] || [ -e /dev/dxg ] || command -v nvidia-smi >/dev/null || \
	  { echo "gpu: no NVIDIA driver on this machine; nothing was run"; exit 2; }
need-nvcc:
	@[ "$(NVCC)" != none ] || { echo "no nvcc on this machine (13.0, or 12.8 or newer): nothing was built"; exit 2; }
# What is packed for other machines is compressed, and dist has sm_100 and 120: both are new in 12.8.
new-nvcc: need-nvcc
	@release=$$($(NVCC) --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1 \2/p'); set -- $$release; \
	  [ "$${1:-0}" -gt 12 ] || { [ "$${1:-0}" = 12 ] && [ "$$2" -ge 8 ]; } || \
	  { echo "$(NVCC) is of CUDA $${1:-?}.$${2:-?}, and 12.8 or newer is wanted: nothing was built; give another as NVCC=..."; exit 2; }
gpu-build: gpu-card need-nvcc
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) $(TEST_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(GPU_PROGRAMS:%=build/%) build/graft_tests

gpu-kit: new-nvcc  ## everything that make gpu runs, for machines with a driver alone (sm_90a), into build/gpu-kit
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) libgtest-dev"
	@$(MAKE) --no-print-directory -j$(JOBS) $(GPU_PROGRAMS:%=build/packed-kit/%)
	@bench/pack.sh kit build/packed-kit build/gpu-kit

dist: new-nvcc  ## one binary for all cards from sm_80 on, as build/dist/graft-VERSION-linux-x86_64.tar.gz
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) build/packed-dist/graft
	@bench/pack.sh dist build/packed-dist build/dist
