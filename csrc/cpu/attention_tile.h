// The products inside attention, all of one form: a tile of `tile_rows` x `tile_columns` sums over k, in registers,
//
//   sum_k x(r, k) * w[k * ldw + c]
//
// with x broadcast element by element and w read as vectors. x is a block of rows (queries, weights) read along them
// or, for the gradients of keys and values, across them. Scores need the keys transposed, [D][tile_columns] a panel;
// everything else is read row by row as it lies.
//
// An element is a word: a float or, where the processor multiplies them (has_dot), two bf16 that are neighbours along
// k; k counts words then. Sums are fp32 either way. Where there is a tile unit (has_tiles, cpu/amx.h) it makes the sums
// of pairs, and tiles have its size.
#pragma once
#include <type_traits>

#include "cpu/amx.h"
#include "cpu/vec_pair.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

constexpr int tile_rows = has_tiles ? tiles::rows : SEQFUSE_VBYTES == 64 ? 12 : 6;
constexpr int tile_columns = has_tiles ? 2 * tiles::words : 2 * VL;
constexpr int block_keys = 96;  // a multiple of tile_rows and tile_columns of every level

SEQFUSE_INLINE int64_t round_up(int64_t a, int64_t b) {
  return (a + b - 1) / b * b;
}

// Words from one row to the next of a block that holds n columns: whole vectors, and an odd number of cache lines, so
// that a column of the block spreads over all sets of the first-level cache.
SEQFUSE_INLINE int64_t leading(int64_t n) {
  const int64_t lines = (round_up(n, tile_columns) + 15) / 16;
  return (lines | 1) * 16;
}

struct Floats {
  typedef float Word;
  typedef vf Vector;
  static constexpr int per_word = 1;
  static SEQFUSE_INLINE vf take(const float* p) { return load(p); }
  static SEQFUSE_INLINE vf broadcast(float x) { return splat(x); }
  static SEQFUSE_INLINE vf multiply_add(vf sum, vf a, vf b) { return sum + a * b; }
};

struct Pairs {
  typedef uint32_t Word __attribute__((may_alias));
  typedef vu Vector;
  static constexpr int per_word = 2;
  static SEQFUSE_INLINE vu take(const Word* p) { return (vu) * (const vu_any*)p; }
  static SEQFUSE_INLINE vu broadcast(Word x) { return x - vu{}; }
  static SEQFUSE_INLINE vf multiply_add(vf sum, vu a, vu b) { return add_dots(sum, a, b); }
};

// The words of tensors of T.
template <class T>
using WordsOf = std::conditional_t<has_dot && sizeof(T) == 2, Pairs, Floats>;

// words that hold n elements
template <class W>
SEQFUSE_INLINE int64_t words(int64_t n) {
  return (n + W::per_word - 1) / W::per_word;
}

// the same as a length of sums, which the tile unit makes of whole registers
template <class W>
SEQFUSE_INLINE int64_t depth(int64_t n) {
  return has_tiles ? round_up(words<W>(n), tiles::words) : words<W>(n);
}

// finish(r, v, sum) for each vector v of each row r of the sums. Across: x(r, k) is x[k * ldx + r], else x[r * ldx +
// k]. V: vectors of columns.
template <class W, bool Across, int V, class Finish>
SEQFUSE_INLINE void multiply_tile(const typename W::Word* __restrict x, int64_t ldx,
                                  const typename W::Word* __restrict w, int64_t ldw, int64_t K, Finish finish) {
  vf acc[tile_rows][V];
#pragma GCC unroll 12
  for (int r = 0; r < tile_rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) acc[r][v] = vf{};
  const typename W::Word* rows[tile_rows];
#pragma GCC unroll 12
  for (int r = 0; r < tile_rows; r++) rows[r] = x + r * ldx;
#pragma GCC unroll 2
  for (int64_t k = 0; k < K; k++) {
    typename W::Vector b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) b[v] = W::take(w + k * ldw + v * VL);
#pragma GCC unroll 12
    for (int r = 0; r < tile_rows; r++) {
      const typename W::Vector a = W::broadcast(Across ? x[k * ldx + r] : rows[r][k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) acc[r][v] = W::multiply_add(acc[r][v], a, b[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < tile_rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) finish(r, v, acc[r][v]);
}

// The sums are added to what stands in out.
template <class W, bool Across, int V>
SEQFUSE_INLINE void add_tile(const typename W::Word* __restrict x, int64_t ldx, const typename W::Word* __restrict w,
                             int64_t ldw, int64_t K, float* __restrict out, int64_t ldo) {
  multiply_tile<W, Across, V>(x, ldx, w, ldw, K, [=](int r, int v, vf sum) __attribute__((always_inline)) {
    float* o = out + r * ldo + v * VL;
    store(o, sum + load(o));
  });
}

// The same sums by the tile unit: out = x w of a tile, both K words deep (a multiple of a register's), w a panel of
// words [K][tile_columns].
SEQFUSE_INLINE void panel_by_tiles(const Pairs::Word* x, int64_t ldx, const Pairs::Word* w, int64_t K, float* out,
                                   int64_t ldo) {
  tiles::zero<0>(), tiles::zero<1>();
  for (int64_t k = 0; k < K; k += tiles::words) {
    tiles::load<2>(x + k, 4 * ldx);
    tiles::load<3>(w + k * tile_columns, 4 * tile_columns);
    tiles::load<4>(w + k * tile_columns + tiles::words, 4 * tile_columns);
    tiles::dot<0, 2, 3>(), tiles::dot<1, 2, 4>();
  }
  tiles::store<0>(out, 4 * ldo), tiles::store<1>(out + tiles::words, 4 * ldo);
}

// out += x w for a row of N tiles as narrow as a register.
template <int N>
SEQFUSE_INLINE void add_by_tiles(const Pairs::Word* x, int64_t ldx, const Pairs::Word* w, int64_t ldw, int64_t K,
                                 float* out, int64_t ldo) {
  constexpr int across = tiles::words;
  tiles::load<0>(out, 4 * ldo);
  if constexpr (N > 1) tiles::load<1>(out + across, 4 * ldo);
  if constexpr (N > 2) tiles::load<2>(out + 2 * across, 4 * ldo);
  if constexpr (N > 3) tiles::load<3>(out + 3 * across, 4 * ldo);
  for (int64_t k = 0; k < K; k += tiles::words) {
    tiles::load<4>(x + k, 4 * ldx);
    const Pairs::Word* from = w + k * ldw;
    tiles::load<5>(from, 4 * ldw), tiles::dot<0, 4, 5>();
    if constexpr (N > 1) tiles::load<6>(from + across, 4 * ldw), tiles::dot<1, 4, 6>();
    if constexpr (N > 2) tiles::load<7>(from + 2 * across, 4 * ldw), tiles::dot<2, 4, 7>();
    if constexpr (N > 3) tiles::load<5>(from + 3 * across, 4 * ldw), tiles::dot<3, 4, 5>();
  }
  tiles::store<0>(out, 4 * ldo);
  if constexpr (N > 1) tiles::store<1>(out + across, 4 * ldo);
  if constexpr (N > 2) tiles::store<2>(out + 2 * across, 4 * ldo);
  if constexpr (N > 3) tiles::store<3>(out + 3 * across, 4 * ldo);
}
// The same for two rows of two.
SEQFUSE_INLINE void add_square_by_tiles(const Pairs::Word* x, int64_t ldx, const Pairs::Word* w, int64_t ldw, int64_t K,
                                        float* out, int64_t ldo) {
  constexpr int across = tiles::words;
  float* below = out + tiles::rows * ldo;
  tiles::load<0>(out, 4 * ldo), tiles::load<1>(out + across, 4 * ldo);
  tiles::load<2>(below, 4 * ldo), tiles::load<3>(below + across, 4 * ldo);
  for (int64_t k = 0; k < K; k += tiles::words) {
    tiles::load<4>(x + k, 4 * ldx), tiles::load<5>(x + tiles::rows * ldx + k, 4 * ldx);
    tiles::load<6>(w + k * ldw, 4 * ldw), tiles::load<7>(w + k * ldw + across, 4 * ldw);
    tiles::dot<0, 4, 6>(), tiles::dot<1, 4, 7>(), tiles::dot<2, 5, 6>(), tiles::dot<3, 5, 7>();
  }
  tiles::store<0>(out, 4 * ldo), tiles::store<1>(out + across, 4 * ldo);
  tiles::store<2>(below, 4 * ldo), tiles::store<3>(below + across, 4 * ldo);
}
// The first for n columns, in steps of four registers.
SEQFUSE_INLINE void add_row_by_tiles(const Pairs::Word* x, int64_t ldx, const Pairs::Word* w, int64_t ldw, int64_t K,
                                     int64_t n, float* out, int64_t ldo) {
  constexpr int across = tiles::words;
  int64_t c = 0;
  for (; n - c > 2 * across; c += 4 * across) {
    if (n - c > 3 * across)
      add_by_tiles<4>(x, ldx, w + c, ldw, K, out + c, ldo);
    else
      add_by_tiles<3>(x, ldx, w + c, ldw, K, out + c, ldo);
  }
  if (n - c > across)
    add_by_tiles<2>(x, ldx, w + c, ldw, K, out + c, ldo);
  else if (n > c)
    add_by_tiles<1>(x, ldx, w + c, ldw, K, out + c, ldo);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
