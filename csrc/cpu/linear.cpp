// y = x weight^T + bias on the CPU for up to 8 rows of x. Contract: seqfuse/linear.h
//
// Floor: one read of the weights. A tile of outputs takes its rows of the weights as so many streams, each vector of
// them once for all rows of x, which lie in the caches: converted and padded to whole vectors before the threads begin.
// Sums run along the columns in the lanes and are put together at the end. Each line fetches the same one of the next
// tile into the second-level cache: a hardware prefetcher begins anew at every row (26 to 35 GB/s with two threads).
#include "seqfuse/linear.h"

#include <type_traits>

#include "cpu/deal.h"
#include "cpu/scratch.h"
#include "cpu/vec_pair.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

// How weights of T meet x: `Operand` is what x is kept as, `step` the columns that one vector of weights covers.
template <class T>
struct Meet;

template <>
struct Meet<float> {
  using Operand = float;
  static constexpr int step = VL;
  static SEQFUSE_INLINE vf weights(const float* w) { return load(w); }
  static SEQFUSE_INLINE vf weights(const float* w, int n) { return load_n(w, n); }
  static SEQFUSE_INLINE vf multiply(vf sum, vf w, const float* x) { return sum + w * load(x); }
  static void prepare(const float* x, int64_t cols, float* out) { memcpy(out, x, sizeof(float) * size_t(cols)); }
};

struct Dots {
  using Operand = bf16;
  static constexpr int step = PL;
  static SEQFUSE_INLINE vu words(const bf16* p) { return (vu) * (const vu_any*)p; }
  static SEQFUSE_INLINE vu weights(const bf16* w) { return words(w); }
  static SEQFUSE_INLINE vu weights(const bf16* w, int n) {
    bf16 t[PL] = {};
    for (int i = 0; i < PL && i < n; i++) t[i] = w[i];
    return words(t);
  }
  static SEQFUSE_INLINE vf multiply(vf sum, vu w, const bf16* x) { return add_dots(sum, w, words(x)); }
  static void prepare(const bf16* x, int64_t cols, bf16* out) { memcpy(out, x, sizeof(bf16) * size_t(cols)); }
};

struct Widened {
  using Operand = float;  // in the order of pairs
  static constexpr int step = PL;
  static SEQFUSE_INLINE vp weights(const bf16* w) { return load_pair(w); }
  static SEQFUSE_INLINE vp weights(const bf16* w, int n) { return take_pair(w, n); }
  static SEQFUSE_INLINE vf multiply(vf sum, vp w, const float* x) { return sum + w.a * load(x) + w.b * load(x + VL); }
  static void prepare(const bf16* x, int64_t cols, float* out) { Paired<bf16>::read(x, out, cols, 0.0f, 0.0f); }
};

template <>
struct Meet<bf16> : std::conditional_t<has_dot, Dots, Widened> {};

// Outputs of a tile that has so many rows of x: the sums, a vector of x and the weights fit the registers.
constexpr int outputs_for(int rows) {
#if defined(__AVX512F__)
  return rows == 8 ? 3 : 4;
#else
  return rows == 8 ? 1 : rows == 4 ? 2 : 4;
#endif
}

template <class T>
struct Linear {
  using M = Meet<T>;
  using Operand = typename M::Operand;
  const LinearForward& a;
  const int64_t padded;
  const Operand* x;

  // N outputs from `first` on, for R rows of x; of the last ones there may be fewer than R
  template <int R, int N>
  SEQFUSE_INLINE void tile(int64_t first, int64_t rows) const {
    const T* w[N];
    const Operand* from[R];
    vf sums[N][R];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) w[n] = static_cast<const T*>(a.weight) + (first + n) * a.weight_step;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) from[r] = x + (r < rows ? r : rows - 1) * padded;
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[n][r] = vf{};
    auto one = [&](int64_t k, auto weights) __attribute__((always_inline)) {
      decltype(weights(0)) b[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) b[n] = weights(n);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sums[n][r] = M::multiply(sums[n][r], b[n], from[r] + k);
    };
    int64_t k = 0;
    for (; k + M::step <= a.cols; k += M::step)
      one(k, [&](int n) __attribute__((always_inline)) {
        __builtin_prefetch(w[n] + k + N * a.weight_step, 0, 2);
        return M::weights(w[n] + k);
      });
    if (k < a.cols) one(k, [&](int n) __attribute__((always_inline)) { return M::weights(w[n] + k, int(a.cols - k)); });
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const float bias = a.bias ? widen(static_cast<const T*>(a.bias)[first + n]) : 0.0f;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        if (r < rows) put(static_cast<T*>(a.y) + r * a.outputs + first + n, sum(sums[n][r]) + bias);
    }
  }

  template <int R>
  void run(const Parallel& parallel) const {
    constexpr int N = outputs_for(R);
    deal_rows(parallel, a.outputs, a.cols, [&](int64_t n, int64_t end) {
      for (; n + N <= end; n += N) tile<R, N>(n, a.rows);
      for (; n < end; n++) tile<R, 1>(n, a.rows);
    });
  }
};

template <class T>
void forward(const LinearForward& a, const Parallel& parallel) {
  using M = Meet<T>;
  const int64_t padded = ceil_div(a.cols, PL) * PL;
  typename M::Operand* x = nullptr;
  Scratch scratch;
  scratch.take(x, a.rows * padded), scratch.allocate(), scratch.take(x, a.rows * padded);
  for (int64_t r = 0; r < a.rows; r++) {
    memset(x + r * padded, 0, sizeof(*x) * size_t(padded));
    M::prepare(static_cast<const T*>(a.x) + r * a.cols, a.cols, x + r * padded);
  }
  const Linear<T> linear{a, padded, x};
  if (a.rows == 1) return linear.template run<1>(parallel);
  if (a.rows == 2) return linear.template run<2>(parallel);
  if (a.rows <= 4) return linear.template run<4>(parallel);
  linear.template run<8>(parallel);
}

}  // namespace

void linear_forward(const LinearForward& a, const Parallel& p) {
  if (a.dtype == DType::bf16) return forward<bf16>(a, p);
  if constexpr (!has_dot) forward<float>(a, p);  // see dispatch.cpp
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
