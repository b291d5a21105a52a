// seqfuse::rnn_scan_fwd / rnn_scan_bwd. Contract: csrc/include/seqfuse/rnn.h
//
// Sequence tensors are logically [T, B, X]. A batch-major one ([B, T, X] memory) is taken as it is, and what belongs to
// it (y to xg, dxg to y) is made batch-major too, so that batch_first costs no copy.
#include "seqfuse/rnn.h"

#include "common.h"

namespace seqfuse {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Maybe = std::optional<Tensor>;

Strides strides_of(const Tensor& t) {
  return {t.stride(0), t.stride(1)};
}

// The last dimension lies together in memory, so that the strides of a Strides describe t.
bool rows_dense(const Tensor& t) {
  return t.stride(2) == 1 || t.size(2) == 1;
}

bool batch_major(const Tensor& t) {
  const int64_t T = t.size(0), B = t.size(1), X = t.size(2);
  return !t.is_contiguous() && rows_dense(t) && (t.stride(0) == X || T == 1) && (t.stride(1) == T * X || B == 1);
}

Tensor sequence(const Tensor& t) {
  return rows_dense(t) ? t : torch::stable::contiguous(t);
}

// A new [T, B, width] in the memory order of t.
Tensor empty_sequence(const Tensor& t, int64_t width) {
  const int64_t T = t.size(0), B = t.size(1);
  if (!batch_major(t)) return empty(t, {T, B, width});
  return torch::stable::transpose(empty(t, {B, T, width}), 0, 1);
}

Cell cell_of(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell <= 3, "cell must be 0 (rnn_tanh), 1 (rnn_relu), 2 (gru) or 3 (lstm), got ", cell);
  return Cell(cell);
}

void check(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape, const char* name) {
  STD_TORCH_CHECK(t.dim() == int64_t(shape.size()), name, " must be ", shape.size(), "-D, got ", t.dim(), "-D");
  int64_t i = 0;
  for (int64_t n : shape) {
    STD_TORCH_CHECK(t.size(i) == n, name, " must have ", n, " elements in dimension ", i, ", got ", t.size(i));
    i++;
  }
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the sequence");
  check_same_device(t, like, name);
}

Maybe checked(const Maybe& t, const Tensor& like, std::initializer_list<int64_t> shape, const char* name) {
  if (!t) return {};
  check(*t, like, shape, name);
  return dense(*t);
}

template <class Launch>
Outputs forward(int64_t cell, const Tensor& xg_in, const Tensor& h0_in, const Maybe& c0_in, const Tensor& w_in,
                const Maybe& b_in, bool reverse, bool save, Launch launch) {
  RnnForward a{};
  a.cell = cell_of(cell);
  const bool lstm = a.cell == Cell::lstm;
  const int64_t G = gates_of(a.cell), S = saved_of(a.cell);
  STD_TORCH_CHECK(xg_in.dim() == 3, "xg must be 3-D [T, B, gates * H], got ", xg_in.dim(), "-D");
  STD_TORCH_CHECK(h0_in.dim() == 2, "h0 must be 2-D [B, H], got ", h0_in.dim(), "-D");
  a.T = xg_in.size(0), a.B = xg_in.size(1), a.H = h0_in.size(1), a.reverse = reverse;
  STD_TORCH_CHECK(a.T > 0 && a.B > 0 && a.H > 0, "xg must not be empty");
  a.dtype = dtype_of(xg_in, "xg");
  check(xg_in, xg_in, {a.T, a.B, G * a.H}, "xg");
  check(h0_in, xg_in, {a.B, a.H}, "h0");
  check(w_in, xg_in, {G * a.H, a.H}, "w_hh");
  STD_TORCH_CHECK(c0_in.has_value() || !lstm, "c0 is missing: the LSTM needs it");
  const Tensor xg = sequence(xg_in), h0 = dense(h0_in), w = dense(w_in);
  const Maybe c0 = lstm ? checked(c0_in, xg, {a.B, a.H}, "c0") : Maybe{};
  const Maybe b = checked(b_in, xg, {G * a.H}, "b_hh");
  Tensor y = empty_sequence(xg, a.H), h_n = empty(xg, {a.B, a.H});
  Tensor c_n = lstm ? empty(xg, {a.B, a.H}) : empty(xg, {0});  // outputs may not share a tensor, not even an empty one
  Tensor gates = save && S ? empty(xg, {a.T, a.B, S * a.H}) : empty(xg, {0});
  Tensor cells = save && lstm ? empty(xg, {a.T, a.B, a.H}, ScalarType::Float) : empty(xg, {0}, ScalarType::Float);
  a.xg = xg.const_data_ptr(), a.xg_strides = strides_of(xg);
  a.h0 = h0.const_data_ptr(), a.c0 = pointer_or_null(c0);
  a.w_hh = w.const_data_ptr(), a.b_hh = pointer_or_null(b);
  a.y = pointer(y), a.y_strides = strides_of(y);
  a.h_n = pointer(h_n), a.c_n = lstm ? pointer(c_n) : nullptr;
  if (save && S) a.gates = pointer(gates), a.gates_strides = strides_of(gates);
  if (save && lstm) a.cells = pointer<float>(cells), a.cells_strides = strides_of(cells);
  launch(a);
  return {y, h_n, c_n, gates, cells};
}

template <class Launch>
Outputs backward(int64_t cell, const Maybe& dy_in, const Maybe& dh_n_in, const Maybe& dc_n_in, const Tensor& y_in,
                 const Tensor& gates_in, const Tensor& cells_in, const Tensor& h0_in, const Maybe& c0_in,
                 const Tensor& w_in, bool reverse, Launch launch) {
  RnnBackward a{};
  a.cell = cell_of(cell);
  const bool lstm = a.cell == Cell::lstm, gru = a.cell == Cell::gru;
  const int64_t G = gates_of(a.cell), S = saved_of(a.cell);
  STD_TORCH_CHECK(y_in.dim() == 3, "y must be 3-D [T, B, H], got ", y_in.dim(), "-D");
  a.T = y_in.size(0), a.B = y_in.size(1), a.H = y_in.size(2), a.reverse = reverse;
  STD_TORCH_CHECK(a.T > 0 && a.B > 0 && a.H > 0, "y must not be empty");
  a.dtype = dtype_of(y_in, "y");
  check(h0_in, y_in, {a.B, a.H}, "h0");
  check(w_in, y_in, {G * a.H, a.H}, "w_hh");
  if (S) check(gates_in, y_in, {a.T, a.B, S * a.H}, "gates");
  if (dy_in) check(*dy_in, y_in, {a.T, a.B, a.H}, "dy");
  if (lstm) {
    STD_TORCH_CHECK(c0_in.has_value(), "c0 is missing: the LSTM needs it");
    STD_TORCH_CHECK(
        cells_in.dim() == 3 && cells_in.numel() == a.T * a.B * a.H && cells_in.scalar_type() == ScalarType::Float,
        "cells must be float32 [T, B, H]");
    check_same_device(cells_in, y_in, "cells");
  }
  const Tensor y = sequence(y_in), h0 = dense(h0_in), w = dense(w_in), gates = dense(gates_in), cells = dense(cells_in);
  const Maybe dy = dy_in ? Maybe(sequence(*dy_in)) : Maybe{};
  const Maybe dh_n = checked(dh_n_in, y, {a.B, a.H}, "dh_n");
  const Maybe dc_n = lstm ? checked(dc_n_in, y, {a.B, a.H}, "dc_n") : Maybe{};
  const Maybe c0 = lstm ? checked(c0_in, y, {a.B, a.H}, "c0") : Maybe{};
  Tensor dxg = empty_sequence(y, G * a.H);
  Tensor dan = gru ? empty(y, {a.T, a.B, a.H}) : empty(y, {0});
  Tensor dh0 = empty(y, {a.B, a.H}), dc0 = lstm ? empty(y, {a.B, a.H}) : empty(y, {0});
  Tensor db_hh = empty(y, {G * a.H}, ScalarType::Float);
  a.dy = pointer_or_null(dy), a.dy_strides = dy ? strides_of(*dy) : Strides{};
  a.dh_n = pointer_or_null(dh_n), a.dc_n = pointer_or_null(dc_n);
  a.y = y.const_data_ptr(), a.y_strides = strides_of(y);
  if (S) a.gates = gates.const_data_ptr(), a.gates_strides = strides_of(gates);
  if (lstm) a.cells = static_cast<const float*>(cells.const_data_ptr()), a.cells_strides = strides_of(cells);
  a.h0 = h0.const_data_ptr(), a.c0 = pointer_or_null(c0), a.w_hh = w.const_data_ptr();
  a.dxg = pointer(dxg), a.dxg_strides = strides_of(dxg);
  if (gru) a.dan = pointer(dan), a.dan_strides = strides_of(dan);
  a.dh0 = pointer(dh0), a.dc0 = lstm ? pointer(dc0) : nullptr;
  a.db_hh = pointer<float>(db_hh);
  launch(a);
  return {dxg, dan, dh0, dc0, db_hh};
}

Outputs forward_cpu(int64_t cell, Tensor xg, Tensor h0, Maybe c0, Tensor w_hh, Maybe b_hh, bool reverse, bool save) {
  STD_TORCH_CHECK(xg.scalar_type() != ScalarType::Half, "xg: the CPU kernel takes float32 and bfloat16");
  return forward(cell, xg, h0, c0, w_hh, b_hh, reverse, save,
                 [](const RnnForward& a) { rnn_forward_cpu(a, torch_threads()); });
}

Outputs backward_cpu(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Tensor y, Tensor gates, Tensor cells, Tensor h0,
                     Maybe c0, Tensor w_hh, bool reverse) {
  STD_TORCH_CHECK(y.scalar_type() != ScalarType::Half, "y: the CPU kernel takes float32 and bfloat16");
  return backward(cell, dy, dh_n, dc_n, y, gates, cells, h0, c0, w_hh, reverse,
                  [](const RnnBackward& a) { rnn_backward_cpu(a, torch_threads()); });
}

#ifdef SEQFUSE_CUDA
template <class Args>
Tensor workspace(const Tensor& like, const Args& a, bool backward) {
  return empty(like, {rnn_workspace_cuda(a.cell, a.dtype, a.B, a.H, backward)}, ScalarType::Byte);
}

Outputs forward_cuda(int64_t cell, Tensor xg, Tensor h0, Maybe c0, Tensor w_hh, Maybe b_hh, bool reverse, bool save) {
  torch::stable::accelerator::DeviceGuard guard(xg.get_device_index());
  return forward(cell, xg, h0, c0, w_hh, b_hh, reverse, save, [&](const RnnForward& a) {
    const Tensor scratch = workspace(xg, a, false);
    check_cuda(rnn_forward_cuda(a, pointer(scratch), current_stream(xg)), "rnn_scan_fwd");
  });
}

Outputs backward_cuda(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Tensor y, Tensor gates, Tensor cells, Tensor h0,
                      Maybe c0, Tensor w_hh, bool reverse) {
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  return backward(cell, dy, dh_n, dc_n, y, gates, cells, h0, c0, w_hh, reverse, [&](const RnnBackward& a) {
    const Tensor scratch = workspace(y, a, true);
    check_cuda(rnn_backward_cuda(a, pointer(scratch), current_stream(y)), "rnn_scan_bwd");
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def(
      "rnn_scan_fwd(int cell, Tensor xg, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? b_hh, bool reverse, bool save) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rnn_scan_bwd(int cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor y, Tensor gates, Tensor cells, "
      "Tensor h0, Tensor? c0, Tensor w_hh, bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("rnn_scan_fwd", TORCH_BOX(&forward_cpu));
  m.impl("rnn_scan_bwd", TORCH_BOX(&backward_cpu));
}

#ifdef SEQFUSE_CUDA
STABLE_TORCH_LIBRARY_IMPL(seqfuse, CUDA, m) {
  m.impl("rnn_scan_fwd", TORCH_BOX(&forward_cuda));
  m.impl("rnn_scan_bwd", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace seqfuse
