// seqfuse::rnn_scan_fwd / rnn_scan_bwd, and rnn_scan_both_fwd / rnn_scan_both_bwd, which run both directions of a layer
// in one go. Contracts: csrc/include/seqfuse/rnn.h, rnn_both.h
//
// Sequence tensors are logically [T, B, X], or packed, [N, X]. A batch-major one ([B, T, X] memory) is taken as it is,
// and what belongs to it (y and gates to xg, dxg to gates or y) is made batch-major too, so that batch_first costs no
// copy.
#include "seqfuse/rnn.h"

#include "common.h"
#include "cuda/rnn_cluster_plan.h"
#include "rnn_options.h"
#include "seqfuse/rnn_both.h"

namespace seqfuse {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Cell cell_of(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell <= 3, "cell must be 0 (rnn_tanh), 1 (rnn_relu), 2 (gru) or 3 (lstm), got ", cell);
  return Cell(cell);
}

// a state [B, H] of each direction
Maybe checked_state(const Maybe& t, const Tensor& like, Ways ways, int64_t B, int64_t H, const char* name) {
  if (!t) return {};
  check_each(*t, like, ways, {B, H}, name);
  return dense(*t);
}

// launch(scans, count): of one direction, or of both
template <class Args, class Launch>
void launch_ways(const Args& a, Ways ways, int64_t rows, Launch launch) {
  if (ways == Ways::one) return launch(&a, 1);
  const Args both[2] = {a, reverse_of(a, rows)};
  launch(both, 2);
}

// The sizes that both passes share, from the sequence `seq` (its first argument); fills what Args has of them.
template <class Args>
Extent extent_of(Args& a, int64_t cell, const Tensor& seq, const Tensor& h0, const Tensor& w_hh, const Options& given,
                 Ways ways, const char* name) {
  a.cell = cell_of(cell);
  const int64_t dims = ways == Ways::one ? 2 : 3;
  STD_TORCH_CHECK(h0.dim() == dims, "h0 must be ", dims, "-D [..., B, H], got ", h0.dim(), "-D");
  a.B = h0.size(dims - 2), a.H = h0.size(dims - 1);
  const Extent e = extent(seq, given.lengths, a.B, name);
  STD_TORCH_CHECK((e.T > 0 || e.packed) && a.B > 0 && a.H > 0, name, " must not be empty");
  a.T = e.T;
  a.dtype = dtype_of(seq, name);
  check_each(h0, seq, ways, {a.B, a.H}, "h0");
  a.options.heads = heads_of(w_hh, seq, int64_t(ways) * gates_of(a.cell) * a.H, a.H);
  return e;
}

template <class Launch>
Outputs forward(int64_t cell, const Tensor& xg_in, const Tensor& h0_in, const Maybe& c0_in, const Tensor& w_in,
                const Maybe& b_in, const Options& given, Flags flags, Ways ways, Launch launch) {
  RnnForward a{};
  const Extent e = extent_of(a, cell, xg_in, h0_in, w_in, given, ways, "xg");
  const bool lstm = a.cell == Cell::lstm;
  const int64_t W = int64_t(ways), G = gates_of(a.cell);
  a.reverse = flags.reverse;
  check_sequence(xg_in, xg_in, e, W * G * a.H, "xg");
  STD_TORCH_CHECK(c0_in.has_value() || !lstm, "c0 is missing: the LSTM needs it");
  const Tensor xg = sequence(xg_in), h0 = dense(h0_in), w = dense(w_in);
  const HeldOptions held(given, a.cell, xg, e, ways, a.H, a.options);
  const Maybe c0 = lstm ? checked_state(c0_in, xg, ways, a.B, a.H, "c0") : Maybe{};
  if (b_in) check(*b_in, xg, {W * G * a.H}, "b_hh");
  const Maybe b = b_in ? Maybe(dense(*b_in)) : Maybe{};
  const int64_t S = flags.save ? saved_of(a.cell, a.options.zones_h()) : 0;
  const bool keep_cells = lstm && (flags.save || flags.want_cells);
  Tensor y = empty_sequence(xg, W * a.H), h_n = empty_each(xg, ways, a.B, a.H);
  // outputs may not share a tensor, not even an empty one
  Tensor c_n = lstm ? empty_each(xg, ways, a.B, a.H) : empty(xg, {0});
  Tensor gates = S ? empty_sequences(xg, ways, S * a.H) : empty(xg, {0});
  Tensor cells = keep_cells ? empty_sequences(xg, ways, a.H, ScalarType::Float) : empty(xg, {0}, ScalarType::Float);
  a.xg = xg.const_data_ptr(), a.xg_strides = strides_of(xg);
  a.h0 = h0.const_data_ptr(), a.c0 = pointer_or_null(c0);
  a.w_hh = w.const_data_ptr(), a.b_hh = pointer_or_null(b);
  a.y = pointer(y), a.y_strides = strides_of(y);
  a.h_n = pointer(h_n), a.c_n = lstm ? pointer(c_n) : nullptr;
  if (S) a.gates = pointer(gates), a.gates_strides = strides_of_first(gates, ways);
  if (keep_cells) a.cells = pointer<float>(cells), a.cells_strides = strides_of_first(cells, ways);
  launch_ways(a, ways, e.packed ? e.rows : e.T * e.B, launch);
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

// in_gates: dxg, and dan behind it, are written where the saved gates lie, and are not returned.
template <class Launch>
Outputs backward(int64_t cell, const Gradients& grads, const Saved& saved, const Tensor& h0_in, const Maybe& c0_in,
                 const Tensor& w_in, const Options& given, bool reverse, Ways ways, bool in_gates, Launch launch) {
  RnnBackward a{};
  const Extent e = extent_of(a, cell, saved.y, h0_in, w_in, given, ways, "y");
  const bool lstm = a.cell == Cell::lstm, gru = a.cell == Cell::gru;
  const int64_t W = int64_t(ways), G = gates_of(a.cell);
  a.reverse = reverse;
  check_sequence(saved.y, saved.y, e, W * a.H, "y");
  const Tensor y = sequence(saved.y), h0 = dense(h0_in), w = dense(w_in);
  const HeldOptions held(given, a.cell, y, e, ways, a.H, a.options);
  const int64_t S = saved_of(a.cell, a.options.zones_h());
  if (S) check_sequences(saved.gates, y, e, ways, S * a.H, "gates");
  if (grads.dy) check_sequence(*grads.dy, y, e, W * a.H, "dy");
  if (lstm) {
    STD_TORCH_CHECK(c0_in.has_value(), "c0 is missing: the LSTM needs it");
    check_sequences(saved.cells, y, e, ways, a.H, "cells", ScalarType::Float);
    if (grads.dcells) check_sequences(*grads.dcells, y, e, ways, a.H, "dcells", ScalarType::Float);
  }
  auto every = [ways](const Tensor& t) { return ways == Ways::one ? sequence(t) : dense(t); };
  const Tensor gates = every(saved.gates), cells = every(saved.cells);
  const Maybe dy = grads.dy ? Maybe(sequence(*grads.dy)) : Maybe{};
  Maybe dcells;
  if (lstm && grads.dcells) dcells = every(*grads.dcells);
  const Maybe dh_n = checked_state(grads.dh_n, y, ways, a.B, a.H, "dh_n");
  const Maybe dc_n = lstm ? checked_state(grads.dc_n, y, ways, a.B, a.H, "dc_n") : Maybe{};
  const Maybe c0 = lstm ? checked_state(c0_in, y, ways, a.B, a.H, "c0") : Maybe{};
  STD_TORCH_CHECK(!in_gates || (S == 4 && rows_dense(saved.gates)), "gates: no gradients can be written there");
  const Tensor& like = S && ways == Ways::one ? gates : y;  // y may be columns of a tensor that joins both directions
  Tensor dxg = in_gates ? gates : empty_sequence(like, W * G * a.H);
  Tensor dan = gru && !in_gates ? empty_sequence(like, W * a.H) : empty(y, {0});
  Tensor dh0 = empty_each(y, ways, a.B, a.H), dc0 = lstm ? empty_each(y, ways, a.B, a.H) : empty(y, {0});
  Tensor db_hh = empty(y, {W * G * a.H}, ScalarType::Float);
  a.dy = pointer_or_null(dy), a.dy_strides = dy ? strides_of(*dy) : Strides{};
  a.dcells = static_cast<const float*>(pointer_or_null(dcells));
  a.dcells_strides = dcells ? strides_of_first(*dcells, ways) : Strides{};
  a.dh_n = pointer_or_null(dh_n), a.dc_n = pointer_or_null(dc_n);
  a.y = y.const_data_ptr(), a.y_strides = strides_of(y);
  if (S) a.gates = gates.const_data_ptr(), a.gates_strides = strides_of_first(gates, ways);
  if (lstm)
    a.cells = static_cast<const float*>(cells.const_data_ptr()), a.cells_strides = strides_of_first(cells, ways);
  a.h0 = h0.const_data_ptr(), a.c0 = pointer_or_null(c0), a.w_hh = w.const_data_ptr();
  a.dxg = pointer(dxg), a.dxg_strides = strides_of(dxg);
  if (gru && in_gates)
    a.dan = static_cast<char*>(a.dxg) + G * a.H * size_of(a.dtype), a.dan_strides = a.dxg_strides;
  else if (gru)
    a.dan = pointer(dan), a.dan_strides = strides_of(dan);
  a.dh0 = pointer(dh0), a.dc0 = lstm ? pointer(dc0) : nullptr;
  a.db_hh = pointer<float>(db_hh);
  launch_ways(a, ways, e.packed ? e.rows : e.T * e.B, launch);
  return {dxg, dan, dh0, dc0, db_hh};
}

// The long argument lists below are the schemas'.

// Each is a template over Ways: with both directions `reverse` is always false, and the schema has none.

template <Ways W>
Outputs forward_cpu(int64_t cell, Tensor xg, Tensor h0, Maybe c0, Tensor w_hh, Maybe b_hh, Maybe lengths, Maybe resets,
                    Maybe hidden_mask, Maybe peephole, Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c,
                    bool reverse, bool save, bool want_cells, bool) {
  STD_TORCH_CHECK(xg.scalar_type() != ScalarType::Half, "xg: the CPU kernel takes float32 and bfloat16");
  const Options given{lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c};
  return forward(cell, xg, h0, c0, w_hh, b_hh, given, {reverse, save, want_cells}, W,
                 [](const RnnForward* scans, int count) {
                   for (int i = 0; i < count; i++) rnn_forward_cpu(scans[i], torch_threads());
                 });
}

void run_backward_cpu(const RnnBackward* scans, int count) {
  for (int i = 0; i < count; i++) rnn_backward_cpu(scans[i], torch_threads());
}

template <Ways W>
Outputs backward_cpu(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Maybe dcells, Tensor y, Tensor gates, Tensor cells,
                     Tensor h0, Maybe c0, Tensor w_hh, Maybe lengths, Maybe resets, Maybe hidden_mask, Maybe peephole,
                     Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c, bool reverse, bool) {
  STD_TORCH_CHECK(y.scalar_type() != ScalarType::Half, "y: the CPU kernel takes float32 and bfloat16");
  const Options given{lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c};
  return backward(cell, {dy, dh_n, dc_n, dcells}, {y, gates, cells}, h0, c0, w_hh, given, reverse, W, false,
                  run_backward_cpu);
}

std::tuple<Tensor, Tensor, Tensor> backward_in_gates(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Maybe dcells,
                                                     Tensor y, Tensor gates, Tensor cells, Tensor h0, Maybe c0,
                                                     Tensor w_hh, Maybe lengths, Maybe resets, Maybe hidden_mask,
                                                     Maybe peephole, Maybe zone_h, Maybe zone_c, double zoneout_h,
                                                     double zoneout_c, bool reverse) {
  STD_TORCH_CHECK(y.scalar_type() != ScalarType::Half, "y: the CPU kernel takes float32 and bfloat16");
  const Options given{lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c};
  const auto [dxg, dan, dh0, dc0, db_hh] = backward(cell, {dy, dh_n, dc_n, dcells}, {y, gates, cells}, h0, c0, w_hh,
                                                    given, reverse, Ways::one, true, run_backward_cpu);
  return {dh0, dc0, db_hh};
}

#ifdef SEQFUSE_CUDA
Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

// Whether the whole scan is one launch, as it is where the plan says so; else it is one a step, which has no options.
template <class Args>
bool one_launch(const Args& a, int count, bool tf32, const char* option, bool backward) {
  const char* refused = cuda::cluster_option_refused(a.options);
  STD_TORCH_CHECK(!refused, refused, " is not supported by the CUDA kernels");
  const auto plan = cuda::rnn_cluster_plan_here({a.cell, a.dtype, a.B, a.H, count, tf32, backward});
  STD_TORCH_CHECK(plan.refusal.empty() || !option, option, " is supported by the CUDA cluster kernel only, and ",
                  plan.refusal);
  return plan.refusal.empty();
}

template <Ways W>
Outputs forward_cuda(int64_t cell, Tensor xg, Tensor h0, Maybe c0, Tensor w_hh, Maybe b_hh, Maybe lengths, Maybe resets,
                     Maybe hidden_mask, Maybe peephole, Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c,
                     bool reverse, bool save, bool want_cells, bool tf32) {
  torch::stable::accelerator::DeviceGuard guard(xg.get_device_index());
  const Options given{lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c};
  return forward(cell, xg, h0, c0, w_hh, b_hh, given, {reverse, save, want_cells}, W,
                 [&](const RnnForward* scans, int count) {
                   const RnnForward& a = scans[0];
                   void* const stream = current_stream(xg);
                   if (one_launch(a, count, tf32, a.options.in_use(), false))
                     return check_cuda(rnn_forward_cluster_cuda(scans, count, stream), "rnn_scan_fwd");
                   const Tensor scratch = workspace(xg, rnn_workspace_cuda(a.cell, a.dtype, a.B, a.H, false));
                   for (int i = 0; i < count; i++)
                     check_cuda(rnn_forward_cuda(scans[i], pointer(scratch), stream), "rnn_scan_fwd");
                 });
}

template <Ways W>
Outputs backward_cuda(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Maybe dcells, Tensor y, Tensor gates,
                      Tensor cells, Tensor h0, Maybe c0, Tensor w_hh, Maybe lengths, Maybe resets, Maybe hidden_mask,
                      Maybe peephole, Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c, bool reverse,
                      bool tf32) {
  torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const Options given{lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c};
  return backward(cell, {dy, dh_n, dc_n, dcells}, {y, gates, cells}, h0, c0, w_hh, given, reverse, W, false,
                  [&](const RnnBackward* scans, int count) {
                    const RnnBackward& a = scans[0];
                    const char* option = a.options.in_use() ? a.options.in_use() : a.dcells ? "dcells" : nullptr;
                    const bool one = one_launch(a, count, tf32, option, true);
                    const Tensor scratch = workspace(y, one ? count * rnn_workspace_cluster_cuda(a.cell, a.B, a.H)
                                                            : rnn_workspace_cuda(a.cell, a.dtype, a.B, a.H, true));
                    void* const stream = current_stream(y);
                    if (one)
                      return check_cuda(rnn_backward_cluster_cuda(scans, count, pointer(scratch), stream),
                                        "rnn_scan_bwd");
                    for (int i = 0; i < count; i++)
                      check_cuda(rnn_backward_cuda(scans[i], pointer(scratch), stream), "rnn_scan_bwd");
                  });
}
#endif

// The op of both directions has the same arguments, without `reverse`.
template <auto Forward>
Outputs both_forward(int64_t cell, Tensor xg, Tensor h0, Maybe c0, Tensor w_hh, Maybe b_hh, Maybe lengths, Maybe resets,
                     Maybe hidden_mask, Maybe peephole, Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c,
                     bool save, bool want_cells, bool tf32) {
  return Forward(cell, xg, h0, c0, w_hh, b_hh, lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h,
                 zoneout_c, false, save, want_cells, tf32);
}
template <auto Backward>
Outputs both_backward(int64_t cell, Maybe dy, Maybe dh_n, Maybe dc_n, Maybe dcells, Tensor y, Tensor gates,
                      Tensor cells, Tensor h0, Maybe c0, Tensor w_hh, Maybe lengths, Maybe resets, Maybe hidden_mask,
                      Maybe peephole, Maybe zone_h, Maybe zone_c, double zoneout_h, double zoneout_c, bool tf32) {
  return Backward(cell, dy, dh_n, dc_n, dcells, y, gates, cells, h0, c0, w_hh, lengths, resets, hidden_mask, peephole,
                  zone_h, zone_c, zoneout_h, zoneout_c, false, tf32);
}

}  // namespace

#define SEQFUSE_SCAN_OPTIONS                                                                                 \
  "Tensor? lengths, Tensor? resets, Tensor? hidden_mask, Tensor? peephole, Tensor? zone_h, Tensor? zone_c, " \
  "float zoneout_h, float zoneout_c"
#define SEQFUSE_FORWARD \
  "_fwd(int cell, Tensor xg, Tensor h0, Tensor? c0, Tensor w_hh, Tensor? b_hh, " SEQFUSE_SCAN_OPTIONS
#define SEQFUSE_BACKWARD_INTO(GATES)                                                    \
  "(int cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor y, " GATES \
  " gates, "                                                                            \
  "Tensor cells, Tensor h0, Tensor? c0, Tensor w_hh, " SEQFUSE_SCAN_OPTIONS
#define SEQFUSE_BACKWARD "_bwd" SEQFUSE_BACKWARD_INTO("Tensor")
#define SEQFUSE_FIVE ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)"

// tf32: whether float32 may be multiplied in tf32; of the kernels here the CUDA cluster kernel's alone to use
STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def("rnn_scan" SEQFUSE_FORWARD ", bool reverse, bool save, bool want_cells, bool tf32=False" SEQFUSE_FIVE);
  m.def("rnn_scan" SEQFUSE_BACKWARD ", bool reverse, bool tf32=False" SEQFUSE_FIVE);
  // the gradients of xg and, behind them, of a_n take the gates' place, whose width they have (LSTM, GRU; CPU)
  m.def("rnn_scan_bwd_in_gates" SEQFUSE_BACKWARD_INTO("Tensor(a!)") ", bool reverse) -> (Tensor, Tensor, Tensor)");
  m.def("rnn_scan_both" SEQFUSE_FORWARD ", bool save, bool want_cells, bool tf32=False" SEQFUSE_FIVE);
  m.def("rnn_scan_both" SEQFUSE_BACKWARD ", bool tf32=False" SEQFUSE_FIVE);
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("rnn_scan_fwd", TORCH_BOX(&forward_cpu<Ways::one>));
  m.impl("rnn_scan_bwd", TORCH_BOX(&backward_cpu<Ways::one>));
  m.impl("rnn_scan_bwd_in_gates", TORCH_BOX(&backward_in_gates));
  m.impl("rnn_scan_both_fwd", TORCH_BOX(&both_forward<&forward_cpu<Ways::both>>));
  m.impl("rnn_scan_both_bwd", TORCH_BOX(&both_backward<&backward_cpu<Ways::both>>));
}

#ifdef SEQFUSE_CUDA
STABLE_TORCH_LIBRARY_IMPL(seqfuse, CUDA, m) {
  m.impl("rnn_scan_fwd", TORCH_BOX(&forward_cuda<Ways::one>));
  m.impl("rnn_scan_bwd", TORCH_BOX(&backward_cuda<Ways::one>));
  m.impl("rnn_scan_both_fwd", TORCH_BOX(&both_forward<&forward_cuda<Ways::both>>));
  m.impl("rnn_scan_both_bwd", TORCH_BOX(&both_backward<&backward_cuda<Ways::both>>));
}
#endif

}  // namespace seqfuse
