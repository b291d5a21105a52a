// One step of an LSTM or GRU cell in float32, products included. Contract: seqfuse/rnn_cell.h
//
// A cell is called once a step, so weights packed for all of the product would be packed for nothing: it takes them as
// the module has them, [G*H, K] with k together in memory, and so are x and h. A tile is the dot products of the gates
// of one unit with a few rows of the batch, vectors along k, both products one after the other in the same sums; a sum
// over the lanes ends it. Where several tiles share a unit its weights are copied into one stream first. Memory
// traffic: the weights once (the floor of a small batch: 4 G H (I + H) bytes), and x and h once for each unit, from L1
// or L2. The gates of VL units never leave L1.
#include "common/gates.h"
#include "cpu/rnn_scan.h"
#include "seqfuse/rnn_cell.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

// Rows of a tile: their sums, the smaller side's operands and one of the other side fill the registers.
template <Cell C>
#if defined(__AVX512F__)
constexpr int tile_batch = C == Cell::lstm ? 6 : 8;
#else
constexpr int tile_batch = C == Cell::lstm ? 3 : 4;
#endif

// What a tile multiplies: rows of weights, `gate` floats apart, with rows of the batch, `ld` apart, over K terms. From
// one vector of a row of weights to the next it is `next` floats.
struct Operands {
  const float* w;
  int64_t gate, next;
  const float* x;
  int64_t ld, K;
};

// sums[g][r] += w[g] . x[r], for NW rows of weights and NR rows of the batch.
template <int NW, int NR>
SEQFUSE_INLINE void dot_products(vf (&sums)[NW][NR], const Operands& o) {
  auto terms = [&](const float* w, const float* x, auto read) __attribute__((always_inline)) {
    constexpr int kept = NW < NR ? NW : NR, other = NW < NR ? NR : NW;
    vf in[kept];
#pragma GCC unroll 8
    for (int i = 0; i < kept; i++) in[i] = NW < NR ? read(w + i * o.gate) : read(x + i * o.ld);
#pragma GCC unroll 8
    for (int j = 0; j < other; j++) {
      const vf one = NW < NR ? read(x + j * o.ld) : read(w + j * o.gate);
#pragma GCC unroll 8
      for (int i = 0; i < kept; i++) (NW < NR ? sums[i][j] : sums[j][i]) += one * in[i];
    }
  };
  const float* w = o.w;
  int64_t k = 0;
  for (; k + VL <= o.K; k += VL, w += o.next) terms(w, o.x + k, [](const float* p) { return load(p); });
  if (const int n = int(o.K - k)) terms(w, o.x + k, [n](const float* p) { return load_n(p, n); });
}

constexpr int64_t kLine = 16;  // floats

SEQFUSE_INLINE void fetch_row(const float* p, int64_t n) {
  for (int64_t k = 0; k < n; k += kLine) __builtin_prefetch(p + k, 0, 2);
}

SEQFUSE_INLINE int64_t whole_vectors(int64_t n) {
  return ceil_div(n, VL) * VL;
}

template <Cell C>
struct Step {
  static constexpr int G = C == Cell::lstm ? 4 : 3;
  const RnnCellStep& a;

  // Copies that several tiles use: x and h side by side, and the weights of one unit [vectors][G][VL], both filled up
  // with zeros to whole vectors. Rows of the batch are an odd number of vectors apart: rows and gates a power of two
  // apart would fall on the same banks of L1.
  struct Copies {
    float* in = nullptr;
    float* weights = nullptr;
    int64_t I, H, ld;  // of whole vectors
    explicit Copies(const RnnCellStep& a) : I(whole_vectors(a.I)), H(whole_vectors(a.H)), ld((I + H) | VL) {}
  };

  static void put_row(const float* from, int64_t n, float* to, int64_t next) {
    int64_t k = 0;
    for (; k + VL <= n; k += VL, to += next) store(to, load(from + k));
    if (k < n) store(to, load_n(from + k, int(n - k)));
  }

  void copy_inputs(const Copies& c) const {
    for (int64_t b = 0; b < a.B; b++) {
      put_row(a.x + b * a.I, a.I, c.in + b * c.ld, VL);
      put_row(a.h + b * a.H, a.H, c.in + b * c.ld + c.I, VL);
    }
  }

  // The next unit's weights lie behind this one's; they come into L2 while this one's are multiplied.
  void copy_weights(int64_t u, const Copies& c) const {
    for (int g = 0; g < G; g++) {
      const float* w_ih = a.w_ih + (g * a.H + u) * a.I;
      const float* w_hh = a.w_hh + (g * a.H + u) * a.H;
      fetch_row(w_ih + a.I, a.I), put_row(w_ih, a.I, c.weights + g * VL, G * VL);
      fetch_row(w_hh + a.H, a.H), put_row(w_hh, a.H, c.weights + c.I * G + g * VL, G * VL);
    }
  }

  // The four sums of unit u for rows b .. b + NR - 1, to out[r][4][VL] at this unit's lane. GRU: r, z, n of x, n of h.
  template <int NR>
  void products(int64_t u, int64_t b, float* out, const Copies& c) const {
    Operands x{a.w_ih + u * a.I, a.H * a.I, VL, a.x + b * a.I, a.I, a.I};
    Operands h{a.w_hh + u * a.H, a.H * a.H, VL, a.h + b * a.H, a.H, a.H};
    if (c.in) {
      x = {c.weights, VL, G * VL, c.in + b * c.ld, c.ld, c.I};
      h = {c.weights + c.I * G, VL, G * VL, x.x + c.I, c.ld, c.H};
    }
    vf sums[G][NR] = {};
    dot_products<G, NR>(sums, x);
    if constexpr (C == Cell::gru) give_sum<NR>(sums[2], out + 2 * VL);
    dot_products<G, NR>(sums, h);
    for (int g = 0; g < (C == Cell::lstm ? 4 : 2); g++) give_sum<NR>(sums[g], out + g * VL);
    if constexpr (C == Cell::gru) give_sum<NR>(sums[2], out + 3 * VL);
  }

  // The sums of one gate, which begin anew.
  template <int NR>
  static SEQFUSE_INLINE void give_sum(vf (&sums)[NR], float* out) {
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) out[r * 4 * VL] = sum(sums[r]), sums[r] = vf{};
  }

  template <int NR>
  void rows(int count, int64_t u, int64_t b, float* out, const Copies& c) const {
    if constexpr (NR > 1)
      if (count < NR) return rows<NR - 1>(count, u, b, out, c);
    products<NR>(u, b, out, c);
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
    Copies c(a);
    Scratch scratch;
    if (a.B > tile_batch<C>) {
      auto take = [&] { scratch.take(c.in, a.B * c.ld), scratch.take(c.weights, G * (c.I + c.H)); };
      take(), scratch.allocate(), take();
      copy_inputs(c);
    }
    for (int64_t block = range.begin; block < range.end; block++)
      for (int64_t first = 0; first < a.B; first += kBatch) {
        const Range batch{first, first + kBatch < a.B ? first + kBatch : a.B};
        const int64_t u = block * VL, tiles = ceil_div(batch.size(), tile_batch<C>);
        const int n = lanes(block, a.H);
        for (int lane = 0; lane < n; lane++) {
          if (c.in) copy_weights(u + lane, c);
          for (int64_t i = 0; i < tiles; i++) {
            const Range r = part(batch.size(), i, tiles);
            rows<tile_batch<C>>(int(r.size()), u + lane, first + r.begin, product + r.begin * 4 * VL + lane, c);
          }
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

// out [B, N] (+)= d [B, K] @ w [K, N]
struct DenseProduct {
  const float* d;
  int64_t ld, K;
  const float* w;
  int64_t N;
  float* out;
  bool add;
};

// Columns [tile * most, + most) of it. A block of w is packed into L1, where the tiles of all rows use it: left where
// it is, columns of a width that is a power of two share a few cache sets.
void column_tile(const DenseProduct& p, int64_t B, int64_t tile) {
  constexpr int64_t kTerms = 1024 / VL, kBatch = 32;
  alignas(64) word packed[kTerms * max_vectors * VL];
  alignas(64) float sums[kBatch * max_vectors * VL];
  const int64_t begin = tile * max_vectors * VL;
  PackColumns columns{nullptr, p.N, 0, 0};
  for (int64_t u = begin; u < p.N && columns.vectors < max_vectors; u += VL) {
    columns.first[columns.vectors] = u;
    columns.count[columns.vectors++] = p.N - u < VL ? int(p.N - u) : VL;
  }
  const int vectors = columns.vectors;
  const int64_t width = vectors * VL;
  for (int64_t first = 0; first < B; first += kBatch) {
    const Range rows{0, B - first < kBatch ? B - first : kBatch};
    for (int64_t k = 0; k < p.K; k += kTerms) {
      columns.w = p.w + k * p.N;
      columns.K = columns.part = columns.part_ld = p.K - k < kTerms ? p.K - k : kTerms;
      pack_columns<float>(columns, Product::floats, packed);
      const bool last = k + kTerms >= p.K;  // what is packed next: the rows below, or the columns beside
      const float* next = p.w + begin + (last ? width : (k + kTerms) * p.N);
      for (int64_t i = 0, n = last ? kTerms : p.K - k - kTerms; i < n && i < kTerms; i++)
        fetch_row(next + i * p.N, width);
      for_row_tiles(rows, vectors, [&](int64_t row, int count) {
        tile_function(Product::floats, vectors, count)(packed, (const word*)(p.d + (first + row) * p.ld + k), p.ld,
                                                       columns.K, sums + row * width, width, VL, k > 0);
      });
    }
    for (int64_t row = 0; row < rows.end; row++)
      for (int v = 0; v < vectors; v++) {
        float* out = p.out + (first + row) * p.N + columns.first[v];
        const vf x = load(sums + row * width + v * VL);
        give(out, p.add ? x + take(out, columns.count[v]) : x, columns.count[v]);
      }
  }
}

}  // namespace

void rnn_cell_products(const RnnCellProducts& a, const Parallel& parallel) {
  const DenseProduct dx{a.dxg, a.ld, a.GH, a.w_ih, a.I, a.dx, false}, dh{a.da, a.ld, a.GH, a.w_hh, a.H, a.dh, a.add};
  const int64_t of_dx = a.dx ? ceil_div(a.I, max_vectors * VL) : 0, of_dh = a.dh ? ceil_div(a.H, max_vectors * VL) : 0;
  const int64_t all = of_dx + of_dh, width = (a.dx ? a.I : 0) + (a.dh ? a.H : 0);
  const double work_ns = double(a.B < 3 ? 3 : a.B) * double(a.GH) * double(width) / 50;
  const int64_t workers = work_ns < 10e3 ? 1 : parallel.threads < all ? parallel.threads : all;
  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t i = all * begin / workers; i < all * end / workers; i++)
      i < of_dx ? column_tile(dx, a.B, i) : column_tile(dh, a.B, i - of_dx);
  };
  if (workers <= 1) return job(0, 1);
  parallel(workers, job);
}

void rnn_cell_step(const RnnCellStep& a, const Parallel& parallel) {
  a.cell == Cell::lstm ? run<Cell::lstm>(a, parallel) : run<Cell::gru>(a, parallel);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
