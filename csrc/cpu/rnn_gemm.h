// The product inside the recurrent scan: a few rows of the state times packed weights, [rows, K] @ [K, vectors * VL].
//
// Operands are arrays of 4-byte words: one float, or two bf16 of neighbouring k where the processor multiplies pairs
// (AVX512-BF16). Weights lie packed as [K words][vectors][VL], so that a tile reads them as one stream; the state is
// [rows][ld words], broadcast word by word. All sums are fp32.
#pragma once
#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

#if defined(__AVX512BF16__)
constexpr bool has_dot = true;
#else
constexpr bool has_dot = false;
#endif

// whether the product for data type T runs on pairs of bf16
template <class T>
constexpr bool uses_dot = has_dot && sizeof(T) == 2;

typedef uint32_t word;

// out[r * out_row + v * out_vec + lane] (+)= sum over k of x[r * ldx + k] * w[(k * vectors + v) * VL + lane]
using TileFn = void (*)(const word* w, const word* x, int64_t ldx, int64_t words, float* out, int64_t out_row,
                        int64_t out_vec, bool add);

constexpr int max_vectors = 4;
constexpr int max_tile = 24;  // vectors in the result of one tile

// Rows that a tile of so many vectors may have: accumulators, weights and one broadcast fit the registers.
constexpr int tile_rows(int vectors) {
#if defined(__AVX512F__)
  return vectors == 4 ? 6 : 8;
#else
  return vectors == 4 ? 3 : vectors == 3 ? 4 : vectors == 2 ? 6 : 8;
#endif
}

TileFn tile_function(bool dot, int vectors, int rows);

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
void pack_rows(const PackColumns&, word* out);  // column c is contiguous along k: w[c * ld + k]
template <class T>
void pack_columns(const PackColumns&, word* out);  // k is the slow index: w[k * ld + c]

template <class T>
SEQFUSE_INLINE int64_t words_of(int64_t K) {
  return uses_dot<T> ? (K + 1) / 2 : K;
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
