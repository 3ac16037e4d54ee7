# graft: `make help` lists the targets.
BUILD    := build
SAN      ?=
JOBS     ?= $(shell nproc)
CXXFLAGS ?= -O3
ifeq ($(origin CXX),default)
CXX := g++
endif

# `make SAN=asan test`: everything again, in a folder of its own, under AddressSanitizer and UBSan.
ifneq ($(SAN),)
BUILD := build/$(SAN)
endif
# -Wno-maybe-uninitialized: g++ 12 sees ghosts in its own library under sanitizers.
SANFLAGS_asan := -O1 -Wno-maybe-uninitialized -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SANFLAGS := $(SANFLAGS_$(SAN))

# Warnings are errors of the compiler that every commit is tested with; what a newer one thinks of besides shall keep nobody
# from building.
WERROR := $(if $(SAN),,$(if $(filter 12 12.%,$(shell $(CXX) -dumpversion)),-Werror))

# CXXOPTS_NO_REGEX: it can parse without <regex>, which takes the compiler six seconds a file.
# -Wno-restrict: g++ 12 warns about its own std::string concatenation (GCC bug 105651).
ALLFLAGS := -std=c++20 $(CXXFLAGS) -Wall -Wextra $(WERROR) -Wno-restrict -I. -DCXXOPTS_NO_REGEX -MMD -MP -pthread $(SANFLAGS)
LIBS     := -lyaml-cpp -lpcre2-8 -lutf8proc -pthread

# --- packages (Debian and Ubuntu) -----------------------------------------------------------------
BUILD_PACKAGES := g++ libcxxopts-dev libyaml-cpp-dev nlohmann-json3-dev libpcre2-dev libutf8proc-dev \
                  libeigen3-dev
TEST_PACKAGES  := libgtest-dev libbenchmark-dev libopenblas-dev libboost-context-dev
CHECK_PACKAGES := clang-format binutils
PACKAGES       := $(BUILD_PACKAGES) $(TEST_PACKAGES) $(CHECK_PACKAGES)

# --- sources: every folder is read by wildcard; cpu/kernels is compiled once per instruction set, for amx the matrix product alone ---
ISAS         := portable avx2 avx512 avx512_bf16 wide16
ISA_portable :=
ISA_avx2     := -mavx2 -mfma -mf16c
ISA_avx512   := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512
ISA_avx512_bf16 := $(ISA_avx512) -mavx512bf16
ISA_amx      := $(ISA_avx512_bf16) -mamx-tile -mamx-bf16
ISA_wide16   := -mavx2 -mfma -mf16c -Wno-psabi

KERNEL_SRC := $(wildcard tensor/cpu/kernels/*.cpp)
LIB_SRC    := $(wildcard tensor/*.cpp tensor/cpu/*.cpp tensor/cpu/reference/*.cpp autograd/*.cpp \
                nn/*.cpp models/*.cpp) $(filter-out train/main.cpp,$(wildcard train/*.cpp))
KERNEL_OBJ := $(foreach isa,$(ISAS),$(KERNEL_SRC:%.cpp=$(BUILD)/obj/%.$(isa).o)) \
              $(patsubst %.cpp,$(BUILD)/obj/%.amx.o,$(wildcard tensor/cpu/kernels/gemm_*.cpp))
LIB_OBJ    := $(LIB_SRC:%.cpp=$(BUILD)/obj/%.o) $(KERNEL_OBJ)
TEST_SRC   := $(wildcard tests/*.cpp)
TEST_OBJ   := $(TEST_SRC:%.cpp=$(BUILD)/obj/%.o)
BENCH_SRC  := $(filter-out bench/cuda_%,$(wildcard bench/*.cpp))
BENCH_BIN  := $(BENCH_SRC:bench/%.cpp=$(BUILD)/bench/%)

# --- the device: kernels by nvcc where it is, else a backend that says why there is none [NVCC=none] ---
NVCC     ?= $(if $(SAN),none,$(firstword $(wildcard $(shell command -v nvcc) /usr/local/cuda/bin/nvcc) none))
CUDA_SRC := $(filter-out cuda/no_cuda.cpp,$(wildcard cuda/*.cpp))
ifeq ($(NVCC),none)
CUDA_OBJ  := $(BUILD)/obj/cuda/no_cuda.o
CUDA_LIBS :=
else
CUDA_HOME := $(patsubst %/bin/,%,$(dir $(realpath $(NVCC))))
# The card's own architecture (kernels need 8.0), or two that cover most, and PTX for the rest. sm_90a: Hopper's own instructions.
CARD      := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^\([0-9]\+\)\.\([0-9]\)$$/\1\2/p' | awk '$$1 >= 80' | head -n 1)
CUDA_ARCH ?= $(if $(CARD),$(CARD:90=90a),80 90a)
GENCODE   := $(foreach a,$(CUDA_ARCH),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_80,code=compute_80
CUDA_OBJ  := $(patsubst %.cu,build/nvcc/%.o,$(wildcard cuda/*.cu)) $(CUDA_SRC:%.cpp=build/nvcc/%.o)
CUDA_LIBS := -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt
endif
# libgraft.a and the device need each other.
GRAFT     := $(BUILD)/libgraft.a $(BUILD)/libgraft_cuda.a
GRAFT_LIBS = -Wl,--start-group $(GRAFT) -Wl,--end-group $(CUDA_LIBS) $(LIBS)

# --- kernels without a GPU: .cu files compiled as C++ against cuda/emulator, in three builds ---
# fast: speed; asan: memory; race: kernels call the hooks of ThreadSanitizer, which racecheck.cpp is.
# -fno-strict-aliasing: kernels read memory through 16-byte vectors, as nvcc allows.
EMU         := build/emu
EMU_KINDS   := fast asan race
EMU_FLAGS   := -std=c++20 -O2 -g -DCUDA_EMU -Icuda/emulator -I. -Wall -Wextra $(WERROR) -Wno-restrict -Wno-unknown-pragmas \
               -fno-strict-aliasing -MMD -MP
EMU_asan    := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
EMU_SRC     := $(filter-out %/racecheck.cpp,$(wildcard cuda/emulator/*.cpp)) $(CUDA_SRC)
EMU_TESTS   := $(wildcard tests/cuda/*.cpp tests/cuda/*.cu) tests/main.cpp tests/op_cases.cpp bench/cuda_ladder_table.cpp
EMU_BIN     := $(EMU_KINDS:%=$(EMU)/%/cuda_tests) $(EMU)/fast/graft
# Tests without kernels are compiled once for all builds (which this is, emu::checks() tells), and what has no kernels
# once for fast and race.
emu_names    = $(patsubst %.cu,$(EMU)/$(1)/%.cu.o,$(patsubst %.cpp,$(EMU)/$(2)/%.o,$(3)))
emu_backend  = $(call emu_names,$(1),$(1:race=fast),$(EMU_SRC) $(wildcard cuda/*.cu)) $(if $(filter race,$(1)),$(EMU)/race/cuda/emulator/racecheck.o)
emu_tests    = $(call emu_names,$(1),host,$(EMU_TESTS))

.DEFAULT_GOAL := all
.PHONY: all help deps demo demo-base test emulated emulated-lazy emulated-train mutants ladder bench bench-peers compare-methods check format clean install-packages

all: $(BUILD)/graft  ## build build/graft

help:  ## list the targets
	@echo "make [target] [BUILD variables: JOBS=$(JOBS) SAN=asan CXX=$(CXX)]"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## +/\t/' | expand -t 14 | sed 's/^/  /'

# --- build ----------------------------------------------------------------------------------------
$(BUILD)/graft: $(BUILD)/obj/train/main.o $(GRAFT)
	$(CXX) $(ALLFLAGS) -o $@ $< $(GRAFT_LIBS)
	@$(if $(filter none,$(NVCC)),echo "built for the CPU: $(if $(SAN),sanitizer build,no nvcc on this machine)")

$(BUILD)/libgraft.a: $(LIB_OBJ)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/libgraft_cuda.a: $(CUDA_OBJ)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/graft_tests: $(TEST_OBJ) $(GRAFT)
	$(CXX) $(ALLFLAGS) -o $@ $(TEST_OBJ) $(GRAFT_LIBS) -lgtest -lopenblas

$(BUILD)/bench/%: bench/%.cpp $(GRAFT)
	@mkdir -p $(@D)
	$(CXX) $(ALLFLAGS) -MF $@.d -MT $@ -o $@ $< $(GRAFT_LIBS) -lbenchmark -lopenblas

$(BUILD)/obj/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(ALLFLAGS) -c -o $@ $<

# Tests compile in half the time without optimisation that nobody waits for, and with their common headers parsed once
# (-include finds the .gch before tests/precompiled.h).
$(BUILD)/obj/tests/%.o: tests/%.cpp $(BUILD)/obj/tests/precompiled.h.gch
	@mkdir -p $(@D)
	$(CXX) $(ALLFLAGS) -O1 -I$(BUILD)/obj/tests -Itests -include precompiled.h -c -o $@ $<
$(BUILD)/obj/tests/precompiled.h.gch: tests/precompiled.h
	@mkdir -p $(@D)
	$(CXX) $(ALLFLAGS) -O1 -x c++-header -o $@ $<

define isa_rule
$$(BUILD)/obj/tensor/cpu/kernels/%.$(1).o: tensor/cpu/kernels/%.cpp
	@mkdir -p $$(@D)
	$$(CXX) $$(ALLFLAGS) $$(ISA_$(1)) -DGRAFT_ISA=$(1) -DGRAFT_ISA_$(1) -c -o $$@ $$<
endef
$(foreach isa,$(ISAS) amx,$(eval $(call isa_rule,$(isa))))

define emu_rules
$$(EMU)/$(1)/%.o: %.cpp
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_FLAGS) $$(EMU_$(1)) -c -o $$@ $$<
$$(EMU)/$(1)/%.cu.o: %.cu
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_FLAGS) $$(EMU_$(1)) $(if $(filter race,$(1)),-fsanitize=thread) -x c++ -c -o $$@ $$<
$$(EMU)/$(1)/cuda_tests: $$(call emu_backend,$(1)) $$(call emu_tests,$(1)) build/libgraft.a
	$$(CXX) $$(EMU_$(1)) -o $$@ $$^ -lboost_context -lopenblas $$(LIBS) -lgtest -pthread
$$(EMU)/$(1)/graft: build/obj/train/main.o $$(call emu_backend,$(1)) build/libgraft.a
	$$(CXX) $$(EMU_$(1)) -o $$@ $$^ -lboost_context -lopenblas $$(LIBS)
-include $$(patsubst %.o,%.d,$$(call emu_backend,$(1)) $$(call emu_tests,$(1)))
endef
$(foreach kind,$(EMU_KINDS),$(eval $(call emu_rules,$(kind))))
$(EMU)/host/%.o: %.cpp $(EMU)/host/precompiled.h.gch
	@mkdir -p $(@D)
	$(CXX) $(EMU_FLAGS) -O1 -g0 -I$(EMU)/host -Itests -include precompiled.h -c -o $@ $<
$(EMU)/host/precompiled.h.gch: tests/precompiled.h
	@mkdir -p $(@D)
	$(CXX) $(EMU_FLAGS) -O1 -g0 -x c++-header -o $@ $<
# The scheduler is not what is checked; without checks in it the tests take two thirds of the time.
$(EMU)/asan/cuda/emulator/emulator.o $(EMU)/asan/cuda/emulator/rendezvous.o: EMU_asan := -DEMU_ASAN=1

# The same kernels for GPUs; of the tests, what only compiles: the emulator's headers beside the real ones.
NVCC_TESTS := $(if $(filter-out none,$(NVCC)),build/nvcc/tests/cuda/faulty.o build/nvcc/tests/cuda/same_headers.o)
build/nvcc/%.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) -std=c++20 -O3 -I. $(GENCODE) -Werror all-warnings -Xcompiler -Wall -MMD -MP -MF $(@:.o=.d) -c -o $@ $<
build/nvcc/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(ALLFLAGS) -isystem $(CUDA_HOME)/include -c -o $@ $<

# The table of cuda/README.md: bank conflicts by emulation, registers as ptxas lists them, times by a GPU.
LADDER_PTXAS := $(patsubst %.cu,build/nvcc/%.ptxas,$(wildcard cuda/gemm_by_hand*.cu cuda/lora_linear.cu cuda/nf4.cu cuda/rms_norm.cu \
                  cuda/cross_entropy*.cu cuda/attention*.cu))
build/nvcc/%.ptxas: %.cu $(wildcard cuda/*.h cuda/*.cuh)
	@mkdir -p $(@D)
	@$(NVCC) -std=c++20 -O3 -I. -gencode arch=compute_90a,code=sm_90a -Xptxas -v -cubin -o $(@:.ptxas=.cubin) $< >$@ 2>&1 || \
	  { cat $@; rm $@; exit 1; }
$(EMU)/fast/cuda_ladder: $(call emu_names,fast,fast,bench/cuda_ladder.cpp bench/cuda_ladder_table.cpp) $(call emu_backend,fast) build/libgraft.a
	$(CXX) -o $@ $^ -lboost_context -lopenblas $(LIBS)

-include $(EMU)/fast/bench/cuda_ladder.d $(EMU)/host/precompiled.h.d $(BUILD)/obj/tests/precompiled.h.d
-include $(CUDA_OBJ:.o=.d) $(NVCC_TESTS:.o=.d) $(LIB_OBJ:.o=.d) $(TEST_OBJ:.o=.d) $(BUILD)/obj/train/main.d $(BENCH_BIN:%=%.d)

include bench/gpu.mk

# --- what people run --------------------------------------------------------------------------------
# demo and test start a second make, so that it sees what the first has installed.
demo: ## install what is missing, build, fine-tune the bundled model and show what it learned [SEED=n]
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(BUILD)/graft
	$(BUILD)/graft demo $(if $(SEED),--seed $(SEED))

demo-base:  ## train the bundled base model again from random weights, into models/demo
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(BUILD)/graft
	$(BUILD)/graft demo --rebuild-base

test:  ## install what is missing, build and run every test [SAN=asan] [FILTER=Tape.*]
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) $(TEST_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(BUILD)/graft $(BUILD)/graft_tests $(EMU_BIN) $(NVCC_TESTS)
	@$(MAKE) --no-print-directory emulated
	@GRAFT_BINARY=$(BUILD)/graft JOBS=$(JOBS) tests/run_sharded.sh "graft_tests" $(BUILD)/graft_tests $(if $(FILTER),--gtest_filter='$(FILTER)')

emulated:  ## run CUDA kernels on the CPU: fast, with a memory checker, with a race checker [FILTER=Faults.*]
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) $(TEST_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(EMU_BIN)
	@$(MAKE) --no-print-directory -j1 $(EMU_KINDS:%=emulated-%) emulated-lazy
# Whole steps, with work on streams done as late as CUDA allows: is a wait missing?
EMU_LAZY_TESTS := CudaTraining.*:CudaStepGraphs.*:*FinetuneOnCuda*:*Generate*:LayoutRuns.*:SmallKernels.*
emulated-lazy: $(EMU)/fast/cuda_tests
	@EMU_LAZY=1 EMU_CACHED=1 OPENBLAS_NUM_THREADS=1 JOBS=$(JOBS) LOG=$<.lazy.log tests/run_sharded.sh \
	  "emulated CUDA, fast, lazy streams" $< --gtest_filter='$(or $(FILTER),$(EMU_LAZY_TESTS))'
emulated-%: $(EMU)/%/cuda_tests
	@OPENBLAS_NUM_THREADS=1 JOBS=$(JOBS) tests/run_sharded.sh "emulated CUDA, $*" $< $(if $(FILTER),--gtest_filter='$(FILTER)')

emulated-train:  ## fine-tune the bundled model with every kernel emulated, and on the CPU [STEPS=20]
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) $(TEST_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(EMU)/fast/cuda_tests
	OPENBLAS_NUM_THREADS=1 GRAFT_FINETUNE_STEPS=$(or $(STEPS),20) $(EMU)/fast/cuda_tests --gtest_filter='*FinetuneOnCuda*'

# The mutants' objects are the normal builds' with those of the changed file, made with -O1 -g0, in
# their place. {dir} is a mutant's folder: a header there hides the tree's.
MUTANTS    ?= 120
FILES      ?= $(wildcard cuda/*.cu cuda/*.cuh)
MUTATE_SRC := $(wildcard tests/cuda/mutants/*.cpp)
mutant_args = compile.$(1)='$(CXX) -I{dir} $(EMU_FLAGS) $(EMU_$(1)) $(if $(filter race,$(1)),-fsanitize=thread) -O1 -g0 -Wno-error \
                -ffile-prefix-map={dir}/= -x c++ -c -o {object} {source}' \
              link.$(1)='$(CXX) $(EMU_$(1)) -o {program} {objects} build/libgraft.a -lboost_context -lopenblas $(LIBS) -lgtest -pthread' \
              objects.$(1)='$(call emu_backend,$(1)) $(call emu_tests,$(1))'
build/mutants/mutate: $(MUTATE_SRC) $(wildcard tests/cuda/mutants/*.h)
	@mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -Wall -Wextra -I. -o $@ $(MUTATE_SRC) -pthread

mutants:  ## change the kernels one place at a time: do tests notice? [MUTANTS=120] [SEED=n] [FILES=cuda/rope.cu]
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) $(TEST_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(EMU_KINDS:%=$(EMU)/%/cuda_tests) build/mutants/mutate
	@OPENBLAS_NUM_THREADS=1 build/mutants/mutate seed=$(or $(SEED),1) count=$(MUTANTS) jobs=$(JOBS) folder=build/mutants/work \
	  files='$(FILES)' kinds='fast race asan' $(foreach kind,$(EMU_KINDS),$(call mutant_args,$(kind)))

ladder:  ## what each rung of each CUDA kernel costs, into cuda/README.md; what this machine cannot measure is "-"
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) $(TEST_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(EMU)/fast/cuda_ladder $(if $(filter-out none,$(NVCC)),$(LADDER_PTXAS))
ifneq ($(CARD),)
	@$(MAKE) --no-print-directory -j$(JOBS) build/bench/cuda_ladder
	build/bench/cuda_ladder --time bench/results --commit $$(git rev-parse --short HEAD)
endif
	$(EMU)/fast/cuda_ladder --table cuda/README.md --results bench/results --ptxas build/nvcc/cuda

bench:  ## kernels and GEMM against OpenBLAS and the FMA peak of this machine
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) $(TEST_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(BENCH_BIN)
	$(BUILD)/bench/gemm_bench
	$(BUILD)/bench/kernels_bench

bench-peers:  ## a training step here and in PEFT, in turn (makes a throw-away Python environment)
	@$(MAKE) --no-print-directory -j$(JOBS) $(BUILD)/bench/train_step
	bench/bench_peers.sh $(BUILD)/bench/train_step

compare-methods:  ## what full, LoRA, QLoRA and DoRA cost and reach, into the README; 20 minutes on two cores
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) $(TEST_PACKAGES)"
	@$(MAKE) --no-print-directory -j$(JOBS) $(BUILD)/bench/train_step $(BUILD)/bench/compare_methods
	bench/compare_methods.sh $(BUILD)/bench/train_step $(BUILD)/bench/compare_methods README.md

check:  ## folder layering, formatting, no shared code in the instruction-set objects
	@$(MAKE) --no-print-directory deps NEED="$(BUILD_PACKAGES) $(CHECK_PACKAGES)"
	@$(MAKE) --no-print-directory -s -j$(JOBS) $(KERNEL_OBJ)
	@tests/check.sh $(BUILD)/obj/tensor/cpu/kernels

format:  ## clang-format every source file in place
	clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

clean:  ## remove build/
	rm -rf build

NEED ?= $(PACKAGES)
MISSING = $(shell for p in $(NEED); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done)
deps:  ## install the Debian packages that are missing
	@missing="$(strip $(MISSING))"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then sudo=; \
	elif command -v sudo >/dev/null; then sudo=sudo; \
	else echo "packages are missing, and neither root nor sudo is here; run this as root, then again:"; \
	  echo "  apt-get update && apt-get install -y $$missing"; exit 1; fi; \
	echo "installing $$missing"; \
	$$sudo apt-get update -qq && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null || \
	{ echo "that failed; run: apt-get update && apt-get install -y $$missing"; exit 1; }
