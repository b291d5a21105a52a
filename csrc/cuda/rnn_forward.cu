// Launches of rnn_forward.cuh: one a time step. Contract: seqfuse/rnn.h
#include "cuda/rnn_forward.cuh"
#include "cuda/rnn_launch.cuh"

namespace seqfuse {
namespace {

using namespace cuda;

template <Cell C, class T>
int forward(const RnnForward& a, float* workspace, void* stream) {
  const bool aligned = vectors_fit<T>(a.H, {a.h0, a.w_hh, a.y}, {a.y_strides});
  const auto kernel = aligned ? &rnn_forward_step<C, T, true> : &rnn_forward_step<C, T, false>;
  const int64_t first = a.reverse ? a.T - 1 : 0, step = a.reverse ? -1 : 1;
  ForwardStep<T> p{};
  p.B = int(a.B), p.H = int(a.H), p.relu = a.cell == Cell::rnn_relu;
  p.w_hh = static_cast<const T*>(a.w_hh), p.b_hh = static_cast<const T*>(a.b_hh);
  p.h = {static_cast<const T*>(a.h0), a.H};
  p.c0 = static_cast<const T*>(a.c0);
  for (int64_t i = 0, t = first; i < a.T; i++, t += step) {
    p.xg = rows_at<const T>(a.xg, a.xg_strides, t);
    p.y = rows_at<T>(a.y, a.y_strides, t);
    p.gates = rows_at<T>(a.gates, a.gates_strides, t);
    // the LSTM's cell lives in `cells` where the caller keeps it, else in the workspace, as the GRU's fp32 h does
    p.state_out = {workspace, a.H};
    if (C == Cell::lstm && a.cells) p.state_out = rows_at<float>(a.cells, a.cells_strides, t);
    if (i == a.T - 1) p.h_n = static_cast<T*>(a.h_n), p.c_n = static_cast<T*>(a.c_n);
    if (const int error = dev::launch(kernel, step_grid(a.B, a.H), kStepThreads, stream, p)) return error;
    p.h = {p.y.data, p.y.stride};
    p.state = {p.state_out.data, p.state_out.stride};
  }
  return 0;
}

}  // namespace

int rnn_forward_cuda(const RnnForward& a, void* workspace, void* stream) {
  return dev::with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    float* const w = static_cast<float*>(workspace);
    if (a.cell == Cell::lstm) return forward<Cell::lstm, T>(a, w, stream);
    if (a.cell == Cell::gru) return forward<Cell::gru, T>(a, w, stream);
    return forward<Cell::rnn_tanh, T>(a, w, stream);
  });
}

int64_t rnn_workspace_cuda(Cell cell, DType dtype, int64_t B, int64_t H, bool backward) {
  return backward ? BackwardWorkspace(cell, dtype, B, H).bytes : carried_bytes(cell, B, H);
}

}  // namespace seqfuse
