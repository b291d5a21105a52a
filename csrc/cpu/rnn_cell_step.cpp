// One step of an LSTM or GRU cell, products included. Contract: seqfuse/rnn_cell.h
//
// A cell is called once a step, so weights packed for all of the product would be packed for nothing: it takes them as
// the module has them, [G*H, K] with k together in memory, and so are x and h. A tile is the dot products of the gates
// of one or two units with a few rows of the batch, vectors along k, both products one after the other in the same
// sums; a sum over the lanes ends it. bf16 is multiplied in pairs where the processor does, else widened; all sums are
// fp32. Where several tiles share a unit its weights are copied into one stream first. Memory traffic: the weights once
// (the floor of a small batch: G H (I + H) elements), and x and h once for each tile's units, from L1 or L2. The gates
// of VL units never leave L1.
#include "common/gates.h"
#include "cpu/rnn_scan.h"
#include "cpu/turn.h"
#include "seqfuse/rnn_cell.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

// A tile is the products of the gates of `units` units with `batch` rows. Its sums, the smaller side's operands and one
// of the other side fill the registers. x and h of a large batch lie in L2, and a GRU's three gates alone use too
// little of what they read there: on Zen 4, 32 rows, one unit in a tile ran at 0.117 TFLOP/s (two threads, fp32), two
// at 0.174. The weights of two units of an LSTM would fill L1: 0.139 instead of 0.160.
#if defined(__AVX512F__)
template <Cell C>
constexpr int tile_units = C == Cell::lstm ? 1 : 2;
template <Cell C>
constexpr int tile_batch = C == Cell::lstm ? 6 : 4;
#else
template <Cell C>
constexpr int tile_units = 1;
template <Cell C>
constexpr int tile_batch = C == Cell::lstm ? 3 : 4;
#endif

template <class T>
constexpr int terms = VL * 4 / int(sizeof(T));  // in one vector: floats, or pairs of bf16

typedef float vf_anywhere __attribute__((vector_size(SEQFUSE_VBYTES), aligned(2), may_alias));

template <class T>
SEQFUSE_INLINE vf load_terms(const T* p) {
  return *(const vf_anywhere*)p;
}
SEQFUSE_INLINE vf load_terms_n(const float* p, int n) {
  return load_n(p, n);
}
SEQFUSE_INLINE vf load_terms_n(const bf16* p, int n) {
  alignas(SEQFUSE_VBYTES) bf16 t[terms<bf16>] = {};
  memcpy(t, p, size_t(n) * sizeof(bf16));
  return load_terms(t);
}

template <class T>
SEQFUSE_INLINE void add_products(vf& sum, vf w, vf x) {
  if constexpr (sizeof(T) == 4)
    sum += w * x;
  else
    sum = add_dots(sum, as_bits(w), as_bits(x));
}

// What a tile multiplies: rows of weights with rows of the batch, `ld` elements apart, over K terms. Weights of unit i
// and gate g begin at w + i * unit + g * gate, and from one vector of such a row to the next it is `next` elements.
template <class T>
struct Operands {
  const T* w;
  int64_t unit, gate, next;
  const T* x;
  int64_t ld, K;
};

// sums[i * G + g][r] += w[i][g] . x[r], for G gates of so many units and NR rows of the batch.
template <int G, class T, int NW, int NR>
SEQFUSE_INLINE void dot_products(vf (&sums)[NW][NR], const Operands<T>& o) {
  auto step = [&](const T* w, const T* x, auto read) __attribute__((always_inline)) {
    constexpr int kept = NW < NR ? NW : NR, other = NW < NR ? NR : NW;
    auto row = [&](int i) __attribute__((always_inline)) { return w + i / G * o.unit + i % G * o.gate; };
    vf in[kept];
#pragma GCC unroll 8
    for (int i = 0; i < kept; i++) in[i] = NW < NR ? read(row(i)) : read(x + i * o.ld);
#pragma GCC unroll 8
    for (int j = 0; j < other; j++) {
      const vf one = NW < NR ? read(x + j * o.ld) : read(row(j));
#pragma GCC unroll 8
      for (int i = 0; i < kept; i++)
        NW < NR ? add_products<T>(sums[i][j], in[i], one) : add_products<T>(sums[j][i], one, in[i]);
    }
  };
  const T* w = o.w;
  int64_t k = 0;
  for (; k + terms<T> <= o.K; k += terms<T>, w += o.next) step(w, o.x + k, [](const T* p) { return load_terms(p); });
  if (const int n = int(o.K - k)) step(w, o.x + k, [n](const T* p) { return load_terms_n(p, n); });
}

template <class T>
SEQFUSE_INLINE void fetch_row(const T* p, int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t k = 0; k < n; k += line) __builtin_prefetch(p + k, 0, 2);
}

template <class T>
SEQFUSE_INLINE int64_t whole_vectors(int64_t n) {
  return ceil_div(n, terms<T>) * terms<T>;
}

template <Cell C, class T>
struct Step {
  static constexpr int G = C == Cell::lstm ? 4 : 3, PV = terms<T>, units = tile_units<C>;
  const RnnCellStep& a;
  const T *w_ih = (const T*)a.w_ih, *w_hh = (const T*)a.w_hh, *x = (const T*)a.x, *h = (const T*)a.h;

  // Copies that several tiles use: x and h side by side, and the weights of a tile's units [vectors][units][G][PV],
  // both filled up with zeros to whole vectors. Rows of the batch are an odd number of vectors apart: rows and gates a
  // power of two apart would fall on the same banks of L1.
  struct Copies {
    T* in = nullptr;
    T* weights = nullptr;
    int64_t I, H, ld;  // of whole vectors
    explicit Copies(const RnnCellStep& a)
        : I(whole_vectors<T>(a.I)), H(whole_vectors<T>(a.H)), ld(((I + H) / PV | 1) * PV) {}
  };

  static void put_row(const T* from, int64_t n, T* to, int64_t next) {
    auto put = [](T* to, vf x) { *(vf_anywhere*)to = x; };
    int64_t k = 0;
    for (; k + PV <= n; k += PV, to += next) put(to, load_terms(from + k));
    if (k < n) put(to, load_terms_n(from + k, int(n - k)));
  }

  void copy_inputs(const Copies& c) const {
    for (int64_t b = 0; b < a.B; b++) {
      put_row(x + b * a.I, a.I, c.in + b * c.ld, PV);
      put_row(h + b * a.H, a.H, c.in + b * c.ld + c.I, PV);
    }
  }

  // The next units' weights lie behind these; they come into L2 while these are multiplied.
  void copy_weights(int64_t u, int64_t other, const Copies& c) const {
    constexpr int64_t next = units * G * PV;
    for (int i = 0; i < units; i++)
      for (int g = 0; g < G; g++) {
        const int64_t row = g * a.H + u + i * other, ahead = units;
        T* to = c.weights + (i * G + g) * PV;
        fetch_row(w_ih + (row + ahead) * a.I, a.I), put_row(w_ih + row * a.I, a.I, to, next);
        fetch_row(w_hh + (row + ahead) * a.H, a.H), put_row(w_hh + row * a.H, a.H, to + c.I * units * G, next);
      }
  }

  // The four sums of units u and u + other for rows b .. b + NR - 1, to out[r][4][VL] at these units' lanes. GRU: r, z,
  // n of x, n of h.
  template <int NR>
  void products(int64_t u, int64_t other, int64_t b, float* out, const Copies& c) const {
    Operands<T> of_x{w_ih + u * a.I, other * a.I, a.H * a.I, PV, x + b * a.I, a.I, a.I};
    Operands<T> of_h{w_hh + u * a.H, other * a.H, a.H * a.H, PV, h + b * a.H, a.H, a.H};
    if (c.in) {
      constexpr int64_t unit = G * PV, next = units * unit;
      of_x = {c.weights, unit, PV, next, c.in + b * c.ld, c.ld, c.I};
      of_h = {c.weights + c.I * units * G, unit, PV, next, of_x.x + c.I, c.ld, c.H};
    }
    vf sums[units * G][NR] = {};
    auto give_gate = [&](int gate, float* to) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int i = 0; i < units; i++) give_sums<NR>(sums[i * G + gate], to + i * other);
    };
    dot_products<G>(sums, of_x);
    if constexpr (C == Cell::gru) give_gate(2, out + 2 * VL);
    dot_products<G>(sums, of_h);
#pragma GCC unroll 4
    for (int g = 0; g < (C == Cell::lstm ? 4 : 2); g++) give_gate(g, out + g * VL);
    if constexpr (C == Cell::gru) give_gate(2, out + 3 * VL);
  }

  // The sums of one gate, which begin anew.
  template <int NR>
  static SEQFUSE_INLINE void give_sums(vf (&sums)[NR], float* out) {
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) out[r * 4 * VL] = sum(sums[r]), sums[r] = vf{};
  }

  template <int NR>
  void rows(int count, int64_t u, int64_t other, int64_t b, float* out, const Copies& c) const {
    if constexpr (NR > 1)
      if (count < NR) return rows<NR - 1>(count, u, other, b, out, c);
    products<NR>(u, other, b, out, c);
  }

  SEQFUSE_INLINE vf bias(const void* p, int64_t gate, int64_t u, int n) const {
    return p ? take((const T*)p + gate * a.H + u, n) : vf{};
  }

  // The step of n units of row b from their products p [4][VL].
  SEQFUSE_INLINE void unit(int64_t u, int n, int64_t b, const float* p) const {
    using M = VecMath;
    const int64_t at = b * a.H + u, H = a.H;
    T* saved = a.gates ? (T*)a.gates + b * 4 * H + u : nullptr;
    T *h_out = (T*)a.h_out + at, *c_out = (T*)a.c_out + at;
    auto both = [&](int g) { return bias(a.b_ih, g, u, n) + bias(a.b_hh, g, u, n) + load(p + g * VL); };
    if constexpr (C == Cell::lstm) {
      const auto s = lstm_forward<M>(both(0), both(1), both(2), both(3), take((const T*)a.c + at, n));
      give(h_out, s.h, n), give(c_out, s.c, n);
      if (!saved) return;
      give(saved, s.i, n), give(saved + H, s.f, n), give(saved + 2 * H, s.g, n), give(saved + 3 * H, s.o, n);
    } else {
      const vf xn = load(p + 2 * VL) + bias(a.b_ih, 2, u, n), an = load(p + 3 * VL) + bias(a.b_hh, 2, u, n);
      const auto s = gru_forward<M>(both(0), both(1), xn, an, take(h + at, n));
      give(h_out, s.h, n);
      if (!saved) return;
      give(saved, s.r, n), give(saved + H, s.z, n), give(saved + 2 * H, s.n, n), give(saved + 3 * H, an, n);
    }
  }

  // The four sums on the tile unit, for 16 units, n of which exist, and NB * 16 rows of the batch. Its first operand is
  // rows of weights as they lie, its second x or h as packed pairs; the sums come out with the units below each other
  // and are turned over. Registers: the sums of a gate in NB of the first four, then two for weights, two for x or h.
  template <int NB>
  struct UnitSums {
    const Step& step;
    const word *x, *h;  // [words][NB][VL]
    float* out;         // [NB * 16][4][VL]
    int64_t u;
    int n;

    template <int D>
    static constexpr int sums = NB == 1 ? D : D % 2 * 2;

    // 16 rows of weights from term k on; what is not there is zero.
    template <int R>
    SEQFUSE_INLINE void load_weights(const T* w, int64_t K, int64_t k) const {
      constexpr int64_t terms = 2 * tiles::words;
      if (n == tiles::rows && k + terms <= K) return tiles::load<R>(w + k, K * 2);
      alignas(64) T edge[tiles::rows][terms] = {};
      for (int i = 0; i < n; i++) memcpy(edge[i], w + i * K + k, size_t(K - k < terms ? K - k : terms) * 2);
      tiles::load<R>(edge, sizeof(edge[0]));
    }
    template <int D>
    SEQFUSE_INLINE void add(const T* w, int64_t K, int64_t k) const {
      constexpr int gate = C == Cell::gru && D == 3 ? 2 : D, R = 4 + D % 2;
      load_weights<R>(w + (gate * step.a.H + u) * K, K, k);
      tiles::dot<sums<D>, R, 6>();
      if constexpr (NB == 2) tiles::dot<sums<D> + 1, R, 7>();
    }
    // Adds to the sums D... their products of w with x or h.
    template <int... D>
    SEQFUSE_INLINE void over(const T* w, int64_t K, const word* in) const {
      for (int64_t k = 0; k < K; k += 2 * tiles::words) {
        const word* pairs = in + k / 2 * NB * VL;
        tiles::load<6>(pairs, NB * VL * 4);
        if constexpr (NB == 2) tiles::load<7>(pairs + VL, NB * VL * 4);
        (add<D>(w, K, k), ...);
      }
    }
    template <int D>
    SEQFUSE_INLINE void give() const {
      alignas(64) float sum[tiles::rows][tiles::words];
      auto half = [&]<int R>(float* to) __attribute__((always_inline)) {
        tiles::store<R>(sum, sizeof(sum[0]));
        turn(sum, sizeof(sum[0]), to + D * VL, 4 * VL);
      };
      half.template operator()<sums<D>>(out);
      if constexpr (NB == 2) half.template operator()<sums<D> + 1>(out + tiles::rows * 4 * VL);
    }
    static SEQFUSE_INLINE void clear() { tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>(); }

    void operator()() const {
      const T *w_ih = step.w_ih, *w_hh = step.w_hh;
      const int64_t I = step.a.I, H = step.a.H;
      clear();
      if constexpr (NB == 1) {
        C == Cell::lstm ? over<0, 1, 2, 3>(w_ih, I, x) : over<0, 1, 2>(w_ih, I, x);
        C == Cell::lstm ? over<0, 1, 2, 3>(w_hh, H, h) : over<0, 1, 3>(w_hh, H, h);
        give<0>(), give<1>();
      } else {
        over<0, 1>(w_ih, I, x), over<0, 1>(w_hh, H, h);
        give<0>(), give<1>();
        clear();
        C == Cell::lstm ? over<2, 3>(w_ih, I, x) : over<2>(w_ih, I, x);
        C == Cell::lstm ? over<2, 3>(w_hh, H, h) : over<3>(w_hh, H, h);
      }
      give<2>(), give<3>();
    }
  };

  // As `blocks`, on the tile unit.
  void unit_blocks(Range range) const {
    [[maybe_unused]] const tiles::InUse in_use;
    constexpr Product kind = Product::tiles;
    alignas(64) float product[unit_rows * 4 * VL];
    const int64_t of_x = weight_words(kind, a.I), of_h = weight_words(kind, a.H);
    word* in = nullptr;  // x and h of up to 32 rows
    Scratch scratch;
    scratch.take(in, 2 * VL * (of_x + of_h)), scratch.allocate(), scratch.take(in, 2 * VL * (of_x + of_h));
    for (int64_t first = 0; first < a.B; first += unit_rows) {
      const int64_t count = a.B - first < unit_rows ? a.B - first : unit_rows;
      PackColumns rows{x + first * a.I, a.I, a.I, int(ceil_div(count, VL)), {0, VL}, {int(count < VL ? count : VL)}};
      rows.count[1] = int(count) - rows.count[0];
      word* in_h = in + rows.vectors * VL * of_x;
      pack_rows<T>(rows, kind, in);
      rows.w = h + first * a.H, rows.ld = rows.K = a.H;
      pack_rows<T>(rows, kind, in_h);
      for (int64_t block = range.begin; block < range.end; block++) {
        const int64_t u = block * VL;
        const int n = lanes(block, a.H);
        rows.vectors == 2 ? UnitSums<2>{*this, in, in_h, product, u, n}()
                          : UnitSums<1>{*this, in, in_h, product, u, n}();
        for (int64_t b = 0; b < count; b++) unit(u, n, first + b, product + b * 4 * VL);
      }
    }
  }

  // Blocks of VL units from begin to end, for all rows: at most kBatch at a time, whose products fit L1.
  void blocks(Range range) const {
    if constexpr (has_tiles && uses_dot<T>)
      if (a.B >= least_unit_rows) return unit_blocks(range);
    constexpr int64_t kBatch = 32;
    alignas(64) float product[kBatch * 4 * VL] = {};  // lanes without a unit are computed on, and dropped
    Copies c(a);
    Scratch scratch;
    if (a.B > tile_batch<C>) {
      auto take = [&] { scratch.take(c.in, a.B * c.ld), scratch.take(c.weights, units * G * (c.I + c.H)); };
      take(), scratch.allocate(), take();
      copy_inputs(c);
    }
    for (int64_t block = range.begin; block < range.end; block++)
      for (int64_t first = 0; first < a.B; first += kBatch) {
        const Range batch{first, first + kBatch < a.B ? first + kBatch : a.B};
        const int64_t u = block * VL, tiles = ceil_div(batch.size(), tile_batch<C>);
        const int n = lanes(block, a.H);
        for (int lane = 0; lane < n; lane += units) {
          const int64_t other = lane + 1 < n ? 1 : 0;  // the last of an odd number is computed twice
          if (c.in) copy_weights(u + lane, other, c);
          for (int64_t i = 0; i < tiles; i++) {
            const Range r = part(batch.size(), i, tiles);
            float* out = product + r.begin * 4 * VL + lane;
            rows<tile_batch<C>>(int(r.size()), u + lane, other, first + r.begin, out, c);
          }
        }
        for (int64_t b = batch.begin; b < batch.end; b++) unit(u, n, b, product + (b - first) * 4 * VL);
      }
  }
};

constexpr double terms_a_ns(int64_t size) {
  return size == 2 ? 100 : 50;
}

template <Cell C, class T>
void run(const RnnCellStep& a, const Parallel& parallel) {
  const Step<C, T> step{a};
  const int64_t all = ceil_div(a.H, VL);
  const double work_ns = double(a.B < 3 ? 3 : a.B) * double(a.H) * 4 * double(a.I + a.H) / terms_a_ns(sizeof(T));
  const int64_t workers = work_ns < 10e3 ? 1 : parallel.threads < all ? parallel.threads : all;
  auto job = [&](int64_t begin, int64_t end) { step.blocks({all * begin / workers, all * end / workers}); };
  if (workers <= 1) return step.blocks({0, all});
  parallel(workers, job);
}

// out [B, N] (+)= d [B, K] @ w [K, N]
template <class T>
struct DenseProduct {
  const T* d;
  int64_t ld, K;
  const T* w;
  int64_t N;
  T* out;
  bool add;
};

// Columns [tile * most, + most) of it. A block of w is packed into L1, where the tiles of all rows use it: left where
// it is, columns of a width that is a power of two share a few cache sets.
// K elements of a row of d as operands of the product (rnn_gemm.h): pairs, the last filled up with zero, or floats.
SEQFUSE_INLINE void put_operand(const bf16* d, int64_t K, word* out) {
  if constexpr (has_dot) {
    memcpy(out, d, size_t(K) * sizeof(bf16));
  } else {
    for_vectors(0, K, [=](int64_t i, int n) { give((float*)out + i, take(d + i, n), n); });
  }
}

template <class T>
void column_tile(const DenseProduct<T>& p, int64_t B, int64_t tile) {
  constexpr int64_t kTerms = (uses_dot<T> ? 2048 : 1024) / VL, kBatch = 32;
  const Product product = uses_dot<T> ? product_for<T>(B, true) : Product::floats;
  [[maybe_unused]] const tiles::InUse in_use;
  alignas(64) word packed[1024 / VL * max_vectors * VL];
  alignas(64) float sums[kBatch * max_vectors * VL];
  alignas(64) word operand[sizeof(T) == 4 ? 1 : kBatch * 1024 / VL];  // rows of d as the product takes them
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
      pack_columns<T>(columns, product, packed);
      const bool last = k + kTerms >= p.K;  // what is packed next: the rows below, or the columns beside
      const T* next = p.w + begin + (last ? width : (k + kTerms) * p.N);
      for (int64_t i = 0, n = last ? kTerms : p.K - k - kTerms; i < n && i < kTerms; i++)
        fetch_row(next + i * p.N, width);
      const word* in = (const word*)(p.d + first * p.ld + k);
      int64_t ld = p.ld;
      if constexpr (sizeof(T) == 2) {
        in = operand, ld = 1024 / VL;
        for (int64_t row = 0; row < rows.end; row++) {
          clear_padding(product, columns.K, operand + row * ld);
          put_operand(p.d + (first + row) * p.ld + k, columns.K, operand + row * ld);
        }
      }
      for_row_tiles(product, rows, vectors, [&](int64_t row, int count) {
        multiply_tile(product, vectors, count, packed, in + row * ld, ld, weight_words(product, columns.K),
                      sums + row * width, width, VL, k > 0);
      });
    }
    for (int64_t row = 0; row < rows.end; row++)
      for (int v = 0; v < vectors; v++) {
        T* out = p.out + (first + row) * p.N + columns.first[v];
        const vf x = load(sums + row * width + v * VL);
        give(out, p.add ? x + take(out, columns.count[v]) : x, columns.count[v]);
      }
  }
}

template <class T>
void run(const RnnCellProducts& a, const Parallel& parallel) {
  const DenseProduct<T> dx{(const T*)a.dxg, a.ld, a.GH, (const T*)a.w_ih, a.I, (T*)a.dx, false};
  const DenseProduct<T> dh{(const T*)a.da, a.ld, a.GH, (const T*)a.w_hh, a.H, (T*)a.dh, a.add};
  const int64_t of_dx = a.dx ? ceil_div(a.I, max_vectors * VL) : 0, of_dh = a.dh ? ceil_div(a.H, max_vectors * VL) : 0;
  const int64_t all = of_dx + of_dh, width = (a.dx ? a.I : 0) + (a.dh ? a.H : 0);
  const double work_ns = double(a.B < 3 ? 3 : a.B) * double(a.GH) * double(width) / terms_a_ns(sizeof(T));
  const int64_t workers = work_ns < 10e3 ? 1 : parallel.threads < all ? parallel.threads : all;
  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t i = all * begin / workers; i < all * end / workers; i++)
      i < of_dx ? column_tile(dx, a.B, i) : column_tile(dh, a.B, i - of_dx);
  };
  if (workers <= 1) return job(0, 1);
  parallel(workers, job);
}

}  // namespace

void rnn_cell_products(const RnnCellProducts& a, const Parallel& parallel) {
  if (a.dtype == DType::bf16) return run<bf16>(a, parallel);
  if constexpr (!has_dot) run<float>(a, parallel);  // with dots: only bf16 comes here (dispatch.cpp)
}

void rnn_cell_step(const RnnCellStep& a, const Parallel& parallel) {
  const bool lstm = a.cell == Cell::lstm;
  if (a.dtype == DType::bf16) return lstm ? run<Cell::lstm, bf16>(a, parallel) : run<Cell::gru, bf16>(a, parallel);
  if constexpr (!has_dot) lstm ? run<Cell::lstm, float>(a, parallel) : run<Cell::gru, float>(a, parallel);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
