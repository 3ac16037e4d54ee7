// The list of tiles that attention's kernels walk: made on the host from the documents' lengths,
// and uploaded once for as long as the batch lives, not in every layer.
#include <algorithm>
#include <vector>

#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/device_backend.h"

namespace graft {
namespace {

std::vector<AttentionTile> cut_into_tiles(const Tensor& cu_q, const Tensor& cu_k, int rows,
                                          bool over_keys) {
  const int32_t *q = cu_q.data<const int32_t>(), *k = cu_k.data<const int32_t>();
  std::vector<std::pair<int64_t, AttentionTile>> tiles;  // with the work of one row of each
  for (int64_t d = 0; d + 1 < cu_q.num_elements(); ++d) {
    const int queries = q[d + 1] - q[d], keys = k[d + 1] - k[d];
    for (int first = 0; first < (over_keys ? keys : queries); first += rows)
      tiles.push_back({over_keys ? queries - std::max(0, first - (keys - queries))
                                 : std::min(first + rows, queries) + keys - queries,
                       {first, q[d], queries, k[d], keys}});
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  std::vector<AttentionTile> sorted;
  for (const auto& tile : tiles) sorted.push_back(tile.second);
  return sorted;
}

}  // namespace

Tensor attention_tiles(const Tensor& cu_q, const Tensor& cu_k, int rows, bool over_keys) {
  auto& backend = static_cast<CudaBackend&>(cuda_backend());
  return backend.tile_list(cu_q, cu_k, rows, over_keys);
}

Tensor CudaBackend::tile_list(const Tensor& cu_q, const Tensor& cu_k, int rows, bool over_keys) {
  const auto same = [](const std::weak_ptr<Storage>& kept, const Tensor& tensor) {
    return kept.lock() == tensor.storage();
  };
  for (const TileList& list : tile_lists_)
    if (list.rows == rows && list.over_keys == over_keys && same(list.cu_q, cu_q) &&
        same(list.cu_k, cu_k) && list.place_q == cu_q.raw() && list.place_k == cu_k.raw())
      return list.tiles;
  std::erase_if(tile_lists_,
                [](const TileList& list) { return list.cu_q.expired() || list.cu_k.expired(); });

  const std::vector<AttentionTile> tiles = cut_into_tiles(cu_q, cu_k, rows, over_keys);
  static_assert(sizeof(AttentionTile) == 5 * sizeof(int32_t));
  // Outlives the step, and so is not of the pool.
  const SetPooled outside(allocator_of(Device::CUDA), false);
  const Tensor list =
      Tensor::empty({int64_t(tiles.size()), 5}, DType::I32, Device::CUDA, Scope::Scratch);
  if (!tiles.empty()) upload(list.raw(), tiles.data(), size_t(list.num_bytes()));
  tile_lists_.push_back(
      {cu_q.storage(), cu_k.storage(), cu_q.raw(), cu_k.raw(), rows, over_keys, list});
  return list;
}

}  // namespace graft
