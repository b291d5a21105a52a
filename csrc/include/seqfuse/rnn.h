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
// Gate order is torch.nn's: LSTM i f g o, GRU r z n. G = 1, 3, 4 gates; S saved values a unit (saved_of).
// A "sequence tensor" is [T, B, X] with element strides (t, b, 1); the same strides serve time-major and batch-major.
// With options.packed it is [N, X]: sequence after sequence, N = sum(lengths), and both strides are that of a row.
// Every array of `dtype` unless it says otherwise. c and all accumulators are fp32 inside. h is exchanged in `dtype`.
// With `reverse` the scan runs t = T-1 .. 0, and h_n belongs to t = 0. No argument may alias another one, but in the
// CPU's backward pass of LSTM and GRU dxg, with dan behind it (GRU), may lie in the place of gates.
//
// What a scan may do besides its cell is in RnnOptions; the truth for it is pyext/seqfuse/reference/rnn.py.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

enum class Cell : int32_t { rnn_tanh = 0, rnn_relu = 1, gru = 2, lstm = 3 };

constexpr int gates_of(Cell c) {
  return c == Cell::lstm ? 4 : c == Cell::gru ? 3 : 1;
}
// zoneout: whether h is zoned out, so that an RNN's h~ cannot be had from y
inline int saved_of(Cell c, bool zoneout = false) {
  return c == Cell::lstm || c == Cell::gru ? 4 : zoneout ? 1 : 0;
}

struct Strides {
  int64_t t, b;
};

// All of it may be left out: a value-initialised RnnOptions is the plain scan, the only one that the CUDA kernels with
// a launch a step have.
struct RnnOptions {
  // [B], each in [0, T]: sequence b is steps 0 .. lengths[b] - 1. In host memory; for the CUDA kernels in device memory
  const int64_t* lengths = nullptr;
  bool packed = false;           // sequence tensors are [N, X]; needs lengths, of which T is the largest
  const bool* resets = nullptr;  // sequence [T, B]: the state before this step is 0
  Strides resets_strides{};
  const void* hidden_mask = nullptr;  // [B, H], multiplies h_{t-1} on its way into the product
  const void* peephole = nullptr;     // [3, H], LSTM: from c_{t-1} to i and f, from the new c to o
  const bool* zone_h = nullptr;       // sequence [T, B, H]: where true, h keeps the value of the step before
  Strides zone_h_strides{};
  const bool* zone_c = nullptr;  // the same for c, LSTM only
  Strides zone_c_strides{};
  float zoneout_h = 0, zoneout_c = 0;  // without a mask: the weight of the value of the step before
  int64_t heads = 1;                   // w_hh is [G*H, H / heads]: unit u of a gate sees the units of its own head

  bool zones_h() const { return zone_h || zoneout_h != 0; }
  bool zones_c() const { return zone_c || zoneout_c != 0; }
  // the name of an option that is in use; null: the scan is plain
  const char* in_use() const {
    if (lengths) return "lengths";
    if (resets) return "resets";
    if (hidden_mask) return "hidden_mask";
    if (peephole) return "peephole";
    if (zone_h) return "zone_h";
    if (zone_c) return "zone_c";
    if (zoneout_h != 0) return "zoneout_h";
    if (zoneout_c != 0) return "zoneout_c";
    return heads > 1 ? "w_hh with heads" : nullptr;
  }
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
  const void* w_hh;  // [G*H, H / heads]
  const void* b_hh;  // [G*H] or null
  void* y;           // sequence [T, B, H]
  Strides y_strides;
  void* h_n;    // [B, H]
  void* c_n;    // [B, H], LSTM only
  void* gates;  // sequence [T, B, S*H]: LSTM i f g o after their activation; GRU r z n and a_n; RNN h~. null: inference
  Strides gates_strides;
  float* cells;  // sequence [T, B, H] of c_t (after zoneout), LSTM only; null: not wanted
  Strides cells_strides;
  // y and cells are written as 0 beyond a sequence's end, gates are not written there, and xg is not read.
  RnnOptions options;
};

struct RnnBackward {
  Cell cell;
  DType dtype;
  int64_t T, B, H;
  bool reverse;
  const void* dy;  // sequence [T, B, H] or null
  Strides dy_strides;
  const void* dh_n;     // [B, H] or null
  const void* dc_n;     // [B, H] or null
  const float* dcells;  // sequence [T, B, H] or null: what reaches c_t from outside, LSTM only
  Strides dcells_strides;
  const void* y;  // what the forward pass wrote
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
  // dxg and dan are written as 0 beyond a sequence's end.
  RnnOptions options;
};

void rnn_forward_cpu(const RnnForward&, const Parallel&);
void rnn_backward_cpu(const RnnBackward&, const Parallel&);

// One launch a step; `stream` is a cudaStream_t, `workspace` device memory of at least rnn_workspace_cuda() bytes.
// Returns a cudaError_t as int; 0 is success.
int64_t rnn_workspace_cuda(Cell, DType, int64_t B, int64_t H, bool backward);
int rnn_forward_cuda(const RnnForward&, void* workspace, void* stream);
int rnn_backward_cuda(const RnnBackward&, void* workspace, void* stream);

// The whole scan in one launch: a cluster of thread blocks keeps w_hh in registers and exchanges h through distributed
// shared memory. Compute capability 9.0, H <= 512; float32 is multiplied in tf32, with H <= 256 for LSTM and GRU. Of
// the options lengths, resets, zoneout and dcells, but not packed, hidden_mask, peephole and heads. With count = 2 both
// directions of a layer run at once: two scans of the same cell, dtype and sizes, with the same lengths, resets and
// zoneout weights. Does not wait for a device that is busy: clusters that find no room yet start later. Forward needs
// no workspace. Anything else returns a cudaError_t, as a launch on a device that holds no such cluster does; ask for
// the plan first (cuda/rnn_cluster_plan.h).
int64_t rnn_workspace_cluster_cuda(Cell, int64_t B, int64_t H);  // of backward, for each scan
int rnn_forward_cluster_cuda(const RnnForward* scans, int count, void* stream);
int rnn_backward_cluster_cuda(const RnnBackward* scans, int count, void* workspace, void* stream);

// How many clusters of these kernels the current device can hold at once (cudaOccupancyMaxActiveClusters); 0: none.
int64_t rnn_forward_clusters_resident_cuda(Cell, DType, int64_t H);
int64_t rnn_backward_clusters_resident_cuda(Cell, DType, int64_t H);

}  // namespace seqfuse
