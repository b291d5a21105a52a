// Contract of the gated activations swiglu and geglu (Shazeer 2020, arXiv:2002.05202).
//
//   y = act(gate) * up,   dgate = dy * up * act'(gate),   dup = dy * act(gate)
//   act(g) = g sigmoid(g) (silu), g Phi(g) (gelu), or gelu's approximation by tanh
//
// gate and up are [rows, cols] of `dtype`; their rows lie gate_step and up_step elements apart, so that both may be
// halves of one projection. y, dy, dgate and dup are dense. No argument may alias another one. Nothing is kept.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

enum class Activation : int32_t { silu = 0, gelu = 1, gelu_tanh = 2 };

struct GatedForward {
  DType dtype;
  Activation activation;
  int64_t rows, cols, gate_step, up_step;
  const void* gate;
  const void* up;
  void* y;
};

struct GatedBackward {
  DType dtype;
  Activation activation;
  int64_t rows, cols, gate_step, up_step;
  const void* dy;
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
};

void gated_forward_cpu(const GatedForward&, const Parallel&);
void gated_backward_cpu(const GatedBackward&, const Parallel&);

}  // namespace seqfuse
