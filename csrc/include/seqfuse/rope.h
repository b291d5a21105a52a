// Contract of the rotary position embedding (Su et al. 2021, arXiv:2104.09864).
//
//   y_1 = x_1 cos - x_2 sin,   y_2 = x_2 cos + x_1 sin          (inverse: sin with the other sign, the gradient)
//
// for the pairs (x_1, x_2) of the first 2 * half elements of a head: elements i and half + i (GPT-NeoX), or 2i and
// 2i + 1 (GPT-J, `interleaved`). The other elements are copied. x and y are [batch, heads, time, dim], a head's
// elements side by side, with strides of their own; y may be x itself, and nothing else may alias. cos and sin are fp32
// [table rows, half]; the row of (b, t) is positions[b * position_step + t], or offset + t without positions. The
// caller checks that it exists. Nothing is kept.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

struct Rope {
  DType dtype;
  int64_t batch, heads, time, dim, half;
  int64_t batch_step, head_step, time_step;        // of x
  int64_t y_batch_step, y_head_step, y_time_step;  // of y
  const void* x;
  const float* cos;
  const float* sin;
  const int64_t* positions;  // null: offset + t
  int64_t position_step;     // time, or 0 where all of the batch shares one row
  int64_t offset;
  bool interleaved, inverse;
  void* y;
};

void rope_cpu(const Rope&, const Parallel&);

}  // namespace seqfuse
