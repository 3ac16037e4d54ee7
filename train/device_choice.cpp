#include "train/device_choice.h"

#include "cuda/cuda_backend.h"

namespace graft {

Device choose_device(TrainOptions::DeviceChoice choice,
                     const std::function<void(const std::string&)>& say) {
  if (choice == TrainOptions::DeviceChoice::Cpu) return Device::CPU;
  std::string reason;
  if (cuda_available(&reason)) return Device::CUDA;
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

}  // namespace graft
