// Recurrent scan, forward pass (contract and maths: seqfuse/rnn.h).
//
// Memory traffic a step: xg is read once, y (and the saved gates and cells) written once. Each worker reads its packed
// slice of w_hh, which stays in its L2 cache where it fits: blocks are walked up in even steps and down in odd ones, so
// that of a slice that does not fit the part used last is found again. The product of a tile goes through a buffer in
// L1 to the gates, which costs a thousandth of the product and keeps one tile kernel for all cells.
#include "common/gates.h"
#include "cpu/rnn_scan.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

namespace {

template <class T, Cell C, bool Plain>
struct ForwardScan {
  static constexpr int G = C == Cell::lstm ? 4 : C == Cell::gru ? 3 : 1;
  static constexpr int64_t group_blocks = G == 1 ? max_vectors : 1;

  const RnnForward& a;
  const Plan plan;
  const int64_t units = a.H / (Plain ? 1 : a.options.heads);  // of this head; a.H lies between two gates
  const int64_t blocks = ceil_div(units, VL);
  const Product kind = product_for<T>(rows_each(plan, a.B), plan.near);
  const int64_t words = weight_words(kind, units);
  const int64_t terms = operand_words(kind, units);
  const int64_t ld = operand_ld(terms);
  const int64_t state_ld = blocks * VL;

  Rows<Plain> rows;
  word* packed;  // [groups][words][blocks of the group][G][VL]
  float* bias;   // [blocks][G][VL]
  word* h[2];    // [B, ld]: h_{t-1} and h_t as the product's operand
  float* state;  // [B, state_ld]: GRU: h before rounding; LSTM: c

  ForwardScan(const RnnForward& args, Plan p) : a(args), plan(p), rows(args.T, args.B, args.options) {}

  void take(Scratch& s) {
    rows.take(s, a.options);
    s.take(packed, blocks * G * VL * words);
    s.take(bias, blocks * G * VL);
    for (word*& operand : h) s.take(operand, a.B * ld);
    s.take(state, C == Cell::gru || C == Cell::lstm ? a.B * state_ld : 0);
  }

  void pack(int64_t worker) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    const int64_t groups = groups_in(s.blocks, group_blocks);
    const Range mine = plan.by_batch ? part(groups, worker, plan.workers) : Range{0, groups};
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const Range g = group(s.blocks, i, group_blocks);
      PackColumns p{a.w_hh, units, units, int(g.size()) * G};
      for (int v = 0; v < p.vectors; v++) {
        const int64_t block = g.begin + v / G;
        p.first[v] = (v % G) * a.H + block * VL;
        p.count[v] = lanes(block, units);
        const vf b = a.b_hh ? get((const T*)a.b_hh + p.first[v], p.count[v]) : vf{};
        store(bias + (block * G + v % G) * VL, b);
      }
      pack_rows<T>(p, kind, packed + g.begin * G * VL * words);
    }
  }

  int64_t time_of(int64_t i) const { return a.reverse ? rows.steps - 1 - i : i; }

  void begin(int64_t worker) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    for (int64_t slot = s.rows.begin; slot < s.rows.end; slot++) {
      if (s.blocks.end == blocks)
        for (word* operand : h) clear_padding(kind, units, operand + slot * ld);
      const int64_t length = rows.length(slot), joins = a.reverse ? rows.steps - length : 0;  // at this step
      for (int64_t block = s.blocks.begin; block < s.blocks.end; block++) {
        const int64_t u = rows.sequence(slot) * a.H + block * VL, own = slot * state_ld + block * VL;
        const int n = lanes(block, units);
        const vf h0 = get((const T*)a.h0 + u, n);
        if constexpr (C == Cell::gru) store(state + own, h0);
        if constexpr (C == Cell::lstm) store(state + own, get((const T*)a.c0 + u, n));
        if (Plain || length > 0) {
          put_operand(joins, rows.first(slot, a.reverse), slot, block, h0, n);
        } else {
          set((T*)a.h_n + u, h0, n);
          if constexpr (C == Cell::lstm) set((T*)a.c_n + u, load(state + own), n);
        }
      }
    }
  }

  void step(int64_t worker, int64_t i) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    const int64_t t = time_of(i);
    const Range running = rows.running(s.rows, t);
    const int64_t groups = groups_in(s.blocks, group_blocks);
    prefetch_operand(plan, h[i & 1], running.end * ld);
    for (int64_t j = 0; j < groups; j++) {
      const Range g = group(s.blocks, i & 1 ? groups - 1 - j : j, group_blocks);
      const int vectors = int(g.size()) * G;
      const word* w = packed + g.begin * G * VL * words;
      for_row_tiles(kind, running, vectors, [&](int64_t slot, int count) {
        alignas(64) float product[max_tile * VL];
        prefetch_inputs(t, g, slot, count);
        multiply_tile(kind, vectors, count, w, h[i & 1] + slot * ld, ld, words, product, vectors * VL, VL, false);
        // two passes: the activations of one row alone are a chain too long for the processor's window
        if constexpr (G > 1)
          for (int r = 0; r < count; r++) activate(t, slot + r, g.begin, product + r * vectors * VL);
        for (int r = 0; r < count; r++)
          for (int64_t block = g.begin; block < g.end; block++)
            unit(i, t, slot + r, block, product + (r * vectors + (block - g.begin) * G) * VL);
      });
    }
  }

  void end(int64_t worker) {
    if constexpr (!Plain)
      if (a.options.lengths && !a.options.packed) clear(rows_to_clear(plan, worker, a.B));
  }
  void finish() {}

  // What lies beyond the sequences' ends.
  void clear(Range slots) {
    for (int64_t slot = slots.begin; slot < slots.end; slot++)
      for (int64_t t = rows.length(slot); t < a.T; t++) {
        memset((T*)a.y + rows.offset(a.y_strides, t, slot), 0, size_t(units) * sizeof(T));
        if (a.cells) memset(a.cells + rows.offset(a.cells_strides, t, slot), 0, size_t(units) * sizeof(float));
      }
  }

  // The lines that the gates of the next tile will want arrive while its product is computed.
  SEQFUSE_INLINE void prefetch_inputs(int64_t t, Range g, int64_t slot, int count) {
    for (int r = 0; r < count; r++) {
      const T* xg = (const T*)a.xg + rows.offset(a.xg_strides, t, slot + r);
      for (int64_t block = g.begin; block < g.end; block++)
        for (int gate = 0; gate < G; gate++) prefetch(xg + gate * a.H + block * VL);
    }
  }

  // x = h_{t-1} of a block becomes the operand of step i, which is step t of its sequence.
  SEQFUSE_INLINE void put_operand(int64_t i, int64_t t, int64_t slot, int64_t block, vf x, int n) {
    if constexpr (!Plain) {
      if (rows.reset(a.options, t, slot))
        x = vf{};
      else if (a.options.hidden_mask)
        x *= get((const T*)a.options.hidden_mask + rows.sequence(slot) * a.H + block * VL, n);
    }
    set_operand<T>(h[i & 1] + slot * ld, block * VL, x, n);
  }

  // The fp32 state before step t: c of an LSTM, h of a GRU.
  SEQFUSE_INLINE vf state_before(int64_t t, int64_t slot, int64_t block) const {
    if (rows.reset(a.options, t, slot)) return vf{};
    return load(state + slot * state_ld + block * VL);
  }

  // h before step t, as it was given out.
  SEQFUSE_INLINE vf h_before(int64_t t, int64_t slot, int64_t block, int n) const {
    if (rows.reset(a.options, t, slot)) return vf{};
    if (t == rows.first(slot, a.reverse)) return get((const T*)a.h0 + rows.sequence(slot) * a.H + block * VL, n);
    return get((const T*)a.y + rows.offset(a.y_strides, a.reverse ? t + 1 : t - 1, slot) + block * VL, n);
  }

  SEQFUSE_INLINE Zone zone(const bool* mask, Strides s, float weight, int64_t t, int64_t slot, int64_t u, int n) const {
    return {mask ? load_bools(mask + rows.offset(s, t, slot) + u, n) : splat(weight)};
  }

  // LSTM: all gates of a block of units (with peepholes: not o); GRU: r and z, and a_n with its bias. In place; p: the
  // product with w_hh, [G][VL].
  SEQFUSE_INLINE void activate(int64_t t, int64_t slot, int64_t block, float* p) {
    const int n = lanes(block, units);
    const T* xg = (const T*)a.xg + rows.offset(a.xg_strides, t, slot) + block * VL;
    const float* bb = bias + block * G * VL;
    const T* peep = nullptr;
    vf c{};
    if constexpr (!Plain && C == Cell::lstm)
      if (a.options.peephole) peep = (const T*)a.options.peephole + block * VL, c = state_before(t, slot, block);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      vf x = load(p + g * VL) + load(bb + g * VL);
      if (C == Cell::lstm || g < 2) x += get(xg + g * a.H, n);
      if (!Plain && peep && g < 2) x += get(peep + g * a.H, n) * c;
      if (C == Cell::lstm && g == 2)
        x = tanh(x);
      else if ((C == Cell::lstm || g < 2) && !(!Plain && peep && g == 3))
        x = sigmoid(x);
      store(p + g * VL, x);
    }
  }

  // The new state of one block of units of one sequence; p: what activate() left, for an RNN the product with w_hh.
  SEQFUSE_INLINE void unit(int64_t i, int64_t t, int64_t slot, int64_t block, const float* p) {
    const int n = lanes(block, units);
    const int64_t u = block * VL, H = a.H, b = rows.sequence(slot);
    const bool last = Plain ? i == a.T - 1 : t == rows.last(slot, a.reverse);
    const RnnOptions& o = a.options;
    const T* xg = (const T*)a.xg + rows.offset(a.xg_strides, t, slot) + u;
    float* own = state + slot * state_ld + u;
    T* saved = a.gates ? (T*)a.gates + rows.offset(a.gates_strides, t, slot) + u : nullptr;
    vf out;
    if constexpr (C == Cell::lstm) {
      const vf before = state_before(t, slot, block);
      vf gate_o = load(p + 3 * VL);
      if constexpr (!Plain)
        if (o.peephole) {
          const vf c = load(p + VL) * before + load(p) * load(p + 2 * VL);
          gate_o = sigmoid(gate_o + get((const T*)o.peephole + 2 * H + u, n) * c);
        }
      LstmState<vf> s = lstm_state<VecMath>(load(p), load(p + VL), load(p + 2 * VL), gate_o, before);
      if constexpr (!Plain)
        if (o.zones_c()) s.c = zone(o.zone_c, o.zone_c_strides, o.zoneout_c, t, slot, u, n).blend(before, s.c);
      store(own, s.c);
      if (saved) set(saved, s.i, n), set(saved + H, s.f, n), set(saved + 2 * H, s.g, n), set(saved + 3 * H, s.o, n);
      if (a.cells) set(a.cells + rows.offset(a.cells_strides, t, slot) + u, s.c, n);
      if (last) set((T*)a.c_n + b * H + u, s.c, n);
      out = s.h;
    } else if constexpr (C == Cell::gru) {
      const vf an = load(p + 2 * VL), before = state_before(t, slot, block);
      GruState<vf> s = gru_state<VecMath>(load(p), load(p + VL), get(xg + 2 * H, n), an, before);
      if constexpr (!Plain)
        if (o.zones_h()) s.h = zone(o.zone_h, o.zone_h_strides, o.zoneout_h, t, slot, u, n).blend(before, s.h);
      store(own, s.h);
      if (saved) set(saved, s.r, n), set(saved + H, s.z, n), set(saved + 2 * H, s.n, n), set(saved + 3 * H, an, n);
      out = s.h;
    } else {
      const vf x = get(xg, n) + (load(p) + load(bias + block * VL));
      out = a.cell == Cell::rnn_relu ? rnn_forward<VecMath, true>(x) : rnn_forward<VecMath, false>(x);
      if (!Plain && saved) set(saved, out, n);
    }
    if constexpr (!Plain && C != Cell::gru)
      if (o.zones_h())
        out = zone(o.zone_h, o.zone_h_strides, o.zoneout_h, t, slot, u, n).blend(h_before(t, slot, block, n), out);
    set((T*)a.y + rows.offset(a.y_strides, t, slot) + u, out, n);
    if (last)
      set((T*)a.h_n + b * H + u, out, n);
    else
      put_operand(i + 1, a.reverse ? t - 1 : t + 1, slot, block, out, n);
  }
};

}  // namespace

void rnn_forward_scan(const RnnForward& a, const Parallel& parallel) {
  for_cell(a.dtype, a.cell, !a.options.in_use(),
           [&]<class T, Cell cell, bool plain>() { run_all<ForwardScan<T, cell, plain>>(a, parallel); });
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
