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

template <class T, Cell C>
struct BackwardScan {
  static constexpr int G = C == Cell::lstm ? 4 : C == Cell::gru ? 3 : 1;

  const RnnBackward& a;
  const Plan plan;
  const int64_t blocks = ceil_div(a.H, VL);
  const int64_t words = words_of<T>(G * a.H);
  const int64_t ld = operand_ld(words);
  const int64_t state_ld = blocks * VL;

  word* packed;       // [groups][words][blocks of the group][VL]
  word* gradient[2];  // [B, ld]: gradients of a_t as the product's operand; the gates follow each other without padding
  float* dh;          // [B, state_ld]
  float* dc;          // [B, state_ld], LSTM
  float* step_bias;   // [workers or 1][blocks][G][VL]: this step's sum over the batch
  float* bias;        // the same shape: the sum over the steps

  BackwardScan(const RnnBackward& args, Plan p) : a(args), plan(p) {}

  int64_t bias_size() const { return blocks * G * VL; }

  void take(Scratch& s) {
    s.take(packed, blocks * VL * words);
    s.take(gradient[0], a.B * ld);
    s.take(gradient[1], a.B * ld);
    s.take(dh, a.B * state_ld);
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
      PackColumns p{a.w_hh, a.H, G * a.H, int(g.size()), {}, {}};
      for (int v = 0; v < p.vectors; v++) {
        p.first[v] = (g.begin + v) * VL;
        p.count[v] = lanes(g.begin + v, a.H);
      }
      pack_columns<T>(p, packed + g.begin * VL * words);
    }
  }

  float* bias_of(float* base, int64_t worker) const { return base + (plan.by_batch ? worker * bias_size() : 0); }

  void begin(int64_t worker) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    const int64_t first = s.blocks.begin * G * VL, count = s.blocks.size() * G * VL;
    memset(bias_of(bias, worker) + first, 0, size_t(count) * sizeof(float));
    for (int64_t b = s.rows.begin; b < s.rows.end; b++) {
      if (s.blocks.end == blocks)  // half of the last word may be padding, which must not hold a NaN
        gradient[0][b * ld + words - 1] = gradient[1][b * ld + words - 1] = 0;
      for (int64_t block = s.blocks.begin; block < s.blocks.end; block++) {
        const int64_t u = b * a.H + block * VL, own = b * state_ld + block * VL;
        const int n = lanes(block, a.H);
        store(dh + own, a.dh_n ? get((const T*)a.dh_n + u, n) : vf{});
        if constexpr (C == Cell::lstm) store(dc + own, a.dc_n ? get((const T*)a.dc_n + u, n) : vf{});
      }
    }
  }

  int64_t time_of(int64_t i) const { return a.reverse ? i : a.T - 1 - i; }

  void step(int64_t worker, int64_t i) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    if (i > 0) product(s, i - 1);
    const int64_t first = s.blocks.begin * G * VL, count = s.blocks.size() * G * VL;
    float* now = bias_of(step_bias, worker);
    float* total = bias_of(bias, worker);
    memset(now + first, 0, size_t(count) * sizeof(float));
    for (int64_t b = s.rows.begin; b < s.rows.end; b++)
      for (int64_t block = s.blocks.begin; block < s.blocks.end; block++) unit(i, b, block, now + block * G * VL);
    for (int64_t k = first; k < first + count; k += VL) store(total + k, load(total + k) + load(now + k));
  }

  void end(int64_t worker) {
    const Slice s = slice_of(plan, worker, a.B, blocks);
    product(s, a.T - 1);
    for (int64_t b = s.rows.begin; b < s.rows.end; b++)
      for (int64_t block = s.blocks.begin; block < s.blocks.end; block++) {
        const int64_t u = b * a.H + block * VL, own = b * state_ld + block * VL;
        const int n = lanes(block, a.H);
        set((T*)a.dh0 + u, load(dh + own), n);
        if constexpr (C == Cell::lstm) set((T*)a.dc0 + u, load(dc + own), n);
      }
  }

  // dh (+)= gradient of a @ w_hh, for the units of this slice; the GRU adds to the part that bypassed the product.
  void product(Slice s, int64_t i) {
    const int64_t groups = groups_in(s.blocks, max_vectors);
    prefetch_operand(plan, gradient[i & 1], a.B * ld);
    for (int64_t j = 0; j < groups; j++) {
      const Range g = group(s.blocks, i & 1 ? groups - 1 - j : j, max_vectors);
      const word* w = packed + g.begin * VL * words;
      for_row_tiles(s.rows, int(g.size()), [&](int64_t row, int rows) {
        tile_function(uses_dot<T>, int(g.size()), rows)(
            w, gradient[i & 1] + row * ld, ld, words, dh + row * state_ld + g.begin * VL, state_ld, VL, C == Cell::gru);
      });
    }
  }

  // The gradients of the gates of one block of units of one batch row; db: their sum over the batch, [G][VL].
  SEQFUSE_INLINE void unit(int64_t i, int64_t b, int64_t block, float* db) {
    const int n = lanes(block, a.H);
    const int64_t u = block * VL, H = a.H, t = time_of(i), before = a.reverse ? t + 1 : t - 1;
    const bool first = i == a.T - 1;  // of the forward pass: the state before it is h0
    const T* saved = (const T*)a.gates + t * a.gates_strides.t + b * a.gates_strides.b + u;
    float* own = dh + b * state_ld + u;
    T* dxg = (T*)a.dxg + t * a.dxg_strides.t + b * a.dxg_strides.b + u;
    word* operand = gradient[i & 1] + b * ld;
    vf d = load(own);
    if (a.dy) d += get((const T*)a.dy + t * a.dy_strides.t + b * a.dy_strides.b + u, n);
    if constexpr (C == Cell::lstm) {
      const float* cells = a.cells + b * a.cells_strides.b + u;
      const vf before_c = first ? get((const T*)a.c0 + b * H + u, n) : get(cells + before * a.cells_strides.t, n);
      float* own_c = dc + b * state_ld + u;
      const LstmGrad<vf> g =
          lstm_backward<VecMath>(get(saved, n), get(saved + H, n), get(saved + 2 * H, n), get(saved + 3 * H, n),
                                 get(cells + t * a.cells_strides.t, n), before_c, d, load(own_c));
      store(own_c, g.dc);
      put_gate(dxg, operand, db, 0, u, g.di, n);
      put_gate(dxg, operand, db, 1, u, g.df, n);
      put_gate(dxg, operand, db, 2, u, g.dg, n);
      put_gate(dxg, operand, db, 3, u, g.dout, n);
    } else if constexpr (C == Cell::gru) {
      const vf before_h = first ? get((const T*)a.h0 + b * H + u, n)
                                : get((const T*)a.y + before * a.y_strides.t + b * a.y_strides.b + u, n);
      const GruGrad<vf> g =
          gru_backward(get(saved, n), get(saved + H, n), get(saved + 2 * H, n), get(saved + 3 * H, n), before_h, d);
      store(own, g.dh);
      put_gate(dxg, operand, db, 0, u, g.dr, n);
      put_gate(dxg, operand, db, 1, u, g.dz, n);
      set(dxg + 2 * H, g.dn, n);
      put_gate((T*)a.dan + t * a.dan_strides.t + b * a.dan_strides.b + u - 2 * H, operand, db, 2, u, g.dan, n);
    } else {
      const vf y = get((const T*)a.y + t * a.y_strides.t + b * a.y_strides.b + u, n);
      put_gate(dxg, operand, db, 0, u, rnn_backward<VecMath, C == Cell::rnn_relu>(y, d), n);
    }
  }

  SEQFUSE_INLINE void put_gate(T* out, word* operand, float* db, int gate, int64_t u, vf x, int n) {
    set(out + gate * a.H, x, n);
    set_operand<T>(operand, gate * a.H + u, x, n);
    store(db + gate * VL, load(db + gate * VL) + x);
  }

  // Sums over the workers in their order, after all of them are done.
  void write_bias() {
    const int64_t copies = plan.by_batch ? plan.workers : 1;
    for (int64_t block = 0; block < blocks; block++)
      for (int g = 0; g < G; g++) {
        vf x = vf{};
        for (int64_t w = 0; w < copies; w++) x += load(bias + w * bias_size() + (block * G + g) * VL);
        set(a.db_hh + g * a.H + block * VL, x, lanes(block, a.H));
      }
  }
};

template <class T, Cell C>
void scan(const RnnBackward& a, const Parallel& parallel) {
  const Plan plan = plan_scan(parallel, a.dtype, a.T, a.B, a.H, gates_of(a.cell));
  BackwardScan<T, C> s(a, plan);
  Scratch scratch;
  s.take(scratch);
  scratch.allocate();
  s.take(scratch);
  run_scan(s, plan, a.T, parallel);
  if (a.db_hh) s.write_bias();
}

}  // namespace

void rnn_backward_scan(const RnnBackward& a, const Parallel& parallel) {
  for_cell(a.dtype, a.cell, [&]<class T, Cell cell>() { scan<T, cell>(a, parallel); });
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
