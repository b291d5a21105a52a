// seqfuse::rnn_cell_fwd / rnn_cell_bwd. Contract: csrc/include/seqfuse/rnn_cell.h
#include "seqfuse/rnn_cell.h"

#include "common.h"

namespace seqfuse {
namespace {

using Maybe = std::optional<Tensor>;

void check(const Maybe& t, int64_t B, int64_t X, const Tensor& like, const char* name) {
  if (!t) return;
  STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == B && t->size(1) == X, name, " must be [", B, ", ", X, "]");
  STD_TORCH_CHECK(t->scalar_type() == like.scalar_type(), name, " must have the dtype of the gates");
  check_same_device(*t, like, name);
}

Maybe dense_or_none(const Maybe& t) {
  return t ? Maybe(dense(*t)) : Maybe();
}

Cell check_cell(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell <= int64_t(Cell::lstm),
                  "cell must be 0 (rnn_tanh), 1 (rnn_relu), 2 (gru) or 3 (lstm)");
  return Cell(cell);
}

std::tuple<Tensor, Tensor, Tensor> forward_cpu(int64_t number, Tensor xg_in, Tensor a_in, Maybe h_in, Maybe c_in,
                                               bool save) {
  const Cell cell = check_cell(number);
  const bool lstm = cell == Cell::lstm;
  STD_TORCH_CHECK(xg_in.dim() == 2 && xg_in.size(1) % gates_of(cell) == 0, "xg must be [B, G*H]");
  STD_TORCH_CHECK(xg_in.scalar_type() != ScalarType::Half, "the CPU kernel takes float32 and bfloat16");
  const int64_t B = xg_in.size(0), H = xg_in.size(1) / gates_of(cell);
  check(a_in, B, gates_of(cell) * H, xg_in, "a");
  check(h_in, B, H, xg_in, "h"), check(c_in, B, H, xg_in, "c");
  STD_TORCH_CHECK(c_in.has_value() == lstm && h_in.has_value() == (cell == Cell::gru),
                  "c belongs to an LSTM and h to a GRU");
  const Tensor xg = dense(xg_in), a = dense(a_in);
  const Maybe h = dense_or_none(h_in), c = dense_or_none(c_in);
  Tensor h_out = empty(xg, {B, H}), c_out = lstm ? empty(xg, {B, H}) : empty(xg, {0});
  const bool saved = save && saved_of(cell);
  Tensor gates = saved ? empty(xg, {B, saved_of(cell) * H}) : empty(xg, {0});
  RnnCellForward args{cell,
                      dtype_of(xg, "xg"),
                      B,
                      H,
                      xg.const_data_ptr(),
                      a.const_data_ptr(),
                      pointer_or_null(h),
                      pointer_or_null(c),
                      pointer(h_out),
                      lstm ? pointer(c_out) : nullptr,
                      saved ? pointer(gates) : nullptr};
  if (B) rnn_cell_forward_cpu(args, torch_threads());
  return {h_out, c_out, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(int64_t number, Maybe dh_out_in, Maybe dc_out_in,
                                                        Tensor gates_in, Maybe h_in, Maybe c_in, Tensor h_out_in,
                                                        Maybe c_out_in) {
  const Cell cell = check_cell(number);
  const bool lstm = cell == Cell::lstm, gru = cell == Cell::gru;
  STD_TORCH_CHECK(h_out_in.dim() == 2, "h_out must be [B, H]");
  const int64_t B = h_out_in.size(0), H = h_out_in.size(1);
  check(dh_out_in, B, H, h_out_in, "dh_out"), check(dc_out_in, B, H, h_out_in, "dc_out");
  check(h_in, B, H, h_out_in, "h"), check(c_in, B, H, h_out_in, "c"), check(c_out_in, B, H, h_out_in, "c_out");
  if (saved_of(cell)) check(gates_in, B, saved_of(cell) * H, h_out_in, "gates");
  STD_TORCH_CHECK(c_in.has_value() == lstm && c_out_in.has_value() == lstm && h_in.has_value() == gru,
                  "c and c_out belong to an LSTM and h to a GRU");
  const Tensor gates = dense(gates_in), h_out = dense(h_out_in);
  const Maybe dh_out = dense_or_none(dh_out_in), dc_out = dense_or_none(dc_out_in);
  const Maybe h = dense_or_none(h_in), c = dense_or_none(c_in), c_out = dense_or_none(c_out_in);
  const int64_t G = gates_of(cell);
  Tensor dxg = empty(h_out, {B, G * H}), da = gru ? empty(h_out, {B, G * H}) : empty(h_out, {0});
  Tensor dh = gru ? empty(h_out, {B, H}) : empty(h_out, {0}), dc = lstm ? empty(h_out, {B, H}) : empty(h_out, {0});
  RnnCellBackward args{cell,
                       dtype_of(h_out, "h_out"),
                       B,
                       H,
                       pointer_or_null(dh_out),
                       pointer_or_null(dc_out),
                       gates.const_data_ptr(),
                       pointer_or_null(h),
                       pointer_or_null(c),
                       h_out.const_data_ptr(),
                       pointer_or_null(c_out),
                       pointer(dxg),
                       gru ? pointer(da) : nullptr,
                       gru ? pointer(dh) : nullptr,
                       lstm ? pointer(dc) : nullptr};
  if (B) rnn_cell_backward_cpu(args, torch_threads());
  return {dxg, da, dh, dc};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def(
      "rnn_cell_fwd(int cell, Tensor xg, Tensor a, Tensor? h, Tensor? c, bool save) "
      "-> (Tensor h_out, Tensor c_out, Tensor gates)");
  m.def(
      "rnn_cell_bwd(int cell, Tensor? dh_out, Tensor? dc_out, Tensor gates, Tensor? h, Tensor? c, Tensor h_out, "
      "Tensor? c_out) -> (Tensor dxg, Tensor da, Tensor dh, Tensor dc)");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("rnn_cell_fwd", TORCH_BOX(&forward_cpu));
  m.impl("rnn_cell_bwd", TORCH_BOX(&backward_cpu));
}

}  // namespace seqfuse
