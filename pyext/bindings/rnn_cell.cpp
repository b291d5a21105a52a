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

// x and h behind the gradients that a step has just left in its rows of `width` elements.
void put_inputs(const Tensor& rows, int64_t width, const Tensor& x, const Tensor& h) {
  const int64_t size = size_of(dtype_of(rows, "rows")), B = rows.size(0), I = x.size(1), H = h.size(1);
  char* out = static_cast<char*>(pointer(rows)) + (width - I - H) * size;
  for (int64_t b = 0; b < B; b++, out += width * size) {
    memcpy(out, static_cast<const char*>(x.const_data_ptr()) + b * I * size, size_t(I * size));
    memcpy(out + I * size, static_cast<const char*>(h.const_data_ptr()) + b * H * size, size_t(H * size));
  }
}

std::tuple<Tensor, Tensor, Tensor> step_cpu(int64_t number, Tensor x_in, Tensor h_in, Maybe c_in, Tensor w_ih_in,
                                            Tensor w_hh_in, Maybe b_ih_in, Maybe b_hh_in, bool save) {
  const Cell cell = check_cell(number);
  const bool lstm = cell == Cell::lstm;
  STD_TORCH_CHECK(lstm || cell == Cell::gru, "a step with its products is an LSTM's or a GRU's");
  STD_TORCH_CHECK(x_in.dim() == 2 && h_in.dim() == 2, "x must be [B, I] and h [B, H]");
  STD_TORCH_CHECK(x_in.scalar_type() == ScalarType::Float || x_in.scalar_type() == ScalarType::BFloat16,
                  "a step with its products takes float32 and bfloat16");
  const int64_t G = gates_of(cell), B = x_in.size(0), I = x_in.size(1), H = h_in.size(1);
  check(h_in, B, H, x_in, "h"), check(c_in, B, H, x_in, "c");
  check(w_ih_in, G * H, I, x_in, "w_ih"), check(w_hh_in, G * H, H, x_in, "w_hh");
  for (const Maybe& b : {b_ih_in, b_hh_in}) {
    STD_TORCH_CHECK(!b || (b->dim() == 1 && b->size(0) == G * H && b->scalar_type() == x_in.scalar_type()),
                    "a bias must be [G*H], of the dtype of x");
    if (b) check_same_device(*b, x_in, "a bias");
  }
  STD_TORCH_CHECK(c_in.has_value() == lstm, "c belongs to an LSTM");
  const Tensor x = dense(x_in), h = dense(h_in), w_ih = dense(w_ih_in), w_hh = dense(w_hh_in);
  const Maybe c = dense_or_none(c_in), b_ih = dense_or_none(b_ih_in), b_hh = dense_or_none(b_hh_in);
  Tensor h_out = empty(x, {B, H}), c_out = lstm ? empty(x, {B, H}) : empty(x, {0});
  Tensor gates = save ? empty(x, {B, 4 * H}) : empty(x, {0});
  RnnCellStep args{cell,
                   dtype_of(x, "x"),
                   B,
                   I,
                   H,
                   x.const_data_ptr(),
                   h.const_data_ptr(),
                   pointer_or_null(c),
                   w_ih.const_data_ptr(),
                   w_hh.const_data_ptr(),
                   pointer_or_null(b_ih),
                   pointer_or_null(b_hh),
                   pointer(h_out),
                   lstm ? pointer(c_out) : nullptr,
                   save ? pointer(gates) : nullptr};
  if (B && H) rnn_cell_step_cpu(args, torch_threads());
  return {h_out, c_out, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(int64_t number, Maybe dh_out_in, Maybe dc_out_in,
                                                        Tensor gates_in, Maybe h_in, Maybe c_in, Tensor h_out_in,
                                                        Maybe c_out_in, Maybe x_in) {
  const Cell cell = check_cell(number);
  const bool lstm = cell == Cell::lstm, gru = cell == Cell::gru;
  STD_TORCH_CHECK(h_out_in.dim() == 2, "h_out must be [B, H]");
  const int64_t B = h_out_in.size(0), H = h_out_in.size(1);
  check(dh_out_in, B, H, h_out_in, "dh_out"), check(dc_out_in, B, H, h_out_in, "dc_out");
  check(h_in, B, H, h_out_in, "h"), check(c_in, B, H, h_out_in, "c"), check(c_out_in, B, H, h_out_in, "c_out");
  if (saved_of(cell)) check(gates_in, B, saved_of(cell) * H, h_out_in, "gates");
  STD_TORCH_CHECK(c_in.has_value() == lstm && c_out_in.has_value() == lstm && (h_in.has_value() == gru || x_in),
                  "c and c_out belong to an LSTM and h to a GRU");
  STD_TORCH_CHECK(!x_in || (x_in->dim() == 2 && h_in), "rows need x [B, I] and h");
  if (x_in) check(x_in, B, x_in->size(1), h_out_in, "x");
  const Tensor gates = dense(gates_in), h_out = dense(h_out_in);
  const Maybe dh_out = dense_or_none(dh_out_in), dc_out = dense_or_none(dc_out_in);
  const Maybe h = dense_or_none(h_in), c = dense_or_none(c_in), c_out = dense_or_none(c_out_in);
  const int64_t G = gates_of(cell);
  // with x: rows [B, W] of dxg, for a GRU da, then x and h
  const int64_t gradients = (gru && x_in ? 2 : 1) * G * H, W = gradients + (x_in ? x_in->size(1) + H : 0);
  Tensor dxg = empty(h_out, {B, W}), da = gru && !x_in ? empty(h_out, {B, G * H}) : empty(h_out, {0});
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
                       !gru   ? nullptr
                       : x_in ? static_cast<char*>(pointer(dxg)) + G * H * size_of(dtype_of(dxg, "dxg"))
                              : pointer(da),
                       W,
                       gru ? pointer(dh) : nullptr,
                       lstm ? pointer(dc) : nullptr};
  if (B) rnn_cell_backward_cpu(args, torch_threads());
  if (x_in) put_inputs(dxg, W, dense(*x_in), *h);
  return {dxg, da, dh, dc};
}

// The whole backward step: (rows, dx, dh, dc), rows as backward_cpu makes them.
std::tuple<Tensor, Tensor, Tensor, Tensor> step_backward_cpu(int64_t number, Maybe dh_out, Maybe dc_out, Tensor gates,
                                                             Tensor x, Tensor h, Maybe c, Tensor h_out, Maybe c_out,
                                                             Tensor w_ih_in, Tensor w_hh_in, bool want_dx,
                                                             bool want_dh) {
  auto [rows, unused, bypass, dc] = backward_cpu(number, dh_out, dc_out, gates, h, c, h_out, c_out, x);
  const Cell cell = check_cell(number);
  const bool gru = cell == Cell::gru;
  STD_TORCH_CHECK(gru || cell == Cell::lstm, "a step with its products is an LSTM's or a GRU's");
  const int64_t B = rows.size(0), I = x.size(1), H = h.size(1), GH = gates_of(cell) * H;
  check(w_ih_in, GH, I, x, "w_ih"), check(w_hh_in, GH, H, x, "w_hh");
  const Tensor w_ih = dense(w_ih_in), w_hh = dense(w_hh_in);
  Tensor dx = want_dx ? empty(rows, {B, I}) : empty(rows, {0}), dh = gru ? bypass : empty(rows, {B, H});
  const DType dtype = dtype_of(rows, "rows");
  const char* gradients = static_cast<const char*>(rows.const_data_ptr());
  const RnnCellProducts args{dtype,
                             B,
                             I,
                             H,
                             GH,
                             gradients,
                             gru ? gradients + GH * size_of(dtype) : gradients,
                             rows.size(1),
                             w_ih.const_data_ptr(),
                             w_hh.const_data_ptr(),
                             want_dx ? pointer(dx) : nullptr,
                             want_dh ? pointer(dh) : nullptr,
                             gru};
  if (B && H) rnn_cell_products_cpu(args, torch_threads());
  return {rows, dx, dh, dc};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def(
      "rnn_cell_fwd(int cell, Tensor xg, Tensor a, Tensor? h, Tensor? c, bool save) "
      "-> (Tensor h_out, Tensor c_out, Tensor gates)");
  m.def(
      "rnn_cell_step(int cell, Tensor x, Tensor h, Tensor? c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "bool save) -> (Tensor h_out, Tensor c_out, Tensor gates)");
  m.def(
      "rnn_cell_bwd(int cell, Tensor? dh_out, Tensor? dc_out, Tensor gates, Tensor? h, Tensor? c, Tensor h_out, "
      "Tensor? c_out, Tensor? x) -> (Tensor dxg, Tensor da, Tensor dh, Tensor dc)");
  m.def(
      "rnn_cell_step_bwd(int cell, Tensor? dh_out, Tensor? dc_out, Tensor gates, Tensor x, Tensor h, Tensor? c, "
      "Tensor h_out, Tensor? c_out, Tensor w_ih, Tensor w_hh, bool want_dx, bool want_dh) "
      "-> (Tensor rows, Tensor dx, Tensor dh, Tensor dc)");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("rnn_cell_fwd", TORCH_BOX(&forward_cpu));
  m.impl("rnn_cell_step", TORCH_BOX(&step_cpu));
  m.impl("rnn_cell_step_bwd", TORCH_BOX(&step_backward_cpu));
  m.impl("rnn_cell_bwd", TORCH_BOX(&backward_cpu));
}

}  // namespace seqfuse
