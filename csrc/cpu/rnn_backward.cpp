// Recurrent scan, backward pass (contract and maths: seqfuse/rnn.h).
//
// Walks the steps in the opposite order. A worker owns hidden units: it holds their dh (and dc) in fp32, turns them
// into the gradients of its units' gates, and writes those where every worker can read them; after the barrier it
// computes its units of dh_{t-1} = dgates @ w_hh from its packed columns of w_hh. Memory traffic a step: dy, the saved
// gates, cells and y are read once, dxg and dan written once. db_hh is summed within a step first, then over the steps.
#include "common/gates.h"
#include "cpu/rnn_scan.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

namespace {

template <class T, Cell C, bool Plain>
struct BackwardScan {
  static constexpr int G = C == Cell::lstm ? 4 : C == Cell::gru ? 3 : 1;

  const RnnBackward& a;
  const Plan plan;
  const int64_t units = a.H / (Plain ? 1 : a.options.heads);  // of this head; a.H lies between two gates
  const int64_t blocks = ceil_div(units, VL);
  const Product kind = product_for<T>(rows_each(plan, a.B), plan.near);
  const int64_t words = weight_words(kind, G* units);
  const int64_t terms = operand_words(kind, G* units);
  const int64_t ld = operand_ld(terms);
  const int64_t state_ld = blocks * VL;

  Rows<Plain> rows;
  word* packed;       // [groups][words][blocks of the group][VL]
  word* gradient[2];  // [B, ld]: gradients of a_t as the product's operand; the gates follow each other without padding
  float* dh;          // [B, state_ld]; with options only what reaches h_{t-1} without w_hh
  float* through;     // [B, state_ld], with options: what reaches h_{t-1} through w_hh, before hidden_mask
  float* dc;          // [B, state_ld], LSTM
  float* step_bias;   // [workers or 1][blocks][G][VL]: this step's sum over the batch
  float* bias;        // the same shape: the sum over the steps

  BackwardScan(const RnnBackward& args, Plan p) : a(args), plan(p), rows(args.T, args.B, args.options) {}

  int64_t bias_size() const { return blocks * G * VL; }

  void take(Scratch& s) {
    rows.take(s, a.options);
    s.take(packed, blocks * VL * words);
    for (word*& operand : gradient) s.take(operand, a.B * ld);
    s.take(dh, a.B * state_ld);
    s.take(through, Plain ? 0 : a.B * state_ld);
    s.take(dc, C == Cell::lstm ? a.B * state_ld : 0);
    s.take(step_bias, (plan.by_batch ? plan.workers : 1) * bias_size());
    s.take(bias, (plan.by_batch ? plan.workers : 1) * bias_size());
  }

  void pack(int64_t worker) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    const int64_t groups = groups_in(s.blocks, max_vectors);
    const Range mine = plan.by_batch ? part(groups, worker, plan.workers) : Range{0, groups};
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const Range g = group(s.blocks, i, max_vectors);
      PackColumns p{a.w_hh, units, G * units, int(g.size())};
      p.part = units, p.part_ld = a.H;
      for (int v = 0; v < p.vectors; v++) {
        p.first[v] = (g.begin + v) * VL;
        p.count[v] = lanes(g.begin + v, units);
      }
      pack_columns<T>(p, kind, packed + g.begin * VL * words);
    }
  }

  float* bias_of(float* base, int64_t worker) const { return base + (plan.by_batch ? worker * bias_size() : 0); }

  void begin(int64_t worker) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    const int64_t first = s.blocks.begin * G * VL, count = s.blocks.size() * G * VL;
    memset(bias_of(bias, worker) + first, 0, size_t(count) * sizeof(float));
    for (int64_t slot = s.rows.begin; slot < s.rows.end; slot++) {
      if (s.blocks.end == blocks)
        for (word* operand : gradient) clear_padding(kind, G * units, operand + slot * ld);
      for (int64_t block = s.blocks.begin; block < s.blocks.end; block++) {
        const int64_t u = rows.sequence(slot) * a.H + block * VL, own = slot * state_ld + block * VL;
        const int n = lanes(block, units);
        store(dh + own, a.dh_n ? get((const T*)a.dh_n + u, n) : vf{});
        if constexpr (!Plain) store(through + own, vf{});
        if constexpr (C == Cell::lstm) store(dc + own, a.dc_n ? get((const T*)a.dc_n + u, n) : vf{});
      }
    }
  }

  int64_t time_of(int64_t i) const { return a.reverse ? i : rows.steps - 1 - i; }

  void step(int64_t worker, int64_t i) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    if (i > 0) product(s, i - 1);
    const int64_t first = s.blocks.begin * G * VL, count = s.blocks.size() * G * VL;
    const Range running = rows.running(s.rows, time_of(i));
    float* now = bias_of(step_bias, worker);
    float* total = bias_of(bias, worker);
    memset(now + first, 0, size_t(count) * sizeof(float));
    for (int64_t slot = running.begin; slot < running.end; slot++)
      for (int64_t block = s.blocks.begin; block < s.blocks.end; block++) unit(i, slot, block, now + block * G * VL);
    for (int64_t k = first; k < first + count; k += VL) store(total + k, load(total + k) + load(now + k));
  }

  void end(int64_t worker) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    if (Plain || rows.steps > 0) product(s, rows.steps - 1);
    for (int64_t slot = s.rows.begin; slot < s.rows.end; slot++)
      for (int64_t block = s.blocks.begin; block < s.blocks.end; block++) {
        const int64_t u = rows.sequence(slot) * a.H + block * VL;
        const int n = lanes(block, units);
        set((T*)a.dh0 + u, carried(slot, block, n), n);
        if constexpr (C == Cell::lstm) set((T*)a.dc0 + u, load(dc + slot * state_ld + block * VL), n);
      }
    if constexpr (!Plain)
      if (a.options.lengths && !a.options.packed) clear(rows_to_clear(plan, worker, a.B));
  }

  // What lies beyond the sequences' ends.
  void clear(Range slots) {
    const size_t bytes = size_t(units) * sizeof(T);
    for (int64_t slot = slots.begin; slot < slots.end; slot++)
      for (int64_t t = rows.length(slot); t < a.T; t++) {
        for (int g = 0; g < G; g++) memset((T*)a.dxg + rows.offset(a.dxg_strides, t, slot) + g * a.H, 0, bytes);
        if constexpr (C == Cell::gru) memset((T*)a.dan + rows.offset(a.dan_strides, t, slot), 0, bytes);
      }
  }

  // dh of step i's h_{t-1}: gradient of a @ w_hh, for the units of this slice. The plain GRU adds it to the part that
  // bypassed the product; with options it goes to a place of its own, because of hidden_mask.
  void product(Slice s, int64_t i) {
    const int64_t groups = groups_in(s.blocks, max_vectors);
    const Range running = rows.running(s.rows, time_of(i));
    float* out = Plain ? dh : through;
    prefetch_operand(plan, gradient[i & 1], running.end * ld);
    for (int64_t j = 0; j < groups; j++) {
      const Range g = group(s.blocks, i & 1 ? groups - 1 - j : j, max_vectors);
      const word* w = packed + g.begin * VL * words;
      for_row_tiles(kind, running, int(g.size()), [&](int64_t slot, int count) {
        multiply_tile(kind, int(g.size()), count, w, gradient[i & 1] + slot * ld, ld, words,
                      out + slot * state_ld + g.begin * VL, state_ld, VL, Plain && C == Cell::gru);
      });
    }
  }

  // The gradient of h that came from the step after.
  SEQFUSE_INLINE vf carried(int64_t slot, int64_t block, int n) const {
    const int64_t own = slot * state_ld + block * VL;
    if constexpr (Plain) return load(dh + own);
    vf x = load(through + own);
    if (a.options.hidden_mask) x *= get((const T*)a.options.hidden_mask + rows.sequence(slot) * a.H + block * VL, n);
    return load(dh + own) + x;
  }

  // The state before step t, of the arrays that the forward pass wrote: y with h0, or cells with c0.
  template <class S>
  SEQFUSE_INLINE vf before(const S* after, Strides s, const void* initial, int64_t t, int64_t slot, int64_t u, int n,
                           bool reset) const {
    if (!Plain && reset) return vf{};
    if (t == rows.first(slot, a.reverse)) return get((const T*)initial + rows.sequence(slot) * a.H + u, n);
    return get(after + rows.offset(s, a.reverse ? t + 1 : t - 1, slot) + u, n);
  }

  SEQFUSE_INLINE Zone zone(const bool* mask, Strides s, float weight, int64_t t, int64_t slot, int64_t u, int n) const {
    return {mask ? load_bools(mask + rows.offset(s, t, slot) + u, n) : splat(weight)};
  }

  // The gradients of the gates of one block of units of one sequence; db: their sum over the batch, [G][VL].
  SEQFUSE_INLINE void unit(int64_t i, int64_t slot, int64_t block, float* db) {
    const int n = lanes(block, units);
    const int64_t u = block * VL, H = a.H, t = time_of(i);
    const RnnOptions& o = a.options;
    const bool reset = rows.reset(o, t, slot);
    const T* saved = (const T*)a.gates + rows.offset(a.gates_strides, t, slot) + u;
    float* own = dh + slot * state_ld + u;
    T* dxg = (T*)a.dxg + rows.offset(a.dxg_strides, t, slot) + u;
    const Operand operand{gradient[i & 1] + slot * ld, !Plain && reset};
    vf d = carried(slot, block, n), bypass = vf{};
    if (a.dy) d += get((const T*)a.dy + rows.offset(a.dy_strides, t, slot) + u, n);
    if constexpr (!Plain)
      if (o.zones_h()) {
        const Zone z = zone(o.zone_h, o.zone_h_strides, o.zoneout_h, t, slot, u, n);
        bypass = z.kept(d), d = z.passed(d);
      }
    if constexpr (C == Cell::lstm) {
      const float* cell = a.cells + rows.offset(a.cells_strides, t, slot) + u;
      const vf c = before(a.cells, a.cells_strides, a.c0, t, slot, u, n, reset);
      float* own_c = dc + slot * state_ld + u;
      LstmState<vf> s{get(saved, n), get(saved + H, n), get(saved + 2 * H, n), get(saved + 3 * H, n), get(cell, n), {}};
      LstmGrad<vf> g;
      if constexpr (Plain)
        g = lstm_backward<VecMath>(s.i, s.f, s.g, s.o, s.c, c, d, load(own_c));
      else
        g = lstm_with_options(s, c, d, load(own_c), t, slot, u, n);
      store(own_c, !Plain && reset ? vf{} : g.dc);
      put_gate(dxg, operand, db, 0, u, g.di, n);
      put_gate(dxg, operand, db, 1, u, g.df, n);
      put_gate(dxg, operand, db, 2, u, g.dg, n);
      put_gate(dxg, operand, db, 3, u, g.dout, n);
    } else if constexpr (C == Cell::gru) {
      const vf h = before((const T*)a.y, a.y_strides, a.h0, t, slot, u, n, reset);
      const GruGrad<vf> g =
          gru_backward(get(saved, n), get(saved + H, n), get(saved + 2 * H, n), get(saved + 3 * H, n), h, d);
      bypass = Plain ? g.dh : bypass + g.dh;
      put_gate(dxg, operand, db, 0, u, g.dr, n);
      put_gate(dxg, operand, db, 1, u, g.dz, n);
      set(dxg + 2 * H, g.dn, n);
      put_gate((T*)a.dan + rows.offset(a.dan_strides, t, slot) + u - 2 * H, operand, db, 2, u, g.dan, n);
    } else {
      const vf y =
          !Plain && o.zones_h() ? get(saved, n) : get((const T*)a.y + rows.offset(a.y_strides, t, slot) + u, n);
      const bool relu = a.cell == Cell::rnn_relu;
      put_gate(dxg, operand, db, 0, u, relu ? rnn_backward<VecMath, true>(y, d) : rnn_backward<VecMath, false>(y, d),
               n);
    }
    if (!Plain || C == Cell::gru) store(own, !Plain && reset ? vf{} : bypass);
  }

  // s.c is the cell after zoneout; c_prev the one before the step, d and d_cell what reaches h~ and the cell.
  SEQFUSE_INLINE LstmGrad<vf> lstm_with_options(LstmState<vf> s, vf c_prev, vf d, vf d_cell, int64_t t, int64_t slot,
                                                int64_t u, int n) const {
    const RnnOptions& o = a.options;
    if (a.dcells) d_cell += get(a.dcells + rows.offset(a.dcells_strides, t, slot) + u, n);
    vf bypass{};
    if (o.zones_c()) {
      const Zone z = zone(o.zone_c, o.zone_c_strides, o.zoneout_c, t, slot, u, n);
      bypass = z.kept(d_cell), d_cell = z.passed(d_cell);
      s.c = s.f * c_prev + s.i * s.g;
    }
    LstmGrad<vf> g;
    if (o.peephole) {
      const T* p = (const T*)o.peephole + u;
      g = lstm_peephole_backward<VecMath>(s, c_prev, d, d_cell, get(p, n), get(p + a.H, n), get(p + 2 * a.H, n));
    } else {
      g = lstm_backward<VecMath>(s.i, s.f, s.g, s.o, s.c, c_prev, d, d_cell);
    }
    g.dc += bypass;
    return g;
  }

  struct Operand {
    word* row;
    bool zero;  // the state before the step was reset: nothing reaches it
  };

  SEQFUSE_INLINE void put_gate(T* out, Operand operand, float* db, int gate, int64_t u, vf x, int n) {
    set(out + gate * a.H, x, n);
    set_operand<T>(operand.row, gate * units + u, operand.zero ? vf{} : x, n);
    store(db + gate * VL, load(db + gate * VL) + x);
  }

  // Sums over the workers in their order, after all of them are done.
  void finish() {
    if (!a.db_hh) return;
    const int64_t copies = plan.by_batch ? plan.workers : 1;
    for (int64_t block = 0; block < blocks; block++)
      for (int g = 0; g < G; g++) {
        vf x = vf{};
        for (int64_t w = 0; w < copies; w++) x += load(bias + w * bias_size() + (block * G + g) * VL);
        set(a.db_hh + g * a.H + block * VL, x, lanes(block, units));
      }
  }
};

}  // namespace

void rnn_backward_scan(const RnnBackward& a, const Parallel& parallel) {
  for_cell(a.dtype, a.cell, !a.options.in_use() && !a.dcells,
           [&]<class T, Cell cell, bool plain>() { run_all<BackwardScan<T, cell, plain>>(a, parallel); });
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
