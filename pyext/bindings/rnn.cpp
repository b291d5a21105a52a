// seqfuse::rnn_scan_fwd / rnn_scan_bwd. Contract: csrc/include/seqfuse/rnn.h
#include "seqfuse/rnn.h"

#include "common.h"

namespace seqfuse {
namespace {

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Maybe = std::optional<Tensor>;

// A sequence tensor is [T, B, X]; its memory is time-major, or batch-major (a transposed view).
struct Sequence {
  Tensor tensor;
  bool batch_major;
};

Sequence sequence(const Tensor& t) {
  if (t.is_contiguous()) return {t, false};
  const bool batch_major = torch::stable::transpose(t, 0, 1).is_contiguous();
  return {batch_major ? t : torch::stable::contiguous(t), batch_major};
}

// in the layout asked for, whatever it comes in
Tensor as_layout(const Tensor& t, bool batch_major) {
  const Sequence s = sequence(t);
  if (s.batch_major == batch_major) return s.tensor;
  if (!batch_major) return torch::stable::contiguous(t);
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(t, 0, 1)), 0, 1);
}

Tensor empty_sequence(const Tensor& like, bool batch_major, int64_t T, int64_t B, int64_t X) {
  if (!batch_major) return empty(like, {T, B, X});
  return torch::stable::transpose(empty(like, {B, T, X}), 0, 1);
}

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1)}; }

Cell check_cell(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell <= int64_t(Cell::lstm), "cell must be 0 (rnn_tanh), 1 (rnn_relu), 2 (gru) or 3 (lstm)");
  return Cell(cell);
}

void check_shape(const Tensor& t, std::initializer_list<int64_t> wanted, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == int64_t(wanted.size()), name, " must be ", wanted.size(), "-D");
  int64_t d = 0;
  for (int64_t size : wanted) {
    STD_TORCH_CHECK(t.size(d) == size, name, ": dimension ", d, " must be ", size, ", got ", t.size(d));
    d++;
  }
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the sequence");
  check_same_device(t, like, name);
}

Maybe dense_or_none(const Maybe& t) { return t ? Maybe(dense(*t)) : Maybe(); }

template <class Launch>
Forward forward(int64_t cell_number, const Tensor& xg_in, const Tensor& h0_in, const Maybe& c0_in,
                const Tensor& w_hh_in, const Maybe& b_hh_in, bool reverse, bool save, Launch launch) {
  const Cell cell = check_cell(cell_number);
  STD_TORCH_CHECK(xg_in.dim() == 3, "xg must be 3-D [T, B, G*H]");
  STD_TORCH_CHECK(h0_in.dim() == 2, "h0 must be 2-D [B, H]");
  const int64_t T = xg_in.size(0), B = xg_in.size(1), H = h0_in.size(1), G = gates_of(cell);
  check_shape(xg_in, {T, B, G * H}, xg_in, "xg");
  check_shape(h0_in, {B, H}, xg_in, "h0");
  check_shape(w_hh_in, {G * H, H}, xg_in, "w_hh");
  if (b_hh_in) check_shape(*b_hh_in, {G * H}, xg_in, "b_hh");
  const bool lstm = cell == Cell::lstm;
  STD_TORCH_CHECK(c0_in.has_value() == lstm, "c0 must be given for an LSTM, and only for one");
  if (lstm) check_shape(*c0_in, {B, H}, xg_in, "c0");

  const auto [xg, batch_major] = sequence(xg_in);
  const Tensor h0 = dense(h0_in), w_hh = dense(w_hh_in);
  const Maybe c0 = dense_or_none(c0_in), b_hh = dense_or_none(b_hh_in);
  const bool gates_wanted = save && saved_of(cell) > 0, cells_wanted = save && lstm;
  Tensor y = empty_sequence(xg, batch_major, T, B, H), h_n = empty(xg, {B, H});
  Tensor c_n = lstm ? empty(xg, {B, H}) : empty(xg, {0});
  Tensor gates = gates_wanted ? empty(xg, {T, B, saved_of(cell) * H}) : empty(xg, {0});
  Tensor cells = cells_wanted ? empty(xg, {T, B, H}, ScalarType::Float) : empty(xg, {0}, ScalarType::Float);

  RnnForward a{};
  a.cell = cell, a.dtype = dtype_of(xg, "xg");
  a.T = T, a.B = B, a.H = H, a.reverse = reverse;
  a.xg = xg.const_data_ptr(), a.xg_strides = strides_of(xg);
  a.h0 = h0.const_data_ptr(), a.c0 = pointer_or_null(c0);
  a.w_hh = w_hh.const_data_ptr(), a.b_hh = pointer_or_null(b_hh);
  a.y = pointer(y), a.y_strides = strides_of(y);
  a.h_n = pointer(h_n), a.c_n = lstm ? pointer(c_n) : nullptr;
  if (gates_wanted) a.gates = pointer(gates), a.gates_strides = strides_of(gates);
  if (cells_wanted) a.cells = pointer<float>(cells), a.cells_strides = strides_of(cells);
  launch(a);
  return {y, h_n, c_n, gates, cells};
}

template <class Launch>
Backward backward(int64_t cell_number, const Maybe& dy_in, const Maybe& dh_n_in, const Maybe& dc_n_in,
                  const Tensor& y_in, const Tensor& gates, const Tensor& cells, const Tensor& h0_in,
                  const Maybe& c0_in, const Tensor& w_hh_in, bool reverse, Launch launch) {
  const Cell cell = check_cell(cell_number);
  STD_TORCH_CHECK(y_in.dim() == 3, "y must be 3-D [T, B, H]");
  const int64_t T = y_in.size(0), B = y_in.size(1), H = y_in.size(2), G = gates_of(cell);
  const bool lstm = cell == Cell::lstm, gru = cell == Cell::gru;
  check_shape(h0_in, {B, H}, y_in, "h0");
  check_shape(w_hh_in, {G * H, H}, y_in, "w_hh");
  STD_TORCH_CHECK(c0_in.has_value() == lstm, "c0 must be given for an LSTM, and only for one");
  if (saved_of(cell)) check_shape(gates, {T, B, saved_of(cell) * H}, y_in, "gates");
  if (lstm) STD_TORCH_CHECK(cells.dim() == 3 && cells.size(0) == T, "cells must be what the forward pass saved");
  for (const auto& [grad, name] : {std::pair(&dh_n_in, "dh_n"), std::pair(&dc_n_in, "dc_n")})
    if (*grad) check_shape(**grad, {B, H}, y_in, name);

  const auto [y, batch_major] = sequence(y_in);
  Maybe dy;
  if (dy_in) {
    check_shape(*dy_in, {T, B, H}, y_in, "dy");
    dy = as_layout(*dy_in, batch_major);
  }
  const Maybe dh_n = dense_or_none(dh_n_in), dc_n = dense_or_none(dc_n_in), c0 = dense_or_none(c0_in);
  const Tensor h0 = dense(h0_in), w_hh = dense(w_hh_in);
  Tensor dxg = empty_sequence(y, batch_major, T, B, G * H);
  Tensor dan = gru ? empty(y, {T, B, H}) : empty(y, {0});
  Tensor dh0 = empty(y, {B, H}), dc0 = lstm ? empty(y, {B, H}) : empty(y, {0});
  Tensor db_hh = empty(y, {G * H}, ScalarType::Float);

  RnnBackward a{};
  a.cell = cell, a.dtype = dtype_of(y, "y");
  a.T = T, a.B = B, a.H = H, a.reverse = reverse;
  a.dy = pointer_or_null(dy);
  if (dy) a.dy_strides = strides_of(*dy);
  a.dh_n = pointer_or_null(dh_n), a.dc_n = pointer_or_null(dc_n);
  a.y = y.const_data_ptr(), a.y_strides = strides_of(y);
  if (saved_of(cell)) a.gates = gates.const_data_ptr(), a.gates_strides = strides_of(gates);
  if (lstm) a.cells = static_cast<const float*>(cells.const_data_ptr()), a.cells_strides = strides_of(cells);
  a.h0 = h0.const_data_ptr(), a.c0 = pointer_or_null(c0), a.w_hh = w_hh.const_data_ptr();
  a.dxg = pointer(dxg), a.dxg_strides = strides_of(dxg);
  if (gru) a.dan = pointer(dan), a.dan_strides = strides_of(dan);
  a.dh0 = pointer(dh0), a.dc0 = lstm ? pointer(dc0) : nullptr;
  a.db_hh = pointer<float>(db_hh);
  launch(a);
  return {dxg, dan, dh0, dc0, db_hh};
}

void check_cpu(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() != ScalarType::Half, "the CPU scan takes float32 and bfloat16");
}

Forward forward_cpu(int64_t cell, Tensor xg, Tensor h0, Maybe c0, Tensor w_hh, Maybe b_hh, bool reverse, bool save) {
  check_cpu(xg);
  return forward(cell, xg, h0, c0, w_hh, b_hh, reverse, save,
                 [](const RnnForward& a) { rnn_forward_cpu(a, torch_threads()); });
}

Backward backward_cpu(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Tensor y, Tensor gates, Tensor cells, Tensor h0,
                      Maybe c0, Tensor w_hh, bool reverse) {
  check_cpu(y);
  return backward(cell, dy, dh_n, dc_n, y, gates, cells, h0, c0, w_hh, reverse,
                  [](const RnnBackward& a) { rnn_backward_cpu(a, torch_threads()); });
}

#ifdef SEQFUSE_CUDA
Tensor workspace(const Tensor& like, Cell cell, DType dtype, int64_t B, int64_t H, bool backward) {
  return empty(like, {rnn_workspace_cuda(cell, dtype, B, H, backward)}, ScalarType::Byte);
}

Forward forward_cuda(int64_t cell, Tensor xg, Tensor h0, Maybe c0, Tensor w_hh, Maybe b_hh, bool reverse, bool save) {
  torch::stable::accelerator::DeviceGuard guard(xg.get_device_index());
  return forward(cell, xg, h0, c0, w_hh, b_hh, reverse, save, [&](const RnnForward& a) {
    const Tensor scratch = workspace(xg, a.cell, a.dtype, a.B, a.H, false);
    check_cuda(rnn_forward_cuda(a, pointer(scratch), current_stream(xg)), "rnn_scan_fwd");
  });
}

Backward backward_cuda(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Tensor y, Tensor gates, Tensor cells, Tensor h0,
                       Maybe c0, Tensor w_hh, bool reverse) {
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  return backward(cell, dy, dh_n, dc_n, y, gates, cells, h0, c0, w_hh, reverse, [&](const RnnBackward& a) {
    const Tensor scratch = workspace(y, a.cell, a.dtype, a.B, a.H, true);
    check_cuda(rnn_backward_cuda(a, pointer(scratch), current_stream(y)), "rnn_scan_bwd");
  });
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def(
      "rnn_scan_fwd(int cell, Tensor xg, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? b_hh, bool reverse, bool save) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  m.def(
      "rnn_scan_bwd(int cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor y, Tensor gates, Tensor cells, Tensor h0, "
      "Tensor? c0, Tensor w_hh, bool reverse) -> (Tensor dxg, Tensor dan, Tensor dh0, Tensor dc0, Tensor db_hh)");
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
