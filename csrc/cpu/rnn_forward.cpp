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

template <class T, Cell C>
struct ForwardScan {
  static constexpr int G = C == Cell::lstm ? 4 : C == Cell::gru ? 3 : 1;
  static constexpr int64_t group_blocks = G == 1 ? max_vectors : 1;

  const RnnForward& a;
  const Plan plan;
  const int64_t blocks = ceil_div(a.H, VL);
  const int64_t words = words_of<T>(a.H);
  const int64_t ld = operand_ld(words);
  const int64_t state_ld = blocks * VL;

  word* packed;  // [groups][words][blocks of the group][G][VL]
  float* bias;   // [blocks][G][VL]
  word* h[2];    // [B, ld]: h_{t-1} and h_t as the product's operand
  float* state;  // [B, state_ld]: GRU: h before rounding; LSTM: c

  ForwardScan(const RnnForward& args, Plan p) : a(args), plan(p) {}

  void take(Scratch& s) {
    s.take(packed, blocks * G * VL * words);
    s.take(bias, blocks * G * VL);
    s.take(h[0], a.B * ld);
    s.take(h[1], a.B * ld);
    s.take(state, C == Cell::gru || C == Cell::lstm ? a.B * state_ld : 0);
  }

  void pack(int64_t worker) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    const int64_t groups = groups_in(s.blocks, group_blocks);
    const Range mine = plan.by_batch ? part(groups, worker, plan.workers) : Range{0, groups};
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const Range g = group(s.blocks, i, group_blocks);
      PackColumns p{a.w_hh, a.H, a.H, int(g.size()) * G, {}, {}};
      for (int v = 0; v < p.vectors; v++) {
        const int64_t block = g.begin + v / G;
        p.first[v] = (v % G) * a.H + block * VL;
        p.count[v] = lanes(block, a.H);
        const vf b = a.b_hh ? get((const T*)a.b_hh + p.first[v], p.count[v]) : vf{};
        store(bias + (block * G + v % G) * VL, b);
      }
      pack_rows<T>(p, packed + g.begin * G * VL * words);
    }
  }

  void begin(int64_t worker) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    for (int64_t b = s.rows.begin; b < s.rows.end; b++) {
      if (s.blocks.end == blocks)  // half of the last word may be padding, which must not hold a NaN
        h[0][b * ld + words - 1] = h[1][b * ld + words - 1] = 0;
      for (int64_t block = s.blocks.begin; block < s.blocks.end; block++) {
        const int64_t u = b * a.H + block * VL;
        const int n = lanes(block, a.H);
        const vf h0 = get((const T*)a.h0 + u, n);
        set_operand<T>(h[0] + b * ld, block * VL, h0, n);
        if constexpr (C == Cell::gru) store(state + b * state_ld + block * VL, h0);
        if constexpr (C == Cell::lstm) store(state + b * state_ld + block * VL, get((const T*)a.c0 + u, n));
      }
    }
  }

  void step(int64_t worker, int64_t i) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    const int64_t t = a.reverse ? a.T - 1 - i : i;
    const int64_t groups = groups_in(s.blocks, group_blocks);
    prefetch_operand(plan, h[i & 1], a.B * ld);
    for (int64_t j = 0; j < groups; j++) {
      const Range g = group(s.blocks, i & 1 ? groups - 1 - j : j, group_blocks);
      const int vectors = int(g.size()) * G;
      const word* w = packed + g.begin * G * VL * words;
      for_row_tiles(s.rows, vectors, [&](int64_t row, int rows) {
        alignas(64) float product[max_tile * VL];
        prefetch_inputs(t, g, row, rows);
        tile_function(uses_dot<T>, vectors, rows)(w, h[i & 1] + row * ld, ld, words, product, vectors * VL, VL, false);
        // two passes: the activations of one row alone are a chain too long for the processor's window
        if constexpr (G > 1)
          for (int r = 0; r < rows; r++) activate(t, row + r, g.begin, product + r * vectors * VL);
        for (int r = 0; r < rows; r++)
          for (int64_t block = g.begin; block < g.end; block++)
            unit(i, t, row + r, block, product + (r * vectors + (block - g.begin) * G) * VL);
      });
    }
  }

  void end(int64_t) {}

  // The lines that the gates of the next tile will want arrive while its product is computed.
  SEQFUSE_INLINE void prefetch_inputs(int64_t t, Range g, int64_t row, int rows) {
    for (int r = 0; r < rows; r++) {
      const T* xg = (const T*)a.xg + t * a.xg_strides.t + (row + r) * a.xg_strides.b;
      for (int64_t block = g.begin; block < g.end; block++)
        for (int gate = 0; gate < G; gate++) prefetch(xg + gate * a.H + block * VL);
    }
  }

  // LSTM: all gates of a block of units; GRU: r and z, and a_n with its bias. In place; p: the product with w_hh,
  // [G][VL].
  SEQFUSE_INLINE void activate(int64_t t, int64_t b, int64_t block, float* p) {
    const int n = lanes(block, a.H);
    const T* xg = (const T*)a.xg + t * a.xg_strides.t + b * a.xg_strides.b + block * VL;
    const float* bb = bias + block * G * VL;
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      vf x = load(p + g * VL) + load(bb + g * VL);
      if (C == Cell::lstm || g < 2) x += get(xg + g * a.H, n);
      if (C == Cell::lstm && g == 2)
        x = tanh(x);
      else if (C == Cell::lstm || g < 2)
        x = sigmoid(x);
      store(p + g * VL, x);
    }
  }

  // The new state of one block of units of one batch row; p: what activate() left, for an RNN the product with w_hh.
  SEQFUSE_INLINE void unit(int64_t i, int64_t t, int64_t b, int64_t block, const float* p) {
    const int n = lanes(block, a.H);
    const int64_t u = block * VL, H = a.H;
    const T* xg = (const T*)a.xg + t * a.xg_strides.t + b * a.xg_strides.b + u;
    float* own = state + b * state_ld + u;
    T* saved = a.gates ? (T*)a.gates + t * a.gates_strides.t + b * a.gates_strides.b + u : nullptr;
    vf out;
    if constexpr (C == Cell::lstm) {
      const LstmState<vf> s = lstm_state<VecMath>(load(p), load(p + VL), load(p + 2 * VL), load(p + 3 * VL), load(own));
      store(own, s.c);
      if (saved) set(saved, s.i, n), set(saved + H, s.f, n), set(saved + 2 * H, s.g, n), set(saved + 3 * H, s.o, n);
      if (a.cells) set(a.cells + t * a.cells_strides.t + b * a.cells_strides.b + u, s.c, n);
      if (i == a.T - 1) set((T*)a.c_n + b * H + u, s.c, n);
      out = s.h;
    } else if constexpr (C == Cell::gru) {
      const vf an = load(p + 2 * VL);
      const GruState<vf> s = gru_state<VecMath>(load(p), load(p + VL), get(xg + 2 * H, n), an, load(own));
      store(own, s.h);
      if (saved) set(saved, s.r, n), set(saved + H, s.z, n), set(saved + 2 * H, s.n, n), set(saved + 3 * H, an, n);
      out = s.h;
    } else {
      out = rnn_forward<VecMath, C == Cell::rnn_relu>(get(xg, n) + (load(p) + load(bias + block * VL)));
    }
    set((T*)a.y + t * a.y_strides.t + b * a.y_strides.b + u, out, n);
    if (i == a.T - 1)
      set((T*)a.h_n + b * H + u, out, n);
    else
      set_operand<T>(h[(i + 1) & 1] + b * ld, u, out, n);
  }
};

template <class T, Cell C>
void scan(const RnnForward& a, const Parallel& parallel) {
  const Plan plan = plan_scan(parallel, a.dtype, a.T, a.B, a.H, gates_of(a.cell));
  ForwardScan<T, C> s(a, plan);
  Scratch scratch;
  s.take(scratch);
  scratch.allocate();
  s.take(scratch);
  run_scan(s, plan, a.T, parallel);
}

}  // namespace

void rnn_forward_scan(const RnnForward& a, const Parallel& parallel) {
  for_cell(a.dtype, a.cell, [&]<class T, Cell cell>() { scan<T, cell>(a, parallel); });
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
