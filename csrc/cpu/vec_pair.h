// Two vectors at a time, for kernels that stream over rows of float or bf16.
//
// A pair holds 2 * VL neighbouring elements. Of float they are the first VL and the next VL; of bf16 the even ones and
// the odd ones, because a 32-bit word with two bf16 in it then widens by one shift and one mask, and two vectors narrow
// back without moving anything between lanes. Sums over a row don't care; whatever is combined with a row element by
// element (weights, sums over rows) is kept in the same order, see Paired.
#pragma once
#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

constexpr int PL = 2 * VL;  // elements of a pair

typedef uint32_t vu_any __attribute__((vector_size(SEQFUSE_VBYTES), aligned(4), may_alias));

struct vp {
  vf a, b;
};

SEQFUSE_INLINE vp operator+(vp x, vp y) {
  return {x.a + y.a, x.b + y.b};
}
SEQFUSE_INLINE vp operator-(vp x, vp y) {
  return {x.a - y.a, x.b - y.b};
}
SEQFUSE_INLINE vp operator*(vp x, vp y) {
  return {x.a * y.a, x.b * y.b};
}
SEQFUSE_INLINE vp operator-(vp x, vf y) {
  return {x.a - y, x.b - y};
}
SEQFUSE_INLINE vp operator*(vp x, vf y) {
  return {x.a * y, x.b * y};
}
SEQFUSE_INLINE vp unfused(vp x) {
  return {unfused(x.a), unfused(x.b)};
}
SEQFUSE_INLINE float sum(vp x) {
  return sum(x.a + x.b);
}

SEQFUSE_INLINE vp load_pair(const float* p) {
  return {load(p), load(p + VL)};
}
SEQFUSE_INLINE vp load_pair(const bf16* p) {
  const vu words = (vu) * (const vu_any*)p;
  return {as_float(words << 16), as_float(words & 0xffff0000u)};
}

// Two vectors as bf16 words. A NaN must have zeros in its lower half, as every NaN has that came from a bf16 or from
// arithmetic: then rounding can't carry it into an infinity, and needs no second look.
SEQFUSE_INLINE vu narrow_pair(vp x) {
#if defined(__AVX512BF16__)
  const vu halves = (vu)_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a);
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vu)_mm512_permutexvar_epi16(*(const __m512i*)order, (__m512i)halves);
#else
  const vu a = as_bits(x.a), b = as_bits(x.b);
  return (a + 0x7fffu + ((a >> 16) & 1u)) >> 16 | ((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u);
#endif
}

SEQFUSE_INLINE void store_pair(float* p, vp x) {
  store(p, x.a), store(p + VL, x.b);
}
SEQFUSE_INLINE void store_pair(bf16* p, vp x) {
  *(vu_any*)p = narrow_pair(x);
}

// what rounded<bf16> returned: nothing is left to round
SEQFUSE_INLINE void store_rounded_pair(bf16* p, vp x) {
  *(vu_any*)p = as_bits(x.a) >> 16 | as_bits(x.b);
}
SEQFUSE_INLINE void store_rounded_pair(float* p, vp x) {
  store_pair(p, x);
}

// x as it reads back after store_pair
template <class T>
SEQFUSE_INLINE vp rounded(vp x) {
  if constexpr (sizeof(T) == 4) return x;
  const vu words = narrow_pair(x);
  return {as_float(words << 16), as_float(words & 0xffff0000u)};
}

// Past the caches, straight to memory: for results too large to be found there again. p is aligned to a vector, and
// fence_streams() comes before anybody else may read.
SEQFUSE_INLINE void stream(void* p, vu x) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)x);
#elif defined(__SSE2__)
  __builtin_ia32_movntdq((long long __attribute__((vector_size(16)))*)p, (long long __attribute__((vector_size(16))))x);
#else
  memcpy(p, &x, sizeof(x));
#endif
}
SEQFUSE_INLINE void stream_pair(float* p, vp x) {
  stream(p, as_bits(x.a)), stream(p + VL, as_bits(x.b));
}
SEQFUSE_INLINE void stream_pair(bf16* p, vp x) {
  stream(p, narrow_pair(x));
}
SEQFUSE_INLINE void fence_streams() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}
SEQFUSE_INLINE bool can_stream(const void* p, int64_t row_bytes) {
  return uintptr_t(p) % SEQFUSE_VBYTES == 0 && row_bytes % SEQFUSE_VBYTES == 0;
}

// Whether a result goes past the caches: where a call's `tensors` [rows, cols] together would not stay there anyway, so
// that fetching lines only to overwrite them, and driving out what is still wanted, is for nothing.
template <class T>
bool streams(const void* out, int tensors, int64_t rows, int64_t cols) {
  const int64_t row = cols * int64_t(sizeof(T));
  return tensors * rows * row > cached_bytes() && can_stream(out, row);
}

// n elements, fewer than PL at a row's end; the others read as zero and are not touched in memory.
template <class T>
SEQFUSE_INLINE vp take_pair(const T* p, int n) {
  if (n == PL) return load_pair(p);
  T t[PL] = {};
  for (int i = 0; i < PL && i < n; i++) t[i] = p[i];
  return load_pair(t);
}
// Floats that lie in memory as their row does, in the order of a pair of T.
template <class T>
SEQFUSE_INLINE vp pair_in_order(vp row) {
  const vf x = row.a, y = row.b;
  if constexpr (sizeof(T) == 4) return {x, y};
#if SEQFUSE_VBYTES == 64
  return {__builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
#elif SEQFUSE_VBYTES == 32
  return {__builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14),
          __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15)};
#else
  return {__builtin_shufflevector(x, y, 0, 2, 4, 6), __builtin_shufflevector(x, y, 1, 3, 5, 7)};
#endif
}
template <class T>
SEQFUSE_INLINE vp pair_in_order(const float* row) {
  return pair_in_order<T>(load_pair(row));
}
// the even and the odd elements as they lie in memory
SEQFUSE_INLINE vp out_of_order(vp x) {
#if SEQFUSE_VBYTES == 64
  return {__builtin_shufflevector(x.a, x.b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
          __builtin_shufflevector(x.a, x.b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
#elif SEQFUSE_VBYTES == 32
  return {__builtin_shufflevector(x.a, x.b, 0, 8, 1, 9, 2, 10, 3, 11),
          __builtin_shufflevector(x.a, x.b, 4, 12, 5, 13, 6, 14, 7, 15)};
#else
  return {__builtin_shufflevector(x.a, x.b, 0, 4, 1, 5), __builtin_shufflevector(x.a, x.b, 2, 6, 3, 7)};
#endif
}
// x where an element exists, 0 where take_pair made one up
template <class T>
SEQFUSE_INLINE vp existing(vp x, int n) {
  if (n == PL) return x;
  T t[PL] = {};
  for (int i = 0; i < PL && i < n; i++) put(t + i, 1.0f);
  return x * load_pair(t);
}
template <bool Stream = false, class T>
SEQFUSE_INLINE void give_pair(T* p, vp x, int n) {
  if (n == PL) {
    if constexpr (Stream)
      stream_pair(p, x);
    else
      store_pair(p, x);
    return;
  }
  T t[PL];
  store_pair(t, x);
  for (int i = 0; i < PL && i < n; i++) p[i] = t[i];
}

// Asks for the lines of a pair: both, where it has two. The processor brings the second along only sometimes.
template <class T>
SEQFUSE_INLINE void prefetch_pair(const T* p) {
  prefetch(p);
  if constexpr (PL * sizeof(T) > 64) prefetch(p + VL);
}
template <class T>
SEQFUSE_INLINE void prefetch_pair_to_write(T* p) {
  prefetch_to_write(p);
  if constexpr (PL * sizeof(T) > 64) prefetch_to_write(p + VL);
}

template <class T>
SEQFUSE_INLINE void give_rounded_pair(T* p, vp x, int n) {
  n == PL ? store_rounded_pair(p, x) : give_pair(p, x, n);
}

// f(i, n) for the n elements from i on; n is PL in the loop over whole pairs and less in its tail (see for_vectors).
template <class F>
SEQFUSE_INLINE void for_pairs(int64_t N, F f) {
  int64_t i = 0;
  for (; i + PL <= N; i += PL) f(i, PL);
  if (i < N) f(i, int(N - i));
}

// Floats that meet a row of T element by element: stored in the order of T's pairs, padded to whole pairs.
template <class T>
struct Paired {
  static SEQFUSE_INLINE int64_t size(int64_t N) { return (N + PL - 1) / PL * PL; }
  // p + origin as floats; without p all `fill`. A NaN becomes the usual one (see narrow_pair).
  template <class P>
  static void read(const P* p, float* out, int64_t N, float fill, float origin) {
    for_pairs(N, [=](int64_t i, int n) {
      vp x{splat(fill), splat(fill)};
      if (p) x = in_order(p + i, n) + vp{splat(origin), splat(origin)};
      const vf nan = splat(__builtin_nanf(""));
      store_pair(out + i, vp{select(x.a != x.a, nan, x.a), select(x.b != x.b, nan, x.b)});
    });
  }
  template <class P>
  static void write(const float* in, P* p, int64_t N) {
    for_pairs(N, [=](int64_t i, int n) {
      if constexpr (sizeof(T) == sizeof(P))
        give_pair(p + i, load_pair(in + i), n);
      else
        give_pair(p + i, out_of_order(load_pair(in + i)), n);
    });
  }

 private:
  template <class P>
  static SEQFUSE_INLINE vp in_order(const P* p, int n) {
    const vp x = take_pair(p, n);
    if constexpr (sizeof(T) == sizeof(P)) return x;
    return pair_in_order<T>(x);
  }
};

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
