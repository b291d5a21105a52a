// One forward step of an LSTM or GRU cell in float32, products included. Contract: seqfuse/rnn_cell.h
//
// A cell is called once a step, so weights packed for the product would be packed for nothing: the product takes them
// as the module has them, [G*H, K] with k together in memory, and so are x and h. A tile is the dot products of the
// gates of one unit with a few rows of the batch, vectors along k, both products one after the other in the same sums;
// a sum over the lanes ends it. Memory traffic: the weights once (the floor of a small batch: 4 G H (I + H) bytes), and
// x and h once for each unit, from L1 or L2. The gates of VL units never leave L1.
#include "common/gates.h"
#include "cpu/rnn_scan.h"
#include "seqfuse/rnn_cell.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6;  // 4 sums a row, 4 weights and a broadcastless operand fit 32 registers
#else
constexpr int kRows = 3;
#endif

// sums[g][r] += w[g] . x[r] over K, for NW rows of weights `gate` elements apart and NR rows of x.
template <int NW, int NR>
SEQFUSE_INLINE void dot_products(vf (&sums)[4][NR], const int (&place)[NW], const float* w, int64_t gate,
                                 const float* x, int64_t K) {
  auto terms = [&](int64_t k, auto read) __attribute__((always_inline)) {
    vf in[NR];
#pragma GCC unroll 6
    for (int r = 0; r < NR; r++) in[r] = read(x + r * K + k);
#pragma GCC unroll 4
    for (int g = 0; g < NW; g++) {
      const vf weight = read(w + g * gate + k);
#pragma GCC unroll 6
      for (int r = 0; r < NR; r++) sums[place[g]][r] += weight * in[r];
    }
  };
  int64_t k = 0;
  for (; k + VL <= K; k += VL) terms(k, [](const float* p) { return load(p); });
  if (const int n = int(K - k)) terms(k, [n](const float* p) { return load_n(p, n); });
}

template <Cell C>
struct Step {
  static constexpr int G = C == Cell::lstm ? 4 : 3;
  const RnnCellStep& a;

  // The four sums of unit u for rows b .. b + NR - 1, to out[r][4][VL] at this unit's lane. GRU: r, z, n of x, n of h.
  template <int NR>
  void products(int64_t u, int64_t b, float* out) const {
    vf sums[4][NR] = {};
    const float* w_ih = a.w_ih + u * a.I;
    const float* w_hh = a.w_hh + u * a.H;
    if constexpr (C == Cell::lstm) {
      dot_products<4, NR>(sums, {0, 1, 2, 3}, w_ih, a.H * a.I, a.x + b * a.I, a.I);
      dot_products<4, NR>(sums, {0, 1, 2, 3}, w_hh, a.H * a.H, a.h + b * a.H, a.H);
    } else {
      dot_products<3, NR>(sums, {0, 1, 2}, w_ih, a.H * a.I, a.x + b * a.I, a.I);
      dot_products<3, NR>(sums, {0, 1, 3}, w_hh, a.H * a.H, a.h + b * a.H, a.H);
    }
    for (int r = 0; r < NR; r++)
      for (int g = 0; g < 4; g++) out[(r * 4 + g) * VL] = sum(sums[g][r]);
  }

  template <int NR>
  void rows(int count, int64_t u, int64_t b, float* out) const {
    if constexpr (NR > 1)
      if (count < NR) return rows<NR - 1>(count, u, b, out);
    products<NR>(u, b, out);
  }

  SEQFUSE_INLINE vf bias(const float* p, int64_t gate, int64_t u, int n) const {
    return p ? take(p + gate * a.H + u, n) : vf{};
  }

  // The step of n units of row b from their products p [4][VL].
  SEQFUSE_INLINE void unit(int64_t u, int n, int64_t b, const float* p) const {
    using M = VecMath;
    const int64_t at = b * a.H + u, H = a.H;
    float* saved = a.gates ? a.gates + b * 4 * H + u : nullptr;
    auto both = [&](int g) { return bias(a.b_ih, g, u, n) + bias(a.b_hh, g, u, n) + load(p + g * VL); };
    if constexpr (C == Cell::lstm) {
      const auto s = lstm_forward<M>(both(0), both(1), both(2), both(3), take(a.c + at, n));
      give(a.h_out + at, s.h, n), give(a.c_out + at, s.c, n);
      if (!saved) return;
      give(saved, s.i, n), give(saved + H, s.f, n), give(saved + 2 * H, s.g, n), give(saved + 3 * H, s.o, n);
    } else {
      const vf xn = load(p + 2 * VL) + bias(a.b_ih, 2, u, n), an = load(p + 3 * VL) + bias(a.b_hh, 2, u, n);
      const auto s = gru_forward<M>(both(0), both(1), xn, an, take(a.h + at, n));
      give(a.h_out + at, s.h, n);
      if (!saved) return;
      give(saved, s.r, n), give(saved + H, s.z, n), give(saved + 2 * H, s.n, n), give(saved + 3 * H, an, n);
    }
  }

  // Blocks of VL units from begin to end, for all rows: at most kBatch at a time, whose products fit L1.
  void blocks(Range range) const {
    constexpr int64_t kBatch = 32;
    alignas(64) float product[kBatch * 4 * VL] = {};  // lanes without a unit are computed on, and dropped
    for (int64_t block = range.begin; block < range.end; block++)
      for (int64_t first = 0; first < a.B; first += kBatch) {
        const Range batch{first, first + kBatch < a.B ? first + kBatch : a.B};
        const int64_t u = block * VL, tiles = ceil_div(batch.size(), kRows);
        const int n = lanes(block, a.H);
        for (int lane = 0; lane < n; lane++)
          for (int64_t i = 0; i < tiles; i++) {
            const Range r = part(batch.size(), i, tiles);
            rows<kRows>(int(r.size()), u + lane, first + r.begin, product + r.begin * 4 * VL + lane);
          }
        for (int64_t b = batch.begin; b < batch.end; b++) unit(u, n, b, product + (b - first) * 4 * VL);
      }
  }
};

template <Cell C>
void run(const RnnCellStep& a, const Parallel& parallel) {
  const Step<C> step{a};
  const int64_t all = ceil_div(a.H, VL);
  const double work_ns = double(a.B < 3 ? 3 : a.B) * double(a.H) * 4 * double(a.I + a.H) / 50;
  const int64_t workers = work_ns < 10e3 ? 1 : parallel.threads < all ? parallel.threads : all;
  auto job = [&](int64_t begin, int64_t end) { step.blocks({all * begin / workers, all * end / workers}); };
  if (workers <= 1) return step.blocks({0, all});
  parallel(workers, job);
}

}  // namespace

void rnn_cell_step(const RnnCellStep& a, const Parallel& parallel) {
  a.cell == Cell::lstm ? run<Cell::lstm>(a, parallel) : run<Cell::gru>(a, parallel);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
