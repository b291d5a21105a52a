// Contract of the recurrent scan: one layer, one direction, of an RNN, GRU or LSTM over a whole sequence.
//
// The input's part of the gates, xg = x @ w_ih^T + b_ih, is one GEMM over the whole sequence and comes in ready;
// so do the whole-sequence GEMMs of the backward pass afterwards. The scan is what cannot be one GEMM:
//
//   a_t = h_{t-1} @ w_hh^T + b_hh                                     [B, G*H]
//   RNN   h = act(xg + a),  act = tanh or relu                        (Elman 1990)
//   GRU   r = sigmoid(xg_r + a_r)   z = sigmoid(xg_z + a_z)           (Cho 2014, reset after the product, as in cuDNN)
//         n = tanh(xg_n + r * a_n)  h = (1 - z) * n + z * h
//   LSTM  i, f, o = sigmoid(xg + a)  g = tanh(xg_g + a_g)             (Hochreiter 1997, Gers 2000)
//         c = f * c + i * g          h = o * tanh(c)
//
// Gate order is torch.nn's: LSTM i f g o, GRU r z n. G = 1, 3, 4 gates; S = 0, 4, 4 saved values a unit.
// A "sequence tensor" is [T, B, X] with element strides (t, b, 1); the same strides serve time-major and batch-major.
// Every array of `dtype` unless it says float. c and all accumulators are fp32 inside. h is exchanged in `dtype`.
// With `reverse` the scan runs t = T-1 .. 0, and h_n belongs to t = 0. No argument may alias another one.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

enum class Cell : int32_t { rnn_tanh = 0, rnn_relu = 1, gru = 2, lstm = 3 };

inline int gates_of(Cell c) {
  return c == Cell::lstm ? 4 : c == Cell::gru ? 3 : 1;
}
inline int saved_of(Cell c) {
  return c == Cell::lstm || c == Cell::gru ? 4 : 0;
}

struct Strides {
  int64_t t, b;
};

struct RnnForward {
  Cell cell;
  DType dtype;
  int64_t T, B, H;
  bool reverse;
  const void* xg;  // sequence [T, B, G*H]
  Strides xg_strides;
  const void* h0;    // [B, H]
  const void* c0;    // [B, H], LSTM only
  const void* w_hh;  // [G*H, H]
  const void* b_hh;  // [G*H] or null
  void* y;           // sequence [T, B, H]
  Strides y_strides;
  void* h_n;    // [B, H]
  void* c_n;    // [B, H], LSTM only
  void* gates;  // sequence [T, B, S*H]: LSTM i f g o after their activation; GRU r z n and a_n. null: inference
  Strides gates_strides;
  float* cells;  // sequence [T, B, H] of c_t, LSTM only; null: inference
  Strides cells_strides;
};

struct RnnBackward {
  Cell cell;
  DType dtype;
  int64_t T, B, H;
  bool reverse;
  const void* dy;  // sequence [T, B, H] or null
  Strides dy_strides;
  const void* dh_n;  // [B, H] or null
  const void* dc_n;  // [B, H] or null
  const void* y;     // what the forward pass wrote
  Strides y_strides;
  const void* gates;
  Strides gates_strides;
  const float* cells;
  Strides cells_strides;
  const void* h0;
  const void* c0;
  const void* w_hh;
  void* dxg;  // sequence [T, B, G*H]: gradient of xg (and, but for the GRU's n gate, of a)
  Strides dxg_strides;
  void* dan;  // GRU only: sequence [T, B, H], gradient of a_n
  Strides dan_strides;
  void* dh0;     // [B, H]
  void* dc0;     // [B, H], LSTM only
  float* db_hh;  // [G*H], sum over t and b of the gradient of a; null: not wanted
};

void rnn_forward_cpu(const RnnForward&, const Parallel&);
void rnn_backward_cpu(const RnnBackward&, const Parallel&);

// One launch a step; `stream` is a cudaStream_t, `workspace` device memory of at least rnn_workspace_cuda() bytes.
// Returns a cudaError_t as int; 0 is success.
int64_t rnn_workspace_cuda(Cell, DType, int64_t B, int64_t H, bool backward);
int rnn_forward_cuda(const RnnForward&, void* workspace, void* stream);
int rnn_backward_cuda(const RnnBackward&, void* workspace, void* stream);

}  // namespace seqfuse
