// Attention on Hopper GPUs (compute capability 9.0): what csrc/cuda/attention_*.cu do. Not yet run on a GPU.
// Meaning: pyext/seqfuse/reference/attention.py.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

// [B, H, T, D] in elements; d is contiguous
struct HeadStrides {
  int64_t b, h, t;
};

// out = softmax(scale * q k^T) v, lse = log sum exp(scale * q k^T).
//
// bf16 or f16; D is 64 or 128, of k and v too; Hq a multiple of Hkv: query head h reads key head h / (Hq / Hkv); any Tq
// and Tk, 0 included; scale > 0 and finite. Of q, k, v and out: addresses that are multiples of 16 bytes, strides of
// dimensions longer than 1 that are positive multiples of 8 elements. Nothing may overlap out or lse.
struct AttentionForwardCuda {
  DType dtype;
  bool causal;  // key j is visible to query i if j <= i + Tk - Tq
  float scale;
  int64_t B, Hq, Hkv, Tq, Tk, D;
  const void *q, *k, *v;
  HeadStrides q_strides, k_strides, v_strides;
  void* out;  // [B, Hq, Tq, D]; 0 where a row sees no key
  HeadStrides out_strides;
  float* lse;  // [B, Hq, Tq] contiguous, natural logarithm; -inf where a row sees no key
};

// 0, or a cudaError_t as int: 801 (not supported) where the device or a stride is none of the above.
int attention_forward_cuda(const AttentionForwardCuda&, void* stream);

// Gradients of q, k, v from those of out and lse; the same limits. out and lse are what forward gave. Rows that see no
// key get and give no gradient. Deterministic.
struct AttentionBackwardCuda {
  DType dtype;
  bool causal;
  float scale;
  int64_t B, Hq, Hkv, Tq, Tk, D;
  const void *q, *k, *v, *out, *dout;
  HeadStrides q_strides, k_strides, v_strides, out_strides, dout_strides;
  const float* lse;   // [B, Hq, Tq] contiguous
  const float* dlse;  // the same, or null
  void *dq, *dk, *dv;
  HeadStrides dq_strides, dk_strides, dv_strides;
  float*
      workspace;  // attention_backward_workspace_cuda floats, 16-byte aligned; for the duration of the call's kernels
};

int64_t attention_backward_workspace_cuda(int64_t B, int64_t Hq, int64_t Tq);
int attention_backward_cuda(const AttentionBackwardCuda&, void* stream);

}  // namespace seqfuse
