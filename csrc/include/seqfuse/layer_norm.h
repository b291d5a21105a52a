// Contract of layer_norm (Ba, Kiros, Hinton 2016, arXiv:1607.06450) and rms_norm (Zhang, Sennrich 2019,
// arXiv:1910.07467), with dropout and a residual addition fused before them.
//
//   s = dropout(x) + residual          (either may be missing; s = x without both)
//   y = (s - mean(s)) * rstd(s) * weight + bias,   rstd = 1 / sqrt(var(s) + eps)
//   rms: mean(s) counts as 0, in var(s) too, and there is no bias
//
// Rows are contiguous: x, residual, s, y and their gradients are [rows, cols], row-major, of `dtype`.
// weight, bias, dweight and dbias are [cols] of `param_dtype`: `dtype` itself, or f32 with a 16-bit `dtype`. Statistics
// are fp32 [rows]. No argument may alias another one, except that `residual` may be `x`. Nothing is kept after the call
// returns.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

struct NormOptions {
  bool rms;
  bool zero_centered;   // 1 + weight is what multiplies
  double dropout_p;     // 0: none, and then `seed` is not read
  const int64_t* seed;  // [1], where x is; which elements stay: norm_dropout in reference/layer_norm.py
};

struct LayerNormForward {
  DType dtype, param_dtype;
  int64_t rows, cols;
  const void* x;
  const void* residual;  // null: none
  const void* weight;    // null: ones
  const void* bias;      // null: zeros
  float eps;
  void* y;
  void* sum;    // s, rounded to dtype; the statistics are those of the rounded s. Not written where s is x
  float* mean;  // [rows]; rms: not written
  float* rstd;  // [rows]
  NormOptions options;
};

struct LayerNormBackward {
  DType dtype, param_dtype;
  int64_t rows, cols;
  const void* dy;
  const void* dsum;  // gradient that reaches `sum` from elsewhere; null: none
  const void* s;     // what was normalised: x, or the stored sum
  const void* weight;
  const float* mean;  // rms: not read
  const float* rstd;
  void* dx;         // gradient of x; without dropout also of the residual
  void* dresidual;  // with dropout: gradient of the residual; null: not wanted
  void* dweight;    // null: not wanted
  void* dbias;      // null: not wanted
  float* partial;   // CUDA: scratch [2, partial_rows, cols] for dweight and dbias
  int64_t partial_rows;
  NormOptions options;
};

void layer_norm_forward_cpu(const LayerNormForward&, const Parallel&);
void layer_norm_backward_cpu(const LayerNormBackward&, const Parallel&);

// `stream` is a cudaStream_t. Returns a cudaError_t as int; 0 is success.
int layer_norm_forward_cuda(const LayerNormForward&, void* stream);
int layer_norm_backward_cuda(const LayerNormBackward&, void* stream);
int64_t layer_norm_partial_rows_cuda(int64_t rows, int64_t cols);  // how many partial rows a backward call needs

}  // namespace seqfuse
