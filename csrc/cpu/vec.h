// One vector type, as wide as the instruction set this file is compiled for, and what kernels need of it.
// Every kernel in this folder is compiled once for each level; SEQFUSE_ISA names the level's namespace.
// GCC and Clang vector extensions keep the kernels free of intrinsics, on x86 and elsewhere alike.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "seqfuse/types.h"

#if defined(SEQFUSE_VBYTES)  // a test's
#elif defined(__AVX512F__)
#include <immintrin.h>
#define SEQFUSE_VBYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define SEQFUSE_VBYTES 32
#else
#define SEQFUSE_VBYTES 16
#endif

#ifndef SEQFUSE_ISA
#define SEQFUSE_ISA baseline
#endif

#define SEQFUSE_INLINE inline __attribute__((always_inline))

namespace seqfuse {
namespace SEQFUSE_ISA {

constexpr int VL = SEQFUSE_VBYTES / 4;  // floats in a vector

typedef float vf __attribute__((vector_size(SEQFUSE_VBYTES)));
typedef int32_t vi __attribute__((vector_size(SEQFUSE_VBYTES)));
typedef uint32_t vu __attribute__((vector_size(SEQFUSE_VBYTES)));
typedef uint16_t vh __attribute__((vector_size(SEQFUSE_VBYTES / 2)));
typedef float vf_any __attribute__((vector_size(SEQFUSE_VBYTES), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(SEQFUSE_VBYTES / 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

SEQFUSE_INLINE vf splat(float x) {
  return x - vf{};
}
SEQFUSE_INLINE vf as_float(vu x) {
  return (vf)x;
}
SEQFUSE_INLINE vu as_bits(vf x) {
  return (vu)x;
}
SEQFUSE_INLINE vf select(vi mask, vf a, vf b) {
  return mask ? a : b;
}
SEQFUSE_INLINE vf min(vf a, vf b) {
  return select(b < a, b, a);
}  // keeps a NaN in a
SEQFUSE_INLINE vf max(vf a, vf b) {
  return select(b > a, b, a);
}

// x as a value of its own: the compiler may not fuse the product that made it into a later addition, so that what is
// subtracted from itself is zero
SEQFUSE_INLINE vf unfused(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

SEQFUSE_INLINE float widen(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
SEQFUSE_INLINE float widen(float x) {
  return x;
}

SEQFUSE_INLINE bf16 narrow(float x) {  // round to nearest even; a NaN stays a NaN
  uint32_t u;
  memcpy(&u, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
SEQFUSE_INLINE void put(float* p, float x) {
  *p = x;
}
SEQFUSE_INLINE void put(bf16* p, float x) {
  *p = narrow(x);
}

SEQFUSE_INLINE vf load(const float* p) {
  return *(const vf_any*)p;
}
SEQFUSE_INLINE vf widen(vh x) {
#if defined(__AVX512F__)  // GCC 12 makes two halves of the conversion
  return as_float((vu)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)x) << 16);
#else
  return as_float(__builtin_convertvector(x, vu) << 16);
#endif
}
SEQFUSE_INLINE vf load(const bf16* p) {
  return widen((vh) * (const vh_any*)p);
}
SEQFUSE_INLINE void store(float* p, vf x) {
  *(vf_any*)p = x;
}
SEQFUSE_INLINE void store(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
  memcpy(p, &h, 32);
#else
  const vu u = as_bits(x);
  const vu r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  *(vh_any*)p = __builtin_convertvector((vi)(x != x) ? vu{} + 0x7fc0u : r, vh);
#endif
}

// the first n < VL lanes; the others read as `fill` and are not touched in memory
#if defined(__AVX512F__)
SEQFUSE_INLINE vf load_n(const float* p, int n, float fill = 0.0f) {
  return (vf)_mm512_mask_loadu_ps((__m512)splat(fill), __mmask16((1u << n) - 1u), p);
}
SEQFUSE_INLINE vf load_n(const bf16* p, int n, float fill = 0.0f) {
  const __mmask16 m = __mmask16((1u << n) - 1u);
  return (vf)_mm512_mask_mov_ps((__m512)splat(fill), m, (__m512)widen((vh)_mm256_maskz_loadu_epi16(m, p)));
}
SEQFUSE_INLINE void store_n(float* p, vf x, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), (__m512)x);
}
SEQFUSE_INLINE void store_n(bf16* p, vf x, int n) {
  uint16_t t[VL];
  store((bf16*)t, x);
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1u), _mm256_loadu_si256((const __m256i*)t));
}
#else
// not inlined: a tail is seldom, its code is long, and every place that reads or writes n elements has one
template <class T>
__attribute__((noinline)) static vf load_n(const T* p, int n, float fill = 0.0f) {
  float t[VL];
  for (int i = 0; i < VL; i++) t[i] = i < n ? widen(p[i]) : fill;
  return load(t);
}
template <class T>
__attribute__((noinline)) static void store_n(T* p, vf x, int n) {
  T t[VL];
  store(t, x);
  for (int i = 0; i < VL && i < n; i++) p[i] = t[i];
}
#endif

// n elements, where n is VL in the loop over whole vectors and less in its tail
template <class T>
SEQFUSE_INLINE vf take(const T* p, int n, float fill = 0.0f) {
  return n == VL ? load(p) : load_n(p, n, fill);
}
template <class T>
SEQFUSE_INLINE void give(T* p, vf x, int n) {
  n == VL ? store(p, x) : store_n(p, x, n);
}

// f(i, n) for the n elements from i on, over [begin, N). Lambdas capture by value, so that the compiler keeps what they
// hold in registers: a store through a vector pointer might otherwise change it.
template <class F>
SEQFUSE_INLINE void for_vectors(int64_t begin, int64_t N, F f) {
  int64_t i = begin;
  for (; i + VL <= N; i += VL) f(i, VL);
  if (i < N) f(i, int(N - i));
}

// x as it reads back after a store as T
template <class T>
SEQFUSE_INLINE vf rounded(vf x) {
  if constexpr (sizeof(T) == 4) return x;
  T t[VL];
  store(t, x);
  return load(t);
}

// Whether this level multiplies pairs of neighbouring bf16 (AVX512-BF16; where it is emulated, tests run its code
// paths)
#if defined(__AVX512BF16__) || defined(SEQFUSE_EMULATE_DOTS)
constexpr bool has_dot = true;
#else
constexpr bool has_dot = false;
#endif
// sum + the products of two pairs in each lane; only where has_dot
SEQFUSE_INLINE vf add_dots(vf sum, vu a, vu b) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
  return sum + as_float(a << 16) * as_float(b << 16);
#endif
}

SEQFUSE_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 3);
}
SEQFUSE_INLINE void prefetch_to_write(const void* p) {
  __builtin_prefetch(p, 1, 3);
}

SEQFUSE_INLINE float sum(vf x) {  // by halves: the order of additions is fixed
#if SEQFUSE_VBYTES == 64
  const auto y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const auto y = x;
#endif
#if SEQFUSE_VBYTES >= 32
  const auto z = __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
#else
  const auto z = y;
#endif
  return (z[0] + z[2]) + (z[1] + z[3]);
}

SEQFUSE_INLINE float largest(vf x) {
  float m = x[0];
  for (int l = 1; l < VL; l++) m = x[l] > m ? x[l] : m;
  return m;
}

// e^x = 2^n * (1 + rest), for x from -87.3 to 88.3: range reduction to |r| <= ln2 / 2 and a degree-6 polynomial.
struct Power {
  vf n, rest;
};
SEQFUSE_INLINE Power power(vf x) {
#if defined(__AVX512F__)
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), 0);
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * 1.44269504088896341f + magic) - magic;
#endif
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {n, p * r * r + r};
}

// 2^n of an integer n from -126 to 127
SEQFUSE_INLINE vf power_of_two(vf n) {
  return as_float((vu)((__builtin_convertvector(n, vi) + 127) << 23));
}

SEQFUSE_INLINE vf clamp(vf x, float low, float high) {
#if defined(__AVX512F__)  // these two return their second operand if either is a NaN
  return (vf)_mm512_min_ps((__m512)splat(high), _mm512_max_ps((__m512)splat(low), (__m512)x));
#else
  return min(max(x, splat(low)), splat(high));
#endif
}

// About 1 ulp. Saturates instead of overflowing to a trap value: 0 below -87.3, inf is never reached (88.3 is the
// largest argument).
SEQFUSE_INLINE vf exp(vf x) {
  const Power p = power(clamp(x, -87.3f, 88.3f));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)(p.rest + 1.0f), (__m512)p.n);
#else
  return (p.rest + 1.0f) * power_of_two(p.n);
#endif
}

// 1 / x for x from 1 on. AVX-512: an estimate of 14 bits and one step of Newton's method, 1 ulp, where a division of 16
// floats keeps its port busy for 16 cycles.
SEQFUSE_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  x = (vf)_mm512_min_ps((__m512)splat(0x1p126f), (__m512)x);  // of inf the step would make a NaN
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}

SEQFUSE_INLINE vf sigmoid(vf x) {
  return reciprocal(1.0f + exp(-x));
}

// With e = exp(2|x|) - 1: e / (e + 2), in which nothing cancels near zero, or 1 - 2 / (e + 2), whose error near 1 is
// that of a small number: gradients are products with 1 - tanh^2. Beyond 9.02 it is 1.
SEQFUSE_INLINE vf tanh(vf x) {
  const vf a = as_float(as_bits(x) & 0x7fffffffu);
  const Power p = power(clamp(2.0f * a, 0.0f, 18.04f));
  const vf scale = power_of_two(p.n);
  const vf e = scale * p.rest + (scale - 1.0f);
  const vf r = reciprocal(e + 2.0f);
  const vf y = select(a < splat(0.625f), e * r, 1.0f - 2.0f * r);
  return as_float(as_bits(y) | (as_bits(x) & 0x80000000u));
}

struct Sigmoid {
  vf s, rest;  // and 1 - s
};

// The same to 2^-11 or better, for a third of the work: for results that are rounded to bf16 and lead nowhere else.
// e^x = 2^y = 2^floor(y) 2^f, with a polynomial of degree 3 for f from 0 to 1 (relative error 7.5e-5).
struct ShortMath {
  static SEQFUSE_INLINE vf exp(vf x) {
#if defined(__AVX512F__)
    const vf y = x * 1.44269504088896341f, f = (vf)_mm512_reduce_ps((__m512)y, 0x09);  // y - floor(y); 0 of inf
#else
    const vf y = clamp(x, -87.3f, 88.0f) * 1.44269504088896341f, magic = splat(12582912.0f);
    const vf n = (y - 0.5f + magic) - magic, f = y - n;
#endif
    vf p = splat(0.07802452f);
    p = p * f + 0.22606718f;
    p = p * f + 0.69583352f;
    p = p * f + 0.99992522f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)y);
#else
    return p * power_of_two(n);
#endif
  }
  // 1 / x for x from 1 on
  static SEQFUSE_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX__)
    return (vf)_mm256_rcp_ps((__m256)x);
#else
    return 1.0f / x;
#endif
  }
  static SEQFUSE_INLINE Sigmoid sigmoid_and_rest(vf x) {
    vf e = exp(-x);
    const vf s = reciprocal(1.0f + e);
#if defined(__AVX512F__)
    e = (vf)_mm512_min_ps((__m512)splat(0x1p126f), (__m512)e);  // inf * 0 would be a NaN
#endif
    return {s, e * s};  // 1 - s would be of few digits where s is near 1
  }
};

// the M of common/gates.h
struct VecMath {
  static SEQFUSE_INLINE vf exp(vf x) { return SEQFUSE_ISA::exp(x); }
  static SEQFUSE_INLINE vf sigmoid(vf x) { return SEQFUSE_ISA::sigmoid(x); }
  static SEQFUSE_INLINE Sigmoid sigmoid_and_rest(vf x) {
    const vf s = sigmoid(x);
    return {s, 1.0f - s};
  }
  static SEQFUSE_INLINE vf tanh(vf x) { return SEQFUSE_ISA::tanh(x); }
  static SEQFUSE_INLINE vf relu(vf x) { return select(x < splat(0.0f), splat(0.0f), x); }
  static SEQFUSE_INLINE vf step(vf x) { return select(x > splat(0.0f), splat(1.0f), splat(0.0f)); }
};

// of results that are rounded to T and lead nowhere else
template <class T>
using MathFor = std::conditional_t<sizeof(T) == 2, ShortMath, VecMath>;

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
