// Contract of one step of a recurrent cell: what torch.nn.LSTMCell, GRUCell and RNNCell need.
//
//   xg = x @ w_ih^T + b_ih,  a = h @ w_hh^T + b_hh      two GEMMs: the caller's, or in the same pass (RnnCellStep)
//   the rest as in seqfuse/rnn.h, element by element    one read of its inputs, one write of its outputs
//
// Every array is [B, X], row-major and contiguous, of `dtype`. Gate order, G and S as in seqfuse/rnn.h.
// No argument may alias another one. Nothing is kept after the call returns.
#pragma once
#include "seqfuse/rnn.h"

namespace seqfuse {

struct RnnCellForward {
  Cell cell;
  DType dtype;
  int64_t B, H;
  const void* xg;  // [B, G*H]
  const void* a;   // [B, G*H]
  const void* h;   // [B, H], the previous output; GRU only
  const void* c;   // [B, H], the previous cell; LSTM only
  void* h_out;     // [B, H]
  void* c_out;     // [B, H], LSTM only
  void* gates;     // [B, S*H] for the backward pass; null: inference
};

struct RnnCellBackward {
  Cell cell;
  DType dtype;
  int64_t B, H;
  const void* dh_out;  // [B, H] or null
  const void* dc_out;  // [B, H] or null; LSTM only
  const void* gates;   // what the forward pass saved
  const void* h;       // [B, H], the previous output; GRU only
  const void* c;       // [B, H], the previous cell; LSTM only
  const void* h_out;   // [B, H], this step's output; RNN only
  const void* c_out;   // [B, H], this step's cell; LSTM only
  void* dxg;           // [B, G*H]
  void* da;            // [B, G*H], GRU only: elsewhere it equals dxg
  int64_t ld;          // elements between two rows of dxg, and of da
  void* dh;            // [B, H], GRU only: the part of the previous output's gradient that does not pass through w_hh
  void* dc;            // [B, H], LSTM only
};

// The whole forward step of an LSTM or a GRU in one type, products included, from weights as they lie in the module.
struct RnnCellStep {
  Cell cell;
  DType dtype;  // of everything
  int64_t B, I, H;
  const void* x;     // [B, I]
  const void* h;     // [B, H]
  const void* c;     // [B, H], LSTM only
  const void* w_ih;  // [G*H, I]
  const void* w_hh;  // [G*H, H]
  const void* b_ih;  // [G*H] or null, as b_hh
  const void* b_hh;  // [G*H] or null
  void* h_out;       // [B, H]
  void* c_out;       // [B, H], LSTM only
  void* gates;       // [B, 4*H] for the backward pass; null: inference
};

// The two products of its backward pass: dx = dxg @ w_ih, dh (+)= da @ w_hh.
struct RnnCellProducts {
  DType dtype;  // of everything
  int64_t B, I, H, GH;
  const void* dxg;  // [B, GH], rows `ld` elements apart, as da
  const void* da;
  int64_t ld;
  const void* w_ih;  // [GH, I]
  const void* w_hh;  // [GH, H]
  void* dx;          // [B, I]; null: not wanted
  void* dh;          // [B, H]; null: not wanted
  bool add;          // dh holds a part already
};

void rnn_cell_products_cpu(const RnnCellProducts&, const Parallel&);
void rnn_cell_step_cpu(const RnnCellStep&, const Parallel&);
void rnn_cell_forward_cpu(const RnnCellForward&, const Parallel&);
void rnn_cell_backward_cpu(const RnnCellBackward&, const Parallel&);

}  // namespace seqfuse
