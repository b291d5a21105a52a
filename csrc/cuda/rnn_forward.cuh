// One time step of the recurrent scan, forward: product and gates in one kernel. Contract and maths: seqfuse/rnn.h
//
//   a = h_{t-1} @ w_hh^T + b_hh;   then the cell's gates (common/gates.h)
//
// Memory traffic allowed: w_hh once per 32 batch rows (from the L2 cache after the first step), h_{t-1} once per 8
// units, xg, the previous state and everything that is written once. h is exchanged in the dtype through y; the LSTM's
// cell and the GRU's h of the blend h = n + z (h - n) stay fp32 from step to step.
#pragma once
#include "cuda/rnn_product.cuh"
#include "seqfuse/rnn.h"

namespace seqfuse::cuda {

// rows of this step: a pointer to its first and the distance between batch entries
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  SEQFUSE_DEVICE T* at(int row, int64_t column) const { return data + row * stride + column; }
};

template <class T>
struct ForwardStep {
  int B, H;
  bool relu;
  Rows<const T> xg;         // [B, G*H]
  Rows<const T> h;          // previous h
  const T* c0;              // first step of an LSTM: [B, H]; else null
  Rows<const float> state;  // LSTM: previous c; GRU: previous h. null in the first step
  Rows<float> state_out;    // where this step's goes; may be `state` itself, each element being one thread's own
  const T* w_hh;
  const T* b_hh;  // or null
  Rows<T> y;
  Rows<T> gates;  // null: inference
  T* h_n;         // last step only, else null
  T* c_n;
};

// C stands for the kind of cell: rnn_tanh means both activations of the plain RNN.
template <Cell C, class T, bool Aligned>
SEQFUSE_KERNEL(kStepThreads, kStepBlocks<T>)
rnn_forward_step(ForwardStep<T> p) {
  constexpr int G = C == Cell::lstm ? 4 : C == Cell::gru ? 3 : 1;
  using dev::Math;
  const int row0 = dev::block_x() * kRows, unit0 = dev::block_y() * kUnits, H = p.H;
  const int b = row0 + dev::thread() / kUnits, u = unit0 + dev::thread() % kUnits;
  const bool mine = b < p.B && u < H;

  // asked for before the product, so that they arrive while it runs
  float x[G] = {}, bias[G] = {}, previous = 0.0f;
  if (mine) {
#pragma unroll
    for (int g = 0; g < G; g++) x[g] = dev::widen(*p.xg.at(b, int64_t(g) * H + u));
    if (p.b_hh) {
#pragma unroll
      for (int g = 0; g < G; g++) bias[g] = dev::widen(p.b_hh[int64_t(g) * H + u]);
    }
    if constexpr (C != Cell::rnn_tanh) {
      if (p.state.data)
        previous = *p.state.at(b, u);
      else
        previous = C == Cell::lstm ? dev::widen(p.c0[int64_t(b) * H + u]) : dev::widen(*p.h.at(b, u));
    }
  }

  float a[G];
  const Left<T> left{p.h.data, nullptr, p.h.stride, 0, H, H};
  step_product<T, G, Aligned>(a, left, p.w_hh, row0, p.B, unit0, H);
  if (!mine) return;
#pragma unroll
  for (int g = 0; g < G; g++) a[g] += bias[g];

  float h;
  if constexpr (C == Cell::lstm) {
    const LstmState<float> s = lstm_forward<Math>(x[0] + a[0], x[1] + a[1], x[2] + a[2], x[3] + a[3], previous);
    const float saved[4] = {s.i, s.f, s.g, s.o};
    *p.state_out.at(b, u) = s.c;
    if (p.gates.data) {
#pragma unroll
      for (int g = 0; g < 4; g++) *p.gates.at(b, int64_t(g) * H + u) = dev::narrow<T>(saved[g]);
    }
    if (p.c_n) p.c_n[int64_t(b) * H + u] = dev::narrow<T>(s.c);
    h = s.h;
  } else if constexpr (C == Cell::gru) {
    const GruState<float> s = gru_forward<Math>(x[0] + a[0], x[1] + a[1], x[2], a[2], previous);
    const float saved[4] = {s.r, s.z, s.n, a[2]};
    *p.state_out.at(b, u) = s.h;
    if (p.gates.data) {
#pragma unroll
      for (int g = 0; g < 4; g++) *p.gates.at(b, int64_t(g) * H + u) = dev::narrow<T>(saved[g]);
    }
    h = s.h;
  } else {
    h = p.relu ? rnn_forward<Math, true>(x[0] + a[0]) : rnn_forward<Math, false>(x[0] + a[0]);
  }
  const T rounded = dev::narrow<T>(h);
  *p.y.at(b, u) = rounded;
  if (p.h_n) p.h_n[int64_t(b) * H + u] = rounded;
}

inline dev::Grid step_grid(int64_t B, int64_t H) {
  return {(B + kRows - 1) / kRows, (H + kUnits - 1) / kUnits};
}

}  // namespace seqfuse::cuda
