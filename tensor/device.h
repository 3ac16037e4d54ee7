// Where the bytes of a tensor lie. CPU and CUDA are real; Meta has shapes and no bytes: its kernels
// do nothing, and its allocator only counts. A training step on Meta is how `graft info` knows the
// memory that a real step will take.
#pragma once

#include <cstdint>
#include <string_view>

namespace graft {

enum class Device : uint8_t { CPU, CUDA, Meta };

std::string_view device_name(Device device);  // "cpu", "cuda", "meta"

}  // namespace graft
