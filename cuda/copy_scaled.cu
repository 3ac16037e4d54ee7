// Many small scaled copies in one launch: what an optimizer step does to the borders of bordered
// weights (nn/linear_group.h).
#include "cuda/device_backend.h"
#include "cuda/device_utils.cuh"

namespace graft {
namespace {

constexpr int kThreads = 256;

struct Piece {
  void* dst;
  const float* src;
  int64_t dst_stride, src_stride;  // of rows, in elements
  int64_t elements;
  int32_t cols;
  float alpha;
};
// They travel as a parameter, of which a kernel may have 4 KiB: nothing is uploaded, and a recorded
// graph can repeat the launch.
constexpr int kPieces = 64;
struct Pieces {
  Piece piece[kPieces];
};

// copy_scaled.
//   dst[r,c] = alpha src[r,c]   for every piece
// Shapes    src (R, C) F32, dst (R, C) F32 or BF16, rows strided; R, C by piece.
// Mapping   blockIdx.y = piece; its blocks share the elements, thread after thread, and go on by
//           the size of the grid.
// Bytes     4 read, 2 or 4 written an element. All adapters of 8B at r 16, BF16: 252 MB.
// Roofline  53 us at 4.8 TB/s (H200 peak); rows of B are only r elements. Measured: -
// Numerics  F32, one rounding at the store.
template <class T>
__global__ void __launch_bounds__(kThreads) copy_scaled_kernel(Pieces pieces) {
  const Piece& piece = pieces.piece[blockIdx.y];
  T* dst = static_cast<T*>(piece.dst);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < piece.elements;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / piece.cols, col = i - row * piece.cols;
    dst[row * piece.dst_stride + col] =
        round_to<T>(piece.alpha * piece.src[row * piece.src_stride + col]);
  }
}

Piece piece_of(const ScaledCopy& copy, DType dtype) {
  const Tensor &dst = copy.dst, &src = copy.src;
  CHECK(dst.shape() == src.shape() && src.dtype() == DType::F32 && dst.dtype() == dtype &&
            src.device() == Device::CUDA && dst.device() == Device::CUDA,
        "copy_scaled: ", dtype_name(src.dtype()), " ", src.shape(), " to ", dtype_name(dst.dtype()),
        " ", dst.shape(), ", wanted F32 to ", dtype_name(dtype), " of one shape, on the GPU");
  CHECK(dst.cols() <= INT32_MAX, "copy_scaled: rows of ", dst.cols(), ", wanted fewer than 2^31");
  return {dst.raw(),          device_data<const float>(src), dst.row_stride(), src.row_stride(),
          dst.num_elements(), int32_t(dst.cols()),           float(copy.alpha)};
}

}  // namespace

void CudaBackend::copy_scaled(std::span<const ScaledCopy> copies) {
  for (size_t begin = 0; begin < copies.size(); begin += kPieces) {
    const size_t count = std::min(copies.size() - begin, size_t(kPieces));
    const DType dtype = copies[begin].dst.dtype();
    Pieces pieces{};
    int64_t most = 0;
    for (size_t i = 0; i < count; ++i) {
      pieces.piece[i] = piece_of(copies[begin + i], dtype);
      most = std::max(most, pieces.piece[i].elements);
    }
    if (most == 0) continue;
    // A few elements a thread: pieces are of unlike sizes, and empty blocks cost as well.
    const unsigned blocks = unsigned(std::min<int64_t>(ceil_div(most, kThreads * 8), 1024));
    dispatch_activation("copy_scaled", dtype, [&]<class T>(T) {
      launch(copy_scaled_kernel<T>, dim3(blocks, unsigned(count)), dim3(kThreads), 0, stream_,
             pieces);
    });
  }
}

}  // namespace graft
