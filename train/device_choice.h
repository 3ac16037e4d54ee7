// From --device auto|cpu|cuda to a device of this machine.
#pragma once

#include <functional>
#include <string>

#include "tensor/device.h"
#include "train/options.h"

namespace graft {

// auto takes a usable GPU, else `say` gets one line with the reason and it is the CPU. cuda without
// a usable GPU is an Error.
Device choose_device(TrainOptions::DeviceChoice choice,
                     const std::function<void(const std::string&)>& say);

// "auto", "cpu" or "cuda"; throws UsageError for anything else, in the name of `command`.
TrainOptions::DeviceChoice read_device_choice(const std::string& command, const std::string& word);

}  // namespace graft
