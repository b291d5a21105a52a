// Rotary position embedding on the CPU. Contract: seqfuse/rope.h
//
// x is read once and y written once; in place that is all the memory there is. The tables' rows stay in the caches: all
// heads of a time step are turned one after another.
#include "seqfuse/rope.h"

#include "cpu/deal.h"
#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

template <class T>
SEQFUSE_INLINE void turn_halves(const T* x, T* y, const float* c, const float* s, float sign, int64_t half) {
  for_vectors(0, half, [=](int64_t i, int n) {
    const vf a = take(x + i, n), b = take(x + half + i, n), co = take(c + i, n), si = take(s + i, n) * sign;
    give(y + i, a * co - b * si, n);
    give(y + half + i, b * co + a * si, n);
  });
}

template <class T>
SEQFUSE_INLINE void turn_neighbours(const T* x, T* y, const float* c, const float* s, float sign, int64_t half) {
  for_vectors(0, half, [=](int64_t i, int n) {
    float even[VL] = {}, odd[VL] = {};
    for (int k = 0; k < VL && k < n; k++) even[k] = widen(x[2 * (i + k)]), odd[k] = widen(x[2 * (i + k) + 1]);
    const vf a = load(even), b = load(odd), co = take(c + i, n), si = take(s + i, n) * sign;
    store(even, a * co - b * si), store(odd, b * co + a * si);
    for (int k = 0; k < VL && k < n; k++) put(y + 2 * (i + k), even[k]), put(y + 2 * (i + k) + 1, odd[k]);
  });
}

template <class T>
void turn(const Rope& a, const Parallel& parallel) {
  const float sign = a.inverse ? -1.0f : 1.0f;
  const size_t rest = sizeof(T) * size_t(a.dim - 2 * a.half);
  // all heads of one time step are one piece of work
  deal_rows(parallel, a.batch * a.time, a.heads * a.dim, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t b = r / a.time, t = r % a.time;
      const int64_t place = a.positions ? a.positions[b * a.position_step + t] : a.offset + t;
      const float *c = a.cos + place * a.half, *s = a.sin + place * a.half;
      for (int64_t h = 0; h < a.heads; h++) {
        const T* x = static_cast<const T*>(a.x) + b * a.batch_step + h * a.head_step + t * a.time_step;
        T* y = static_cast<T*>(a.y) + b * a.y_batch_step + h * a.y_head_step + t * a.y_time_step;
        a.interleaved ? turn_neighbours(x, y, c, s, sign, a.half) : turn_halves(x, y, c, s, sign, a.half);
        if (rest && y != x) memcpy(y + 2 * a.half, x + 2 * a.half, rest);
      }
    }
  });
}

}  // namespace

void rope(const Rope& a, const Parallel& p) {
  a.dtype == DType::f32 ? turn<float>(a, p) : turn<bf16>(a, p);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
