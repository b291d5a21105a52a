// What forward, backward and decoding share of attention: which keys a query sees, and how a score comes out of q . k.
#pragma once
#include <cmath>

#include "cpu/attention_tile.h"
#include "cpu/dropout.h"
#include "cpu/scratch.h"
#include "seqfuse/attention.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

constexpr double log2_e = 1.44269504088896341, ln_2 = 0.693147180559945309;

// 2^x: of what is left above the integer below x a polynomial of degree 5, and 2^integer comes in one instruction; or
// by rounding x to an integer. About 1.4 ulp. Exactly 1 at 0, exactly 0 for -inf and (but for the tiniest floats that
// AVX-512 makes of it) below -127, a NaN stays one.
SEQFUSE_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p = splat(1.86713330e-3f);
  p = p * r + 9.01702350e-3f;
  p = p * r + 5.57999180e-2f;
  p = p * r + 2.40164449e-1f;
  p = p * r + 6.93151312e-1f;
  p = p * r + 1.0f;
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  x = max(x, unfused(splat(-127.0f)));        // a constant in sight becomes two instructions
  const vf shifted = x + splat(12582912.0f);  // 1.5 * 2^23: its low bits are x, rounded
  const vf r = x - (shifted - splat(12582912.0f));
  vf p = splat(1.3264727e-3f);
  p = p * r + 9.6715128e-3f;
  p = p * r + 5.5507337e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314698e-1f;
  p = p * r + 1.0f;
  return as_float(as_bits(p) + (as_bits(shifted) << 23));  // at -127 p is 1, and nothing is left of its exponent
#endif
}
SEQFUSE_INLINE float exp2(float x) {
  return exp2(splat(x))[0];
}

// log(2^m l), rounded once: backward takes the difference of it and a score that may be as large
SEQFUSE_INLINE float natural(float m, float l) {
  return float(m * ln_2 + std::log(double(l)));
}

SEQFUSE_INLINE int64_t index_at(const IndexView& v, int64_t i) {
  return v.wide ? static_cast<const int64_t*>(v.data)[i] : int64_t(static_cast<const int32_t*>(v.data)[i]);
}
SEQFUSE_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// f(rows) with the type of a pointer's elements
template <class T>
SEQFUSE_INLINE const T* row_of(const HeadsView& v, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(v.data) + b * v.batch + h * v.head + t * v.row;
}
template <class T>
SEQFUSE_INLINE T* row_to_write(const HeadsView& v, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(v.data) + b * v.batch + h * v.head + t * v.row;
}

struct Range {
  int64_t begin, end;
  SEQFUSE_INLINE bool empty() const { return begin >= end; }
};

// One sequence: where its rows lie and which keys its queries see. Keys and queries are counted inside it.
struct Sequence {
  int64_t index;  // what dropout and ALiBi call b
  int64_t batch;  // where it lies in memory
  int64_t q0, queries, k0, keys;
  int64_t shift;  // query i stands at key i + shift
  int64_t left, right;

  // keys that query i sees
  SEQFUSE_INLINE Range seen(int64_t i) const {
    const int64_t p = i + shift;
    return {left < 0 ? 0 : clamp(p - left, 0, keys), right < 0 ? keys : clamp(p + right + 1, 0, keys)};
  }
  // keys that any of the queries [i, end) may see
  SEQFUSE_INLINE Range seen_by(int64_t i, int64_t end) const {
    return i < end ? Range{seen(i).begin, seen(end - 1).end} : Range{0, 0};
  }
};

SEQFUSE_INLINE Sequence sequence_at(const AttentionProblem& a, int64_t s) {
  Sequence r{s, s, 0, a.Tq, 0, a.Tk, 0, a.window_left, a.window_right};
  if (a.cu_seqlens_q.data) {
    r.batch = 0;
    r.q0 = clamp(index_at(a.cu_seqlens_q, s), 0, a.Tq), r.k0 = clamp(index_at(a.cu_seqlens_k, s), 0, a.Tk);
    r.queries = clamp(index_at(a.cu_seqlens_q, s + 1), r.q0, a.Tq) - r.q0;
    r.keys = clamp(index_at(a.cu_seqlens_k, s + 1), r.k0, a.Tk) - r.k0;
  }
  r.shift = a.top_left ? 0 : r.keys - r.queries;
  if (a.query_start.data) r.shift = index_at(a.query_start, s);
  if (a.key_lengths.data) r.keys = clamp(index_at(a.key_lengths, s), 0, r.keys);
  return r;
}

// Turns q . k of one query and a block of keys into scores. Where nothing but a scale is asked for the scale is left to
// the exponential; where nothing but a scale and a bias is, both are left to the products (BlockView::scores).
struct ScoreRule {
  bool plain;            // nothing is left to `apply`
  bool bias_in_product;  // then scores come to base 2
  float factor;          // of a score, for the exponential to base 2
  float scale, softcap, slope;
  const char *bias, *mask;
  int64_t bias_row, bias_column, mask_row, mask_column;  // bias_row in bytes
  bool bias_wide;                                        // float, else bf16

  ScoreRule() = default;
  ScoreRule(const AttentionProblem& a, const Sequence& s, int64_t h) {
    scale = a.scale, softcap = a.softcap;
    slope = a.alibi_slopes ? a.alibi_slopes[s.index * a.alibi_batch + h] : 0.0f;
    bias_wide = a.bias_dtype == DType::f32;
    const int64_t size = bias_wide ? 4 : 2;
    bias = mask = nullptr;
    bias_row = a.bias.row * size, bias_column = a.bias.column, mask_row = a.mask.row, mask_column = a.mask.column;
    if (a.bias.data) bias = static_cast<const char*>(a.bias.data) + (s.batch * a.bias.batch + h * a.bias.head) * size;
    if (a.mask.data) mask = static_cast<const char*>(a.mask.data) + s.batch * a.mask.batch + h * a.mask.head;
    const bool linear = softcap == 0.0f && slope == 0.0f && !mask;
    bias_in_product = linear && bias && bias_column == 1;
    plain = bias_in_product || (linear && !bias && scale > 0.0f);
    factor = bias_in_product ? 1.0f : float(plain ? scale * log2_e : log2_e);
  }

  // s[c], columns.begin <= c < columns.end (whole vectors), belongs to query i at position p and key first + c. Keys
  // from `keys` on don't exist: what becomes of them is of no interest. cap_slope: where the derivative of softcap
  // goes.
  void apply(float* s, int64_t i, int64_t p, int64_t first, Range columns, int64_t keys, float* cap_slope) const {
    const int64_t end = columns.end < keys - first ? columns.end : keys - first;
    const vf f = splat(scale);
    if (softcap != 0.0f) {
      const vf cap = splat(softcap), inverse = splat(scale / softcap);
      for (int64_t c = columns.begin; c < columns.end; c += VL) {
        const vf t = SEQFUSE_ISA::tanh(load(s + c) * inverse);
        store(s + c, cap * t);
        if (cap_slope) store(cap_slope + c, 1.0f - t * t);
      }
    } else {
      for (int64_t c = columns.begin; c < columns.end; c += VL) store(s + c, load(s + c) * f);
    }
    if (slope != 0.0f) {
      vf distance;
      for (int l = 0; l < VL; l++) distance[l] = float(p - first - columns.begin - l);
      for (int64_t c = columns.begin; c < columns.end; c += VL, distance -= float(VL))
        store(s + c, load(s + c) - slope * max(distance, -distance));
    }
    if (bias) {
      const char* row = bias + i * bias_row;
      bias_wide ? add_bias(s, reinterpret_cast<const float*>(row), first, {columns.begin, end})
                : add_bias(s, reinterpret_cast<const bf16*>(row), first, {columns.begin, end});
    }
    if (mask) {
      const char* row = mask + i * mask_row + first * mask_column;
      for (int64_t c = columns.begin; c < end; c++)
        if (!row[c * mask_column]) s[c] = -__builtin_inff();
    }
  }

  // whether the mask leaves any of these queries any of these keys
  bool any(int64_t i, int64_t i_end, Range keys) const {
    if (!mask) return true;
    for (; i < i_end; i++) {
      const char* row = mask + i * mask_row;
      for (int64_t j = keys.begin; j < keys.end; j++)
        if (row[j * mask_column]) return true;
    }
    return false;
  }

 private:
  template <class T>
  SEQFUSE_INLINE void add_bias(float* s, const T* row, int64_t first, Range columns) const {
    if (bias_column == 1)
      for_vectors(columns.begin, columns.end,
                  [=](int64_t c, int n) { give(s + c, take(s + c, n) + take(row + first + c, n), n); });
    else
      for (int64_t c = columns.begin; c < columns.end; c++) s[c] += widen(row[(first + c) * bias_column]);
  }
};

// Hides what a query doesn't see: columns outside `seen`, inside `columns`.
SEQFUSE_INLINE void hide(float* s, Range columns, Range seen) {
  const float hidden = -__builtin_inff();
  for (int64_t c = columns.begin; c < columns.end && c < seen.begin; c++) s[c] = hidden;
  for (int64_t c = seen.end > columns.begin ? seen.end : columns.begin; c < columns.end; c++) s[c] = hidden;
}

// lanes of a and b by turns: the first half of both, or the second
template <bool High>
SEQFUSE_INLINE vf interleave(vf a, vf b) {
#if SEQFUSE_VBYTES == 64
  if (High) return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif SEQFUSE_VBYTES == 32
  if (High) return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  if (High) return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

// VL rows of VL elements, transposed in registers by log2(VL) perfect shuffles
SEQFUSE_INLINE void transpose(vf (&x)[VL]) {
  vf y[VL];
#pragma GCC unroll 4
  for (int n = 1; n < VL; n *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < VL / 2; i++) {
      y[2 * i] = interleave<false>(x[i], x[i + VL / 2]);
      y[2 * i + 1] = interleave<true>(x[i], x[i + VL / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) x[i] = y[i];
  }
}

// One row of scores becomes weights; `out` is its row of results so far, n long.
SEQFUSE_INLINE void softmax_row(float* __restrict s, Range c, float factor, float& m, float& l, float* __restrict out,
                                int64_t n) {
  vf top0 = splat(-__builtin_inff()), top1 = top0;
  for (int64_t j = c.begin; j < c.end; j += 2 * VL) top0 = max(top0, load(s + j)), top1 = max(top1, load(s + j + VL));
  const float block_top = largest(max(top0, top1)) * factor;
  const float next = block_top > m ? block_top : m;
  if (next == -__builtin_inff()) {  // nothing seen so far, unless a score is NaN
    for (int64_t j = c.begin; j < c.end; j += VL) store(s + j, select(load(s + j) == load(s + j), vf{}, load(s + j)));
    return;
  }
  const vf f = splat(factor), shift = splat(next);
  vf sum0{}, sum1{};
  for (int64_t j = c.begin; j < c.end; j += 2 * VL) {
    const vf a = exp2(load(s + j) * f - shift), b = exp2(load(s + j + VL) * f - shift);
    store(s + j, a), store(s + j + VL, b);
    sum0 += a, sum1 += b;
  }
  const float shrink = m == next ? 1.0f : exp2(m - next);
  l = l * shrink + sum(sum0 + sum1);
  m = next;
  if (shrink != 1.0f)
    for (int64_t j = 0; j < n; j += VL) store(out + j, load(out + j) * shrink);
}

// n elements of a row as floats, and zeros up to `padded`
template <class T>
SEQFUSE_INLINE void copy_row(const T* p, int64_t n, int64_t padded, float* out) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(out + i, load(p + i));
  for (; i < n; i++) out[i] = widen(p[i]);
  for (; i < padded; i++) out[i] = 0.0f;
}
template <class T>
SEQFUSE_INLINE void write_row(const float* p, int64_t n, float factor, T* out) {
  for_vectors(0, n, [=](int64_t i, int m) { give(out + i, take(p + i, m) * factor, m); });
}

// VL words along a row of T, as their bits, and one of them; what lies beyond the row's n elements is zero.
template <class W, class T>
SEQFUSE_INLINE vf words_along(const T* p) {
  if constexpr (W::per_word == 1)
    return load(p);
  else
    return (vf) * (const vu_any*)p;
}
template <class W, class T>
SEQFUSE_INLINE typename W::Word word_along(const T* row, int64_t word, int64_t n) {
  if constexpr (W::per_word == 1) {
    return widen(row[word]);
  } else {
    const uint32_t high = 2 * word + 1 < n ? row[2 * word + 1].bits : 0;
    return row[2 * word].bits | high << 16;
  }
}

// Words of two bf16, rounded: `low` of their lower halves, `high` of the others.
SEQFUSE_INLINE vu rounded_pairs(vf low, vf high) {
#if defined(__AVX512BF16__)
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return as_bits(rounded<bf16>(low)) >> 16 | as_bits(rounded<bf16>(high));
#endif
}
// Two vectors of a row as words along it.
SEQFUSE_INLINE void store_along(Pairs::Word* out, vf a, vf b) {
  bf16* to = reinterpret_cast<bf16*>(out);
#if defined(__AVX512BF16__)
  *(vu_any*)to = (vu)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
  store(to, a), store(to + VL, b);
#endif
}

// As softmax_row, for `rows` <= VL rows of scores, `ld` apart, each with its own columns(r). Their running maxima m are
// a vector; each row's sum l is one too, whose lanes are added in the end. Weights are multiplied by kept(r), unless
// that is null, and become words along their row, in place: word n lies where float n lay.
template <class W, class Columns, class Kept>
SEQFUSE_INLINE void softmax_rows(float* __restrict s, int64_t ld, int64_t rows, Columns columns, float factor,
                                 float* __restrict m, float* __restrict l, float* __restrict out, int64_t ldo,
                                 int64_t n, Kept kept) {
  vf tops[VL];
  for (int r = 0; r < VL; r++) {
    vf top0 = splat(-__builtin_inff()), top1 = top0;
    if (r < rows) {
      const Range c = columns(r);
      const float* row = s + r * ld;
      for (int64_t j = c.begin; j < c.end; j += 2 * VL)
        top0 = max(top0, load(row + j)), top1 = max(top1, load(row + j + VL));
    }
    tops[r] = max(top0, top1);
  }
  transpose(tops);
#pragma GCC unroll 8
  for (int half = VL / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int r = 0; r < half; r++) tops[r] = max(tops[r], tops[r + half]);
  const vf before = load(m), now = max(before, tops[0] * factor);
  const vf shift = select(now == splat(-__builtin_inff()), vf{}, now);  // nothing seen so far: weights are 0
  const vf shrink = select(before == now, splat(1.0f), exp2(before - shift));
  store(m, now);
  float shifts[VL], shrinks[VL];
  store(shifts, shift), store(shrinks, shrink);
  for (int64_t r = 0; r < rows; r++) {
    const Range c = columns(r);
    const float *keep = kept(r), less = shrinks[r];
    float* row = s + r * ld;
    const vf f = splat(factor), from = splat(shifts[r]);
    vf sum0{}, sum1{};
    for (int64_t j = c.begin; j < c.end; j += 2 * VL) {
      vf a = exp2(load(row + j) * f - from), b = exp2(load(row + j + VL) * f - from);
      sum0 += a, sum1 += b;
      if (keep) a *= load(keep + j - c.begin), b *= load(keep + j - c.begin + VL);
      if constexpr (W::per_word == 2)
        store_along(reinterpret_cast<Pairs::Word*>(row) + j / 2, a, b);
      else
        store(row + j, a), store(row + j + VL, b);
    }
    store(l + r * VL, load(l + r * VL) * less + (sum0 + sum1));
    if (less != 1.0f)
      for (int64_t j = 0; j < n; j += VL) store(out + r * ldo + j, load(out + r * ldo + j) * less);
  }
}

// A block of up to block_keys rows of D elements, transposed to panels of words [D][tile_columns]; rows that the last
// panel lacks become zero.
template <class W, class T>
void pack_transposed(const T* p, int64_t row, int64_t rows, int64_t D, typename W::Word* out) {
  const int64_t all = depth<W>(D), whole = D / W::per_word;
  for (int64_t r = 0; r < round_up(rows, tile_columns); r += VL) {
    auto* panel = out + r / tile_columns * all * tile_columns + r % tile_columns;
    const int n = int(clamp(rows - r, 0, VL));
    int64_t d = 0;
    for (; d + VL <= whole; d += VL) {
      vf x[VL];
#pragma GCC unroll 16
      for (int l = 0; l < VL; l++) x[l] = l < n ? words_along<W>(p + (r + l) * row + d * W::per_word) : vf{};
      transpose(x);
#pragma GCC unroll 16
      for (int l = 0; l < VL; l++) store(reinterpret_cast<float*>(panel + (d + l) * tile_columns), x[l]);
    }
    for (; d < all; d++)
      for (int l = 0; l < VL; l++)
        panel[d * tile_columns + l] = l < n && d < words<W>(D) ? word_along<W>(p + (r + l) * row, d, D) : 0;
  }
}

// The same block with words along its rows, `leading(words)` apart, for products that read it along them.
template <class W, class T>
void pack_along(const T* p, int64_t row, int64_t rows, int64_t capacity, int64_t D, typename W::Word* out) {
  const int64_t ld = leading(words<W>(D)), padded = round_up(words<W>(D), tile_columns);
  for (int64_t r = 0; r < capacity; r++) {
    auto* to = out + r * ld;
    if constexpr (W::per_word == 1) {
      if (r < rows) {
        copy_row(p + r * row, D, padded, to);
        continue;
      }
    }
    memset(to, 0, sizeof(*to) * size_t(padded));
    if (W::per_word == 2 && r < rows) memcpy(to, p + r * row, sizeof(T) * size_t(D));
  }
}

// The same block, row by row as it lies, but with words across the rows: of pairs, row n holds rows 2n and 2n + 1.
template <class W, class T>
void pack_rows(const T* p, int64_t row, int64_t rows, int64_t capacity, int64_t D, typename W::Word* out) {
  if constexpr (W::per_word == 1) return pack_along<W>(p, row, rows, capacity, D, out);
  const int64_t ld = leading(D), padded = round_up(D, tile_columns);
  for (int64_t r = 0; r < capacity; r += 2) {
    auto* to = reinterpret_cast<float*>(out + r / 2 * ld);
    const T *low = p + r * row, *high = r + 1 < rows ? low + row : nullptr;
    memset(to, 0, sizeof(float) * size_t(padded));
    if (r >= rows) continue;
    for_vectors(0, D, [=](int64_t i, int n) {
      const vf x = take(low + i, n), y = high ? take(high + i, n) : vf{};
      store(to + i, as_float(as_bits(x) >> 16 | as_bits(y)));
    });
  }
}

// The rows of pack_rows, transposed: row d of out, ldo words long, holds element d of all rows, two in a word.
template <class T>
void pack_across(const T* p, int64_t row, int64_t rows, int64_t capacity, int64_t D, Pairs::Word* out, int64_t ldo) {
  for (int64_t r = 0; r < capacity; r += 2 * VL)
    for (int64_t d = 0; d < D; d += VL) {
      const int n = int(clamp(D - d, 0, VL));
      vf x[VL];
      for (int l = 0; l < VL; l++) {
        const int64_t at = r + 2 * l;
        const vf low = at < rows ? take(p + at * row + d, n) : vf{};
        const vf high = at + 1 < rows ? take(p + (at + 1) * row + d, n) : vf{};
        x[l] = as_float(as_bits(low) >> 16 | as_bits(high));
      }
      transpose(x);
      for (int l = 0; l < VL; l++) store(reinterpret_cast<float*>(out + (d + l) * ldo + r / 2), x[l]);
    }
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
