// See rnn_gemm.h. The tile keeps rows * vectors accumulators in registers; with few of them (small batches) it runs
// several chains along k, or the latency of one multiply-add would set the pace.
#include "cpu/rnn_gemm.h"

#include <algorithm>

#include "cpu/turn.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

namespace {

SEQFUSE_INLINE vf broadcast(word x) {
  float f;
  memcpy(&f, &x, 4);
  return splat(f);
}

// acc += the product of one word of weights with the state at x: one term, or two.
template <Product P>
SEQFUSE_INLINE void multiply_add(vf& even, vf& odd, const word* w, const word* x) {
  const vf pair = load((const float*)w);
  if constexpr (P == Product::dot) {
    even = add_dots(even, as_bits(pair), vu{} + *x);
    return;
  }
  if constexpr (P == Product::widened_pairs) {
    even += broadcast(x[0]) * as_float(as_bits(pair) << 16);
    odd += broadcast(x[1]) * as_float(as_bits(pair) & 0xffff0000u);
  } else {
    even += broadcast(*x) * pair;
  }
}

// Sums that run side by side along k, for n accumulators each: enough to hide the latency of a multiply-add, and no
// more than there are registers for.
constexpr int chains_for(int n) {
#if defined(__AVX512F__)
  return n >= 8 ? 1 : n >= 3 ? 4 : 8;
#else
  return n >= 8 ? 1 : n >= 4 ? 2 : n >= 2 ? 4 : 8;
#endif
}

template <Product P, int NV, int NR>
void tile(const word* __restrict w, const word* __restrict x, int64_t ldx, int64_t words, float* __restrict out,
          int64_t out_row, int64_t out_vec, bool add) {
  constexpr int per_word = P == Product::widened_pairs ? 2 : 1;                                 // terms
  constexpr int chains = P == Product::widened_pairs && NV * NR > 4 ? 1 : chains_for(NV * NR);  // registers
  constexpr int step = chains > per_word ? chains / per_word : 1;                               // words
  vf acc[chains][NR][NV];
#pragma GCC unroll 8
  for (int c = 0; c < chains; c++)
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[c][r][v] = vf{};

  // Pairs: one vector of weights after the other, so that few widened ones are alive; else one row after the other.
  auto one = [&](int64_t k, int even, int odd) __attribute__((always_inline)) {
#pragma GCC unroll 24
    for (int i = 0; i < NV * NR; i++) {
      const int v = P == Product::widened_pairs ? i / NR : i % NV, r = P == Product::widened_pairs ? i % NR : i / NV;
      multiply_add<P>(acc[even][r][v], acc[odd][r][v], w + (k * NV + v) * VL, x + r * ldx + k * per_word);
    }
  };
  int64_t k = 0;
  for (; k + step <= words; k += step)
#pragma GCC unroll 8
    for (int c = 0; c < step; c++) one(k + c, c * per_word % chains, (c * per_word + per_word - 1) % chains);
  for (; k < words; k++) one(k, 0, 0);

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

template <Product P, int NV,
          int NR = P == Product::widened_pairs ? std::min(tile_rows(P, NV), most_pair_rows(false)) : tile_rows(P, NV)>
TileFn by_rows(int rows) {
  if constexpr (NR == 0)
    return nullptr;
  else
    return rows == NR ? tile<P, NV, NR> : by_rows<P, NV, NR - 1>(rows);
}

template <Product P>
TileFn by_vectors(int vectors, int rows) {
  switch (vectors) {
    case 1:
      return by_rows<P, 1>(rows);
    case 2:
      return by_rows<P, 2>(rows);
    case 3:
      return by_rows<P, 3>(rows);
    default:
      return by_rows<P, 4>(rows);
  }
}

// A tile of NA operands of up to 16 rows by NV vectors on the tile unit. Its registers: sums 0 to 3 (the second
// operand's from 2 on), 4 and 5 operands, 6 and 7 weights.
template <int NA, int NV>
struct UnitTile {
  const word* w;
  int64_t w_stride, words;
  const word* x;
  int64_t ldx;
  float* out;
  int64_t out_row, out_vec;
  bool add;

  template <class F>
  static SEQFUSE_INLINE void for_sums(F f) {
    f.template operator()<0, 0>();
    if constexpr (NV > 1) f.template operator()<0, 1>();
    if constexpr (NV > 2) f.template operator()<0, 2>();
    if constexpr (NV > 3) f.template operator()<0, 3>();
    if constexpr (NA > 1) f.template operator()<1, 0>();
    if constexpr (NA > 1 && NV > 1) f.template operator()<1, 1>();
  }

  template <int V>
  SEQFUSE_INLINE void multiply(const word* weights) const {
    tiles::load<6 + V % 2>(weights + V * VL, w_stride);
    tiles::dot<V, 4, 6 + V % 2>();
    if constexpr (NA > 1) tiles::dot<2 + V, 5, 6 + V % 2>();
  }

  SEQFUSE_INLINE void operator()() const {
    for_sums([&]<int A, int V>() __attribute__((always_inline)) {
      if (add)
        tiles::load<A * 2 + V>(out + A * tiles::rows * out_row + V * out_vec, out_row * 4);
      else
        tiles::zero<A * 2 + V>();
    });
    for (int64_t k = 0; k < words; k += tiles::words) {
      const word* weights = w + k * (w_stride / 4);
      tiles::load<4>(x + k, ldx * 4);
      if constexpr (NA > 1) tiles::load<5>(x + tiles::rows * ldx + k, ldx * 4);
      multiply<0>(weights);
      if constexpr (NV > 1) multiply<1>(weights);
      if constexpr (NV > 2) multiply<2>(weights);
      if constexpr (NV > 3) multiply<3>(weights);
    }
    for_sums([&]<int A, int V>() __attribute__((always_inline)) {
      tiles::store<A * 2 + V>(out + A * tiles::rows * out_row + V * out_vec, out_row * 4);
    });
  }
};

// Vectors from `first` on. With two operands at most two vectors at a time find registers.
template <int NA>
void unit_product_of(int vectors, const word* w, const word* x, int64_t ldx, int64_t words, float* out, int64_t out_row,
                     int64_t out_vec, bool add) {
  const int64_t w_stride = int64_t(vectors) * VL * 4;
  auto run = [&]<int NV>(int first) {
    UnitTile<NA, NV>{w + first * VL, w_stride, words, x, ldx, out + first * out_vec, out_row, out_vec, add}();
  };
  if constexpr (NA == 1) {
    if (vectors == 4) return run.template operator()<4>(0);
    if (vectors == 3) return run.template operator()<3>(0);
  }
  int first = 0;
  for (; first + 2 <= vectors; first += 2) run.template operator()<2>(first);
  if (first < vectors) run.template operator()<1>(first);
}

// word k of a column: a float, or the pair 2k, 2k + 1
template <class T, bool Pairs>
SEQFUSE_INLINE word word_at(const T* column, int64_t k) {
  word u;
  if constexpr (Pairs) {
    memcpy(&u, column + 2 * k, 4);
  } else {
    const float f = widen(column[k]);
    memcpy(&u, &f, 4);
  }
  return u;
}

template <class T, bool Pairs>
void pack_rows_as(const PackColumns& p, word* out) {
  constexpr int KB = 16;  // one cache line of each column at a time
  const int64_t words = Pairs ? (p.K + 1) / 2 : p.K, stride = int64_t(p.vectors) * VL;
  const int64_t whole = Pairs ? p.K / 2 : p.K;  // words that are not half a pair
  word t[KB][VL];
  for (int v = 0; v < p.vectors; v++) {
    const T* base = (const T*)p.w + p.first[v] * p.ld;
    memset(t, 0, sizeof(t));
    int64_t k0 = 0;
    if constexpr (Pairs || sizeof(T) == 4)  // words lie there as they are wanted
      if (p.count[v] == VL)
        for (; k0 + VL <= whole; k0 += VL)
          turn(base + (Pairs ? 2 : 1) * k0, p.ld * int64_t(sizeof(T)), (float*)out + k0 * stride + v * VL, stride);
    for (; k0 < words; k0 += KB) {
      const int n = int(whole - k0 < KB ? whole - k0 : KB);
      for (int lane = 0; lane < p.count[v]; lane++) {
        const T* column = base + lane * p.ld;
        if (n == KB) {
#pragma GCC unroll 16
          for (int k = 0; k < KB; k++) t[k][lane] = word_at<T, Pairs>(column, k0 + k);
        } else {
          for (int k = 0; k < n; k++) t[k][lane] = word_at<T, Pairs>(column, k0 + k);
          if (k0 + n < words) memcpy(&(t[n][lane] = 0), column + p.K - 1, 2);
        }
      }
      for (int k = 0; k < KB && k0 + k < words; k++) memcpy(out + (k0 + k) * stride + v * VL, t[k], sizeof(t[k]));
    }
  }
}

template <class T, bool Pairs>
void pack_columns_as(const PackColumns& p, word* out) {
  const int64_t words = Pairs ? (p.K + 1) / 2 : p.K;
  auto row = [&](int64_t k) { return (const T*)p.w + (k / p.part * p.part_ld + k % p.part) * p.ld; };
  for (int64_t k = 0; k < words; k++) {
    const T* even = row(Pairs ? 2 * k : k);
    const T* odd = Pairs && 2 * k + 1 < p.K ? row(2 * k + 1) : nullptr;
    for (int v = 0; v < p.vectors; v++, out += VL) {
      const int n = p.count[v];
      vf x = take(even + p.first[v], n);
      if constexpr (Pairs) {
        const vf high = odd ? take(odd + p.first[v], n) : vf{};
        x = as_float((as_bits(x) >> 16) | as_bits(high));
      }
      store((float*)out, x);
    }
  }
}

}  // namespace

TileFn tile_function(Product product, int vectors, int rows) {
  if constexpr (has_dot) return by_vectors<Product::dot>(vectors, rows);
  return product == Product::floats ? by_vectors<Product::floats>(vectors, rows)
                                    : by_vectors<Product::widened_pairs>(vectors, rows);
}

void unit_product(int vectors, int rows, const word* w, const word* x, int64_t ldx, int64_t words, float* out,
                  int64_t out_row, int64_t out_vec, bool add) {
  if constexpr (has_tiles) {
    tiles::set_operand_rows(rows);
    (rows > tiles::rows ? unit_product_of<2> : unit_product_of<1>)(vectors, w, x, ldx, words, out, out_row, out_vec,
                                                                   add);
  }
}

// What the tile unit takes beyond the last pair of a column, `vectors` wide.
static void pack_padding(const PackColumns& p, Product product, word* out) {
  const int64_t stride = int64_t(p.vectors) * VL, pairs = (p.K + 1) / 2;
  if (product == Product::tiles)
    memset(out + pairs * stride, 0, size_t((weight_words(product, p.K) - pairs) * stride) * 4);
}

template <>
void pack_rows<float>(const PackColumns& p, Product, word* out) {
  pack_rows_as<float, false>(p, out);
}
template <>
void pack_rows<bf16>(const PackColumns& p, Product product, word* out) {
  product == Product::floats ? pack_rows_as<bf16, false>(p, out) : pack_rows_as<bf16, true>(p, out);
  pack_padding(p, product, out);
}
template <>
void pack_columns<float>(const PackColumns& p, Product, word* out) {
  pack_columns_as<float, false>(p, out);
}
template <>
void pack_columns<bf16>(const PackColumns& p, Product product, word* out) {
  product == Product::floats ? pack_columns_as<bf16, false>(p, out) : pack_columns_as<bf16, true>(p, out);
  pack_padding(p, product, out);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
