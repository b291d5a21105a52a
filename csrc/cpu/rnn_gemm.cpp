// See rnn_gemm.h. The tile keeps rows * vectors accumulators in registers; with few of them (small batches) it runs
// several chains along k, or the latency of one multiply-add would set the pace.
#include "cpu/rnn_gemm.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

namespace {

template <bool Dot>
SEQFUSE_INLINE vf multiply_add(vf acc, const word* w, word x) {
#if defined(__AVX512BF16__)
  if constexpr (Dot) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(int(x)));
  }
#endif
  float f;
  memcpy(&f, &x, 4);
  return acc + splat(f) * load((const float*)w);
}

template <bool Dot, int NV, int NR>
void tile(const word* __restrict w, const word* __restrict x, int64_t ldx, int64_t words, float* __restrict out,
          int64_t out_row, int64_t out_vec, bool add) {
  constexpr int chains = NV * NR >= 8 ? 1 : NV * NR >= 3 ? 4 : 8;
  vf acc[chains][NR][NV];
#pragma GCC unroll 8
  for (int c = 0; c < chains; c++)
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[c][r][v] = vf{};

  int64_t k = 0;
  for (; k + chains <= words; k += chains) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; c++)
#pragma GCC unroll 8
      for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++)
          acc[c][r][v] = multiply_add<Dot>(acc[c][r][v], w + ((k + c) * NV + v) * VL, x[r * ldx + k + c]);
  }
  for (; k < words; k++)
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++)
        acc[0][r][v] = multiply_add<Dot>(acc[0][r][v], w + (k * NV + v) * VL, x[r * ldx + k]);

#pragma GCC unroll 8
  for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      vf s = acc[0][r][v];
#pragma GCC unroll 8
      for (int c = 1; c < chains; c++) s += acc[c][r][v];
      float* o = out + r * out_row + v * out_vec;
      if (add) s += load(o);
      store(o, s);
    }
}

template <bool Dot, int NV, int NR = tile_rows(NV)>
TileFn by_rows(int rows) {
  if constexpr (NR == 0)
    return nullptr;
  else
    return rows == NR ? tile<Dot, NV, NR> : by_rows<Dot, NV, NR - 1>(rows);
}

template <bool Dot>
TileFn by_vectors(int vectors, int rows) {
  switch (vectors) {
    case 1:
      return by_rows<Dot, 1>(rows);
    case 2:
      return by_rows<Dot, 2>(rows);
    case 3:
      return by_rows<Dot, 3>(rows);
    default:
      return by_rows<Dot, 4>(rows);
  }
}

// word k of a column: a float, or the pair 2k, 2k + 1
template <class T>
SEQFUSE_INLINE word word_at(const T* column, int64_t k) {
  word u;
  if constexpr (uses_dot<T>) {
    memcpy(&u, column + 2 * k, 4);
  } else {
    const float f = widen(column[k]);
    memcpy(&u, &f, 4);
  }
  return u;
}

}  // namespace

TileFn tile_function(bool dot, int vectors, int rows) {
  if constexpr (has_dot)
    if (dot) return by_vectors<true>(vectors, rows);
  return by_vectors<false>(vectors, rows);
}

template <class T>
void pack_rows(const PackColumns& p, word* out) {
  constexpr int KB = 16;  // one cache line of each column at a time
  const int64_t words = words_of<T>(p.K), stride = int64_t(p.vectors) * VL;
  const int64_t whole = uses_dot<T> ? p.K / 2 : p.K;  // words that are not half a pair
  word t[KB][VL];
  for (int v = 0; v < p.vectors; v++) {
    const T* base = (const T*)p.w + p.first[v] * p.ld;
    memset(t, 0, sizeof(t));
    for (int64_t k0 = 0; k0 < words; k0 += KB) {
      const int n = int(whole - k0 < KB ? whole - k0 : KB);
      for (int lane = 0; lane < p.count[v]; lane++) {
        const T* column = base + lane * p.ld;
        if (n == KB) {
#pragma GCC unroll 16
          for (int k = 0; k < KB; k++) t[k][lane] = word_at(column, k0 + k);
        } else {
          for (int k = 0; k < n; k++) t[k][lane] = word_at(column, k0 + k);
          if (k0 + n < words) memcpy(&(t[n][lane] = 0), column + p.K - 1, 2);
        }
      }
      for (int k = 0; k < KB && k0 + k < words; k++) memcpy(out + (k0 + k) * stride + v * VL, t[k], sizeof(t[k]));
    }
  }
}

template <class T>
void pack_columns(const PackColumns& p, word* out) {
  const int64_t words = words_of<T>(p.K);
  auto row = [&](int64_t k) { return (const T*)p.w + (k / p.part * p.part_ld + k % p.part) * p.ld; };
  for (int64_t k = 0; k < words; k++) {
    const T* even = row(uses_dot<T> ? 2 * k : k);
    const T* odd = uses_dot<T> && 2 * k + 1 < p.K ? row(2 * k + 1) : nullptr;
    for (int v = 0; v < p.vectors; v++, out += VL) {
      const int n = p.count[v];
      vf x = take(even + p.first[v], n);
      if constexpr (uses_dot<T>) {
        const vf high = odd ? take(odd + p.first[v], n) : vf{};
        x = as_float((as_bits(x) >> 16) | as_bits(high));
      }
      store((float*)out, x);
    }
  }
}

template void pack_rows<float>(const PackColumns&, word*);
template void pack_rows<bf16>(const PackColumns&, word*);
template void pack_columns<float>(const PackColumns&, word*);
template void pack_columns<bf16>(const PackColumns&, word*);

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
