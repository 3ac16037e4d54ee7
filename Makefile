# graft: `make help` lists the targets.
CXX      ?= g++
BUILD    ?= build
SAN      ?=
CXXFLAGS ?= -O3
ifeq ($(origin CXX),default)
CXX := g++
endif

ifneq ($(SAN),)
BUILD := build/$(SAN)
endif
SANFLAGS_asan := -fsanitize=address,undefined -fno-omit-frame-pointer -g -O1
SANFLAGS := $(SANFLAGS_$(SAN))

ALLFLAGS := -std=c++20 $(CXXFLAGS) -Wall -Wextra -I. -MMD -MP -pthread $(SANFLAGS)
LIBS := -lyaml-cpp -lpcre2-8 -lutf8proc -pthread

# --- sources: every folder is read by wildcard; cpu/kernels is compiled once per instruction set ---
ISAS := portable avx2 avx512 wide16
ISA_portable :=
ISA_avx2     := -mavx2 -mfma -mf16c
ISA_avx512   := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512
ISA_wide16   := -mavx2 -mfma -mf16c -Wno-psabi

KERNEL_SRC := $(wildcard tensor/cpu/kernels/*.cpp)
LIB_SRC := $(wildcard tensor/*.cpp tensor/cpu/*.cpp tensor/cpu/reference/*.cpp autograd/*.cpp \
             nn/*.cpp models/*.cpp) cuda/no_cuda.cpp $(filter-out train/main.cpp,$(wildcard train/*.cpp))
KERNEL_OBJ := $(foreach isa,$(ISAS),$(KERNEL_SRC:%.cpp=$(BUILD)/obj/%.$(isa).o))
LIB_OBJ  := $(LIB_SRC:%.cpp=$(BUILD)/obj/%.o) $(KERNEL_OBJ)
TEST_SRC := $(wildcard tests/*.cpp)
TEST_OBJ := $(TEST_SRC:%.cpp=$(BUILD)/obj/%.o)

.DEFAULT_GOAL := all
.PHONY: all
all: $(BUILD)/graft

$(BUILD)/graft: $(BUILD)/obj/train/main.o $(BUILD)/libgraft.a
	$(CXX) $(ALLFLAGS) -o $@ $^ $(LIBS)

$(BUILD)/libgraft.a: $(LIB_OBJ)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/graft_tests: $(TEST_OBJ) $(BUILD)/libgraft.a
	$(CXX) $(ALLFLAGS) -o $@ $(TEST_OBJ) $(BUILD)/libgraft.a $(LIBS) -lgtest -lopenblas

$(BUILD)/obj/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(ALLFLAGS) -c -o $@ $<

define isa_rule
$$(BUILD)/obj/tensor/cpu/kernels/%.$(1).o: tensor/cpu/kernels/%.cpp
	@mkdir -p $$(@D)
	$$(CXX) $$(ALLFLAGS) $$(ISA_$(1)) -DGRAFT_ISA=$(1) -DGRAFT_ISA_$(1) -c -o $$@ $$<
endef
$(foreach isa,$(ISAS),$(eval $(call isa_rule,$(isa))))

-include $(LIB_OBJ:.o=.d) $(TEST_OBJ:.o=.d) $(BUILD)/obj/train/main.d
