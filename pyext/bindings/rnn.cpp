// seqfuse::rnn_scan_fwd / rnn_scan_bwd. Contract: csrc/include/seqfuse/rnn.h
//
// Sequence tensors are logically [T, B, X], or packed, [N, X]. A batch-major one ([B, T, X] memory) is taken as it is,
// and what belongs to it (y to xg, dxg to y) is made batch-major too, so that batch_first costs no copy.
#include "seqfuse/rnn.h"

#include "common.h"
#include "cuda/rnn_cluster_plan.h"
#include "rnn_options.h"

namespace seqfuse {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Cell cell_of(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell <= 3, "cell must be 0 (rnn_tanh), 1 (rnn_relu), 2 (gru) or 3 (lstm), got ", cell);
  return Cell(cell);
}

Maybe checked(const Maybe& t, const Tensor& like, std::initializer_list<int64_t> shape, const char* name) {
  if (!t) return {};
  check(*t, like, shape, name);
  return dense(*t);
}

// The sizes that both passes share, from the sequence `seq` (its first argument); fills what Args has of them.
template <class Args>
Extent extent_of(Args& a, int64_t cell, const Tensor& seq, const Tensor& h0, const Tensor& w_hh, const Options& given,
                 const char* name) {
  a.cell = cell_of(cell);
  STD_TORCH_CHECK(h0.dim() == 2, "h0 must be 2-D [B, H], got ", h0.dim(), "-D");
  a.B = h0.size(0), a.H = h0.size(1);
  const Extent e = extent(seq, given.lengths, a.B, name);
  STD_TORCH_CHECK((e.T > 0 || e.packed) && a.B > 0 && a.H > 0, name, " must not be empty");
  a.T = e.T;
  a.dtype = dtype_of(seq, name);
  check(h0, seq, {a.B, a.H}, "h0");
  a.options.heads = heads_of(w_hh, seq, gates_of(a.cell), a.H);
  return e;
}

template <class Launch>
Outputs forward(int64_t cell, const Tensor& xg_in, const Tensor& h0_in, const Maybe& c0_in, const Tensor& w_in,
                const Maybe& b_in, const Options& given, Flags flags, Launch launch) {
  RnnForward a{};
  const Extent e = extent_of(a, cell, xg_in, h0_in, w_in, given, "xg");
  const bool lstm = a.cell == Cell::lstm;
  const int64_t G = gates_of(a.cell);
  a.reverse = flags.reverse;
  check_sequence(xg_in, xg_in, e, G * a.H, "xg");
  STD_TORCH_CHECK(c0_in.has_value() || !lstm, "c0 is missing: the LSTM needs it");
  const Tensor xg = sequence(xg_in), h0 = dense(h0_in), w = dense(w_in);
  const HeldOptions held(given, a.cell, xg, e, a.H, a.options);
  const Maybe c0 = lstm ? checked(c0_in, xg, {a.B, a.H}, "c0") : Maybe{};
  const Maybe b = checked(b_in, xg, {G * a.H}, "b_hh");
  const int64_t S = flags.save ? saved_of(a.cell, a.options.zones_h()) : 0;
  const bool keep_cells = lstm && (flags.save || flags.want_cells);
  Tensor y = empty_sequence(xg, a.H), h_n = empty(xg, {a.B, a.H});
  Tensor c_n = lstm ? empty(xg, {a.B, a.H}) : empty(xg, {0});  // outputs may not share a tensor, not even an empty one
  Tensor gates = S ? empty_rows(xg, S * a.H) : empty(xg, {0});
  Tensor cells = keep_cells ? empty_rows(xg, a.H, ScalarType::Float) : empty(xg, {0}, ScalarType::Float);
  a.xg = xg.const_data_ptr(), a.xg_strides = strides_of(xg);
  a.h0 = h0.const_data_ptr(), a.c0 = pointer_or_null(c0);
  a.w_hh = w.const_data_ptr(), a.b_hh = pointer_or_null(b);
  a.y = pointer(y), a.y_strides = strides_of(y);
  a.h_n = pointer(h_n), a.c_n = lstm ? pointer(c_n) : nullptr;
  if (S) a.gates = pointer(gates), a.gates_strides = strides_of(gates);
  if (keep_cells) a.cells = pointer<float>(cells), a.cells_strides = strides_of(cells);
  launch(a);
  return {y, h_n, c_n, gates, cells};
}

// What reaches a scan's backward pass from outside.
struct Gradients {
  Maybe dy, dh_n, dc_n, dcells;
};
// What its forward pass left.
struct Saved {
  Tensor y, gates, cells;
};

template <class Launch>
Outputs backward(int64_t cell, const Gradients& grads, const Saved& saved, const Tensor& h0_in, const Maybe& c0_in,
                 const Tensor& w_in, const Options& given, bool reverse, Launch launch) {
  RnnBackward a{};
  const Extent e = extent_of(a, cell, saved.y, h0_in, w_in, given, "y");
  const bool lstm = a.cell == Cell::lstm, gru = a.cell == Cell::gru;
  const int64_t G = gates_of(a.cell);
  a.reverse = reverse;
  check_sequence(saved.y, saved.y, e, a.H, "y");
  const Tensor y = sequence(saved.y), h0 = dense(h0_in), w = dense(w_in);
  const HeldOptions held(given, a.cell, y, e, a.H, a.options);
  const int64_t S = saved_of(a.cell, a.options.zones_h());
  if (S) check_sequence(saved.gates, y, e, S * a.H, "gates");
  if (grads.dy) check_sequence(*grads.dy, y, e, a.H, "dy");
  if (lstm) {
    STD_TORCH_CHECK(c0_in.has_value(), "c0 is missing: the LSTM needs it");
    check_sequence(saved.cells, y, e, a.H, "cells", ScalarType::Float);
    if (grads.dcells) check_sequence(*grads.dcells, y, e, a.H, "dcells", ScalarType::Float);
  }
  const Tensor gates = dense(saved.gates), cells = dense(saved.cells);
  const Maybe dy = grads.dy ? Maybe(sequence(*grads.dy)) : Maybe{};
  const Maybe dcells = lstm && grads.dcells ? Maybe(sequence(*grads.dcells)) : Maybe{};
  const Maybe dh_n = checked(grads.dh_n, y, {a.B, a.H}, "dh_n");
  const Maybe dc_n = lstm ? checked(grads.dc_n, y, {a.B, a.H}, "dc_n") : Maybe{};
  const Maybe c0 = lstm ? checked(c0_in, y, {a.B, a.H}, "c0") : Maybe{};
  Tensor dxg = empty_sequence(y, G * a.H);
  Tensor dan = gru ? empty_sequence(y, a.H) : empty(y, {0});
  Tensor dh0 = empty(y, {a.B, a.H}), dc0 = lstm ? empty(y, {a.B, a.H}) : empty(y, {0});
  Tensor db_hh = empty(y, {G * a.H}, ScalarType::Float);
  a.dy = pointer_or_null(dy), a.dy_strides = dy ? strides_of(*dy) : Strides{};
  a.dcells = static_cast<const float*>(pointer_or_null(dcells));
  a.dcells_strides = dcells ? strides_of(*dcells) : Strides{};
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

// The long argument lists below are the schemas'.

Outputs forward_cpu(int64_t cell, Tensor xg, Tensor h0, Maybe c0, Tensor w_hh, Maybe b_hh, Maybe lengths, Maybe resets,
                    Maybe hidden_mask, Maybe peephole, Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c,
                    bool reverse, bool save, bool want_cells) {
  STD_TORCH_CHECK(xg.scalar_type() != ScalarType::Half, "xg: the CPU kernel takes float32 and bfloat16");
  const Options given{lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c};
  return forward(cell, xg, h0, c0, w_hh, b_hh, given, {reverse, save, want_cells},
                 [](const RnnForward& a) { rnn_forward_cpu(a, torch_threads()); });
}

Outputs backward_cpu(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Maybe dcells, Tensor y, Tensor gates, Tensor cells,
                     Tensor h0, Maybe c0, Tensor w_hh, Maybe lengths, Maybe resets, Maybe hidden_mask, Maybe peephole,
                     Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c, bool reverse) {
  STD_TORCH_CHECK(y.scalar_type() != ScalarType::Half, "y: the CPU kernel takes float32 and bfloat16");
  const Options given{lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c};
  return backward(cell, {dy, dh_n, dc_n, dcells}, {y, gates, cells}, h0, c0, w_hh, given, reverse,
                  [](const RnnBackward& a) { rnn_backward_cpu(a, torch_threads()); });
}

#ifdef SEQFUSE_CUDA
Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

// Whether the whole scan is one launch, as it is where the plan says so; else it is one a step, which has no options.
template <class Args>
bool one_launch(const Args& a, const char* option, bool backward) {
  const char* refused = cuda::cluster_option_refused(a.options);
  STD_TORCH_CHECK(!refused, refused, " is not supported by the CUDA kernels");
  const auto plan = cuda::rnn_cluster_plan_here(a.cell, a.dtype, a.B, a.H, option != nullptr, backward);
  STD_TORCH_CHECK(plan.refusal.empty() || !option, option, " is supported by the CUDA cluster kernel only, and ",
                  plan.refusal);
  return plan.refusal.empty();
}

Outputs forward_cuda(int64_t cell, Tensor xg, Tensor h0, Maybe c0, Tensor w_hh, Maybe b_hh, Maybe lengths, Maybe resets,
                     Maybe hidden_mask, Maybe peephole, Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c,
                     bool reverse, bool save, bool want_cells) {
  torch::stable::accelerator::DeviceGuard guard(xg.get_device_index());
  const Options given{lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c};
  return forward(cell, xg, h0, c0, w_hh, b_hh, given, {reverse, save, want_cells}, [&](const RnnForward& a) {
    if (one_launch(a, a.options.in_use(), false))
      return check_cuda(rnn_forward_cluster_cuda(a, current_stream(xg)), "rnn_scan_fwd");
    const Tensor scratch = workspace(xg, rnn_workspace_cuda(a.cell, a.dtype, a.B, a.H, false));
    check_cuda(rnn_forward_cuda(a, pointer(scratch), current_stream(xg)), "rnn_scan_fwd");
  });
}

Outputs backward_cuda(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Maybe dcells, Tensor y, Tensor gates,
                      Tensor cells, Tensor h0, Maybe c0, Tensor w_hh, Maybe lengths, Maybe resets, Maybe hidden_mask,
                      Maybe peephole, Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c, bool reverse) {
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const Options given{lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c};
  return backward(cell, {dy, dh_n, dc_n, dcells}, {y, gates, cells}, h0, c0, w_hh, given, reverse,
                  [&](const RnnBackward& a) {
                    const char* option = a.options.in_use() ? a.options.in_use() : a.dcells ? "dcells" : nullptr;
                    const bool one = one_launch(a, option, true);
                    const Tensor scratch = workspace(y, one ? rnn_workspace_cluster_cuda(a.cell, a.B, a.H)
                                                            : rnn_workspace_cuda(a.cell, a.dtype, a.B, a.H, true));
                    void* const stream = current_stream(y);
                    check_cuda(one ? rnn_backward_cluster_cuda(a, pointer(scratch), stream)
                                   : rnn_backward_cuda(a, pointer(scratch), stream),
                               "rnn_scan_bwd");
                  });
}
#endif

}  // namespace

#define SEQFUSE_SCAN_OPTIONS                                                                                 \
  "Tensor? lengths, Tensor? resets, Tensor? hidden_mask, Tensor? peephole, Tensor? zone_h, Tensor? zone_c, " \
  "float zoneout_h, float zoneout_c, bool reverse"

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def("rnn_scan_fwd(int cell, Tensor xg, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? b_hh, " SEQFUSE_SCAN_OPTIONS
        ", bool save, bool want_cells) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rnn_scan_bwd(int cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor y, Tensor gates, "
      "Tensor cells, Tensor h0, Tensor? c0, Tensor w_hh, " SEQFUSE_SCAN_OPTIONS
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
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
