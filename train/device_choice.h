// From --device auto|cpu|cuda to a device of this machine.
#pragma once

#include <functional>
#include <string>

#include "tensor/device.h"
#include "train/options.h"

namespace graft {

// auto takes a usable GPU, else `say` gets one line with the reason and it is the CPU. cuda without
// a usable GPU is an Error. A GPU without cuBLAS can be used; `say` gets a line about that, too.
Device choose_device(TrainOptions::DeviceChoice choice,
                     const std::function<void(const std::string&)>& say);

// "auto", "cpu" or "cuda"; throws UsageError for anything else, in the name of `command`.
TrainOptions::DeviceChoice read_device_choice(const std::string& command, const std::string& word);

constexpr const char* kGemmPlanName = "gemm_plan.json";

// While it lives, products take the algorithms in output_dir/gemm_plan.json, if it is there, and
// with `tune` those that it lacks are timed and added. Throws Error for options that need a GPU
// where `device` is none.
class UseGemmPlan {
 public:
  UseGemmPlan(const TrainOptions& options, Device device,
              const std::function<void(const std::string&)>& say);
  ~UseGemmPlan();
  UseGemmPlan(const UseGemmPlan&) = delete;

 private:
  bool used_ = false;
};

}  // namespace graft
