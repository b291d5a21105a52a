// The product inside the recurrent scan: a few rows of the state times packed weights, [rows, K] @ [K, vectors * VL].
//
// Weights are arrays of 4-byte words: one float, or two bf16 of neighbouring k. They lie packed as
// [words][vectors][VL], so that a tile reads them as one stream. The state is [rows][ld words], broadcast word by word:
// floats, but pairs of bf16 where the processor multiplies pairs (AVX512-BF16). Elsewhere bf16 weights are packed as
// floats, or, where so few rows use them that reading is what takes the time, as pairs that a tile widens in registers.
// The tile unit (AMX) takes the same pairs: 16 words of a packed vector are one of its registers. All sums are fp32.
#pragma once
#include "cpu/amx.h"
#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

constexpr int least_unit_rows = 2;  // rows of the state from which on the tile unit multiplies

enum class Product { floats, widened_pairs, dot, tiles };

template <class T>
constexpr bool uses_dot = has_dot && sizeof(T) == 2;

// Rows up to which a worker's bf16 weights are pairs. near: as floats they would stay in its second-level cache. On Zen
// 3 pairs win with up to two: 1.5x with one, 0.8x with four. AVX-512 has registers for more (docs/recurrent.md).
constexpr int most_pair_rows(bool near) {
#if defined(__AVX512F__)
  return near ? 4 : 8;
#else
  return 2;
#endif
}

// For a worker that has so many rows.
template <class T>
SEQFUSE_INLINE Product product_for(int64_t rows, bool near) {
  if (uses_dot<T>) return has_tiles && rows >= least_unit_rows ? Product::tiles : Product::dot;
  return sizeof(T) == 2 && rows <= most_pair_rows(near) ? Product::widened_pairs : Product::floats;
}

typedef uint32_t word;

// out[r * out_row + v * out_vec + lane] (+)= sum over k of x[r * ldx + k] * w[(k * vectors + v) * VL + lane], k < words
// of the weights
using TileFn = void (*)(const word* w, const word* x, int64_t ldx, int64_t words, float* out, int64_t out_row,
                        int64_t out_vec, bool add);

static_assert(!has_tiles || VL == tiles::words);

constexpr int max_vectors = 4;
constexpr int unit_rows = 2 * tiles::rows;                          // in one tile of the tile unit
constexpr int max_tile = has_tiles ? unit_rows * max_vectors : 24;  // vectors in the result of one tile

// Rows that a tile of so many vectors may have: accumulators, weights and one broadcast fit the registers.
constexpr int tile_rows(Product product, int vectors) {
  if (product == Product::tiles) return unit_rows;
#if defined(__AVX512F__)
  return vectors == 4 ? 6 : 8;
#else
  return vectors == 4 ? 3 : vectors == 3 ? 4 : vectors == 2 ? 6 : 8;
#endif
}

TileFn tile_function(Product product, int vectors, int rows);  // not for Product::tiles

// The same by the tile unit, for up to unit_rows rows. The calling thread holds a tiles::InUse.
void unit_product(int vectors, int rows, const word* w, const word* x, int64_t ldx, int64_t words, float* out,
                  int64_t out_row, int64_t out_vec, bool add);

SEQFUSE_INLINE void multiply_tile(Product product, int vectors, int rows, const word* w, const word* x, int64_t ldx,
                                  int64_t words, float* out, int64_t out_row, int64_t out_vec, bool add) {
  if constexpr (has_tiles)
    if (product == Product::tiles) return unit_product(vectors, rows, w, x, ldx, words, out, out_row, out_vec, add);
  tile_function(product, vectors, rows)(w, x, ldx, words, out, out_row, out_vec, add);
}

// Packs `vectors` * VL columns into [words][vectors][VL]; vector v holds columns first[v] .. first[v] + count[v] - 1,
// and zeros in its other lanes. T is float or bf16.
struct PackColumns {
  const void* w;
  int64_t ld, K;
  int vectors;
  int64_t first[max_vectors] = {};
  int count[max_vectors] = {};
  int64_t part = K, part_ld = K;  // pack_columns: k stands in row (k / part) * part_ld + k % part of w
};
template <class T>
void pack_rows(const PackColumns&, Product, word* out);  // column c is contiguous along k: w[c * ld + k]
template <class T>
void pack_columns(const PackColumns&, Product, word* out);  // k is the slow index: w[k * ld + c]

// words of weights for K terms of the sum, and of the state, whose last words may be padding (weights there are 0)
SEQFUSE_INLINE int64_t weight_words(Product product, int64_t K) {
  if (product == Product::tiles) return (K + 2 * tiles::words - 1) / (2 * tiles::words) * tiles::words;
  return product == Product::floats ? K : (K + 1) / 2;
}
SEQFUSE_INLINE int64_t operand_words(Product product, int64_t K) {
  return product == Product::widened_pairs ? K + (K & 1) : weight_words(product, K);
}
// Clears what of an operand row is padding, wholly or in part: a NaN there would reach the sums.
SEQFUSE_INLINE void clear_padding(Product product, int64_t K, word* row) {
  const bool pairs = product == Product::dot || product == Product::tiles;
  for (int64_t k = pairs ? K / 2 : K; k < operand_words(product, K); k++) row[k] = 0;
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
