// Contract of y = x weight^T + bias, made for few rows of x: one step of decoding. Many rows go through in blocks of
// linear_block_rows; bf16 is then widened a tile of the weights at a time, never as a whole.
//
// x [rows, cols], weight [outputs, cols] and bias [outputs] (null: none) of `dtype`, f32 or bf16, rows >= 1; rows of
// weight lie weight_step elements apart, everything else is dense. y [rows, outputs] of the same dtype must not overlap
// anything else. Sums are fp32. Nothing is kept after a call returns.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

constexpr int64_t linear_few_rows = 8;  // one read of the weights is all that these cost
constexpr int64_t linear_block_rows = 128;

struct LinearForward {
  DType dtype;
  int64_t rows, cols, outputs, weight_step;
  const void* x;
  const void* weight;
  const void* bias;
  void* y;
};

void linear_forward_cpu(const LinearForward&, const Parallel&);

}  // namespace seqfuse
