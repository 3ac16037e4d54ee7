#include "train/device_choice.h"

#include <filesystem>

#include "cuda/cuda_backend.h"

namespace graft {

Device choose_device(TrainOptions::DeviceChoice choice,
                     const std::function<void(const std::string&)>& say) {
  if (choice == TrainOptions::DeviceChoice::Cpu) return Device::CPU;
  std::string reason;
  if (cuda_available(&reason)) {
    if (!cuda_has_cublas(&reason)) say(concat("no cuBLAS: ", reason, "; using graft's own GEMM"));
    return Device::CUDA;
  }
  CHECK(choice == TrainOptions::DeviceChoice::Auto, "device: cuda was asked for, but ", reason,
        "; use device: cpu, or auto");
  say(concat("device: cpu (", reason, ")"));
  return Device::CPU;
}

TrainOptions::DeviceChoice read_device_choice(const std::string& command, const std::string& word) {
  if (word == "auto") return TrainOptions::DeviceChoice::Auto;
  if (word == "cpu") return TrainOptions::DeviceChoice::Cpu;
  if (word == "cuda") return TrainOptions::DeviceChoice::Cuda;
  throw UsageError(concat(command, ": --device is '", word, "', expected auto, cpu or cuda"));
}

UseGemmPlan::UseGemmPlan(const TrainOptions& options, Device device,
                         const std::function<void(const std::string&)>& say) {
  if (device != Device::CUDA) {
    CHECK(options.lora_layout == LoraLayout::Plain,
          "train: lora_layout needs a GPU; use device: cuda, or lora_layout: plain");
    CHECK(!options.tune, "train: tune needs a GPU; use device: cuda, or tune: false");
    return;
  }
  const std::string path = concat(options.output_dir, "/", kGemmPlanName);
  if (!options.tune && !std::filesystem::exists(path)) return;
  cuda_use_gemm_plan(path, options.tune, say);
  used_ = true;
}

UseGemmPlan::~UseGemmPlan() {
  if (used_) cuda_use_gemm_plan("", false, [](const std::string&) {});
}

}  // namespace graft
