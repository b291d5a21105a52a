// Contract of layer_norm (Ba, Kiros, Hinton 2016, arXiv:1607.06450), with an optional fused residual addition.
//
//   s = x + residual          (s = x without a residual)
//   y = (s - mean(s)) * rstd(s) * weight + bias,   rstd = 1 / sqrt(var(s) + eps)
//
// Rows are contiguous: x, residual, s, y and their gradients are [rows, cols], row-major, of `dtype`.
// weight, bias, dweight and dbias are [cols] of `param_dtype`: `dtype` itself, or f32 with a 16-bit `dtype`. Statistics
// are fp32 [rows]. No argument may alias another one, except that `residual` may be `x`. Nothing is kept after the call
// returns.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

struct LayerNormForward {
  DType dtype, param_dtype;
  int64_t rows, cols;
  const void* x;
  const void* residual;  // null: none, and then `sum` is not written
  const void* weight;    // null: ones
  const void* bias;      // null: zeros
  float eps;
  void* y;
  void* sum;    // x + residual, rounded to dtype; the statistics are those of the rounded sum
  float* mean;  // [rows]
  float* rstd;  // [rows]
};

struct LayerNormBackward {
  DType dtype, param_dtype;
  int64_t rows, cols;
  const void* dy;
  const void* dsum;  // gradient that reaches `sum` from elsewhere; null: none
  const void* s;     // what was normalised: x, or the stored sum
  const void* weight;
  const float* mean;
  const float* rstd;
  void* dx;        // gradient of x, and of the residual: the two are equal
  void* dweight;   // null: not wanted
  void* dbias;     // null: not wanted
  float* partial;  // CUDA: scratch [2, partial_rows, cols] for dweight and dbias
  int64_t partial_rows;
};

void layer_norm_forward_cpu(const LayerNormForward&, const Parallel&);
void layer_norm_backward_cpu(const LayerNormBackward&, const Parallel&);

// `stream` is a cudaStream_t. Returns a cudaError_t as int; 0 is success.
int layer_norm_forward_cuda(const LayerNormForward&, void* stream);
int layer_norm_backward_cuda(const LayerNormBackward&, void* stream);
int64_t layer_norm_partial_rows_cuda(int64_t rows, int64_t cols);  // how many partial rows a backward call needs

}  // namespace seqfuse
