// The recurrent kernels of csrc/cpu that multiply on the tile unit, built with an emulated one so that any machine runs
// them. Tensors are dense, of bf16 but for cells and db_hh.
#include "seqfuse/rnn.h"
#include "seqfuse/rnn_cell.h"

namespace seqfuse::emulated {
void rnn_forward_scan(const RnnForward&, const Parallel&);
void rnn_backward_scan(const RnnBackward&, const Parallel&);
void rnn_cell_step(const RnnCellStep&, const Parallel&);
void rnn_cell_products(const RnnCellProducts&, const Parallel&);
}  // namespace seqfuse::emulated

using namespace seqfuse;

// Two workers, one after the other.
static const Parallel workers{[](int64_t n, Parallel::Body body, void* ctx) {
                                for (int64_t i = 0; i < n; i++) body(ctx, i, i + 1);
                              },
                              2, false};

template <class Args>
static Args scan(const int64_t* n, const int64_t* lengths) {
  Args a{};
  a.cell = Cell(n[0]), a.dtype = DType::bf16, a.T = n[1], a.B = n[2], a.H = n[3], a.reverse = n[4];
  const int64_t row = a.B * a.H, saved = saved_of(a.cell);
  a.y_strides = a.cells_strides = {row, a.H}, a.gates_strides = {row * saved, a.H * saved};
  a.options.lengths = lengths;
  return a;
}

// numbers: cell, T, B, H, reverse; tensors: xg, h0, c0, w_hh, b_hh, y, h_n, c_n, gates, cells
extern "C" void scan_forward(const int64_t* n, const int64_t* lengths, void* const* t) {
  RnnForward a = scan<RnnForward>(n, lengths);
  const int64_t G = gates_of(a.cell);
  a.xg = t[0], a.xg_strides = {a.B * G * a.H, G * a.H};
  a.h0 = t[1], a.c0 = t[2], a.w_hh = t[3], a.b_hh = t[4], a.y = t[5], a.h_n = t[6], a.c_n = t[7];
  a.gates = saved_of(a.cell) ? t[8] : nullptr, a.cells = a.cell == Cell::lstm ? (float*)t[9] : nullptr;
  emulated::rnn_forward_scan(a, workers);
}

// tensors: dy, dh_n, dc_n, y, gates, cells, h0, c0, w_hh, dxg, dan, dh0, dc0, db_hh
extern "C" void scan_backward(const int64_t* n, const int64_t* lengths, void* const* t) {
  RnnBackward a = scan<RnnBackward>(n, lengths);
  const int64_t G = gates_of(a.cell);
  a.dy = t[0], a.dy_strides = a.dan_strides = a.y_strides, a.dxg_strides = {a.B * G * a.H, G * a.H};
  a.dh_n = t[1], a.dc_n = t[2], a.y = t[3], a.gates = t[4], a.cells = (const float*)t[5], a.h0 = t[6], a.c0 = t[7];
  a.w_hh = t[8], a.dxg = t[9], a.dan = t[10], a.dh0 = t[11], a.dc0 = t[12], a.db_hh = (float*)t[13];
  emulated::rnn_backward_scan(a, workers);
}

// numbers: cell, B, I, H; tensors: x, h, c, w_ih, w_hh, b_ih, b_hh, h_out, c_out
extern "C" void cell_step(const int64_t* n, void* const* t) {
  emulated::rnn_cell_step(
      {Cell(n[0]), DType::bf16, n[1], n[2], n[3], t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], nullptr},
      workers);
}

// numbers: B, I, H, GH; tensors: dxg, da, w_ih, w_hh, dx, dh
extern "C" void cell_products(const int64_t* n, void* const* t) {
  emulated::rnn_cell_products(
      {DType::bf16, n[0], n[1], n[2], n[3], t[0], t[1], n[3], t[2], t[3], t[4], t[5], false}, workers);
}
