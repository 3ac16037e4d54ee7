// What the rungs of attention share: their arguments, and the list of tiles that they walk. Private
// to attention*.cu and their tests; everybody else calls Backend::attention_forward.
//   rung 1  one warp per row: any head_dim <= 256, F32 and BF16                      attention.cu
//   rung 2  tiles in shared memory, F32 arithmetic: any head_dim <= 256, F32 and BF16
//   rung 3  tensor cores: BF16, head_dim 64 or 128                         attention_3_mma.cu
#pragma once

#include <cuda_runtime.h>

#include "tensor/tensor.h"

namespace graft {

// Shapes as in tensor/backend.h; all on the device but cu_q and cu_k (documents + 1), on the CPU.
struct AttentionForward {
  Tensor out, lse;
  Tensor q, k, v;
  Tensor cu_q, cu_k;
  double scale;
};

// Self-attention: `cu` is cu_q and cu_k.
struct AttentionBackward {
  Tensor dq, dk, dv;
  Tensor dout, q, k, v;
  Tensor lse;    // (heads, T) F32, from the forward
  Tensor delta;  // (heads, T) F32: sum over the head of dout * out, by attention_delta
  Tensor cu;
  double scale;
};

// One block's rows, of queries or of keys, and the document that they belong to. A block of a grid
// is one tile of one head: blockIdx.x = tile * heads + head.
struct AttentionTile {
  int32_t first;             // row of the document at which the tile begins
  int32_t q_begin, queries;  // the document's queries: rows [q_begin, q_begin + queries) of q
  int32_t k_begin, keys;
};

struct AttentionSizes {
  int heads, kv_heads, head_dim;
  int64_t tokens;  // rows of q: the stride of lse and delta
  float scale;
};

// On the device, (tiles, 5) I32: every document cut into tiles of `rows` queries (or keys, where
// over_keys), the tiles with most work first. Tiles never cross documents, so packing costs the sum
// of the squared lengths and not the square of their sum. Made once for the life of cu_q and cu_k
// (attention_tiles.cpp), whose contents must not change.
Tensor attention_tiles(const Tensor& cu_q, const Tensor& cu_k, int rows, bool over_keys);

// delta[h, t] = sum_c dout[t, h, c] * out[t, h, c].
void attention_delta(Tensor& delta, const Tensor& dout, const Tensor& out, cudaStream_t stream);

// The rung that the backend takes, and whether a rung can do it at all.
bool attention_rung_supports(int rung, const Tensor& q);
int attention_rung(const Tensor& q);
void attention_forward_rung(int rung, const AttentionForward& args, cudaStream_t stream);
void attention_backward_rung(int rung, const AttentionBackward& args, cudaStream_t stream);

// Few queries of every document over any number of keys (decoding with a KV cache): split over the
// keys, any head_dim <= 256. The backend takes it before any rung. attention_decode.cu
bool attention_is_decoding(const AttentionForward& args);
void attention_decode(const AttentionForward& args, cudaStream_t stream);

void attention_forward_3_mma(const AttentionForward& args, cudaStream_t stream);
void attention_backward_3_mma(const AttentionBackward& args, cudaStream_t stream);

inline AttentionSizes attention_sizes(const Tensor& q, const Tensor& k, double scale) {
  return {int(q.size(1)), int(k.size(1)), int(q.size(2)), q.size(0), float(scale)};
}

}  // namespace graft
