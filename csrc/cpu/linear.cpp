// y = x weight^T + bias on the CPU, for few rows of x above all. Contract: seqfuse/linear.h
//
// Up to 8 rows (Linear). Floor: one read of the weights. A tile of outputs takes its rows of the weights as so many
// streams, each vector of them once for all rows of x, which lie in the caches: converted and padded to whole vectors
// before the threads begin. Sums run along the columns in the lanes and are put together at the end. Each line fetches
// the same one of the next tile into the second-level cache: a hardware prefetcher begins anew at every row (26 to 35
// GB/s with two threads).
//
// More rows (Product). Floor: the multiplications. The lanes are rows of x, which are turned once a call, so that each
// number of the weights is one broadcast for one or two vectors of rows and nothing is added up across lanes.
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

// Outputs of a tile that has V vectors of rows: the sums, the rows and one number of the weights fit the registers.
constexpr int wide_outputs_for(int vectors) {
#if defined(__AVX512F__)
  return vectors == 2 ? 12 : 24;
#else
  return vectors == 2 ? 6 : 12;
#endif
}

constexpr int64_t block_terms = 128;  // each summed up by itself: rounding grows with their number

template <class T>
struct Product {
  const LinearForward& a;
  const int64_t padded;  // rows up to a whole vector
  const float* x;        // [cols, padded]

  // N outputs from `first` on, whose weights begin at w and lie `step` apart, for V vectors of rows from `row` on.
  // Every third row of the weights has a pointer: one for each would not fit the processor's registers.
  template <int V, int N>
  SEQFUSE_INLINE void tile(int64_t first, int64_t row, const float* w, int64_t step, int64_t ahead) const {
    constexpr int G = N % 3 == 0 ? 3 : 1, P = N / G;
    const float* at[P];
    vf sums[N][V];
    float out[N][V * VL] = {}, bias[N];
#pragma GCC unroll 24
    for (int p = 0; p < P; p++) at[p] = w + p * G * step;
    const float* from = x + row;
    for (int64_t block = 0; block < a.cols; block += block_terms) {
      const int64_t last = block + block_terms < a.cols ? block + block_terms : a.cols;
#pragma GCC unroll 24
      for (int n = 0; n < N; n++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sums[n][v] = vf{};
      for (int64_t line = block; line < last; line += VL) {
        if (ahead)
#pragma GCC unroll 24
          for (int n = 0; n < N; n++) __builtin_prefetch(at[n / G] + n % G * step + ahead, 0, 2);
        const int64_t end = line + VL < last ? line + VL : last;
        for (int64_t k = line; k < end; k++, from += padded) {
          vf rows[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) rows[v] = load(from + v * VL);
#pragma GCC unroll 24
          for (int p = 0; p < P; p++) {
#pragma GCC unroll 3
            for (int g = 0; g < G; g++) {
              const vf one = splat(at[p][g * step]);
#pragma GCC unroll 2
              for (int v = 0; v < V; v++) sums[p * G + g][v] = sums[p * G + g][v] + one * rows[v];
            }
            at[p]++;
            asm("" : "+r"(at[p]));  // the compiler would make it a pointer for each row again
          }
        }
      }
#pragma GCC unroll 24
      for (int n = 0; n < N; n++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) store(out[n] + v * VL, load(out[n] + v * VL) + sums[n][v]);
    }
    for (int n = 0; n < N; n++) bias[n] = a.bias ? widen(static_cast<const T*>(a.bias)[first + n]) : 0.0f;
    for (int r = 0; r < V * VL && row + r < a.rows; r++)
      for (int n = 0; n < N; n++) put(static_cast<T*>(a.y) + (row + r) * a.outputs + first + n, out[n][r] + bias[n]);
  }

  template <int V, int N>
  SEQFUSE_INLINE void outputs(int64_t first, float* wide) const {
    const T* const stored = static_cast<const T*>(a.weight) + first * a.weight_step;
    const float* w = wide;
    int64_t step = a.cols, ahead = 0;
    if constexpr (sizeof(T) == sizeof(float))
      w = stored, step = a.weight_step, ahead = N * step;  // the next tile is asked for with the first rows
    else
      for (int n = 0; n < N; n++) {
        const T* const from = stored + n * a.weight_step;
        float* const to = wide + n * a.cols;
        for_vectors(0, a.cols, [=](int64_t i, int m) { give(to + i, take(from + i, m), m); });
      }
    int64_t row = 0;
    for (; row + V * VL <= padded; row += V * VL, ahead = 0) tile<V, N>(first, row, w, step, ahead);
    if (row < padded) tile<1, N>(first, row, w, step, ahead);
  }

  template <int V>
  void run(const Parallel& parallel) const {
    constexpr int N = wide_outputs_for(V);
    deal_rows(parallel, ceil_div(a.outputs, N), N * a.cols * 4, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      float* wide = nullptr;
      const int64_t space = sizeof(T) == sizeof(float) ? 0 : N * a.cols;
      scratch.take(wide, space), scratch.allocate(), scratch.take(wide, space);
      const int64_t last = end * N < a.outputs ? end * N : a.outputs;
      int64_t n = begin * N;
      for (; n + N <= last; n += N) outputs<V, N>(n, wide);
      for (; n < last; n++) outputs<V, 1>(n, wide);
    });
  }
};

template <class T>
void product(const LinearForward& a, const Parallel& parallel) {
  const int64_t padded = ceil_div(a.rows, VL) * VL;
  float* x = nullptr;
  Scratch scratch;
  scratch.take(x, a.cols * padded), scratch.allocate(), scratch.take(x, a.cols * padded);
  deal_rows(parallel, a.cols, padded, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k++)
      for (int64_t r = 0; r < padded; r++)
        x[k * padded + r] = r < a.rows ? widen(static_cast<const T*>(a.x)[r * a.cols + k]) : 0.0f;
  });
  const Product<T> all{a, padded, x};
  padded > VL ? all.template run<2>(parallel) : all.template run<1>(parallel);
}

template <class T>
void forward(const LinearForward& a, const Parallel& parallel) {
  if (a.rows > linear_few_rows) return product<T>(a, parallel);
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
  for (int64_t row = 0; row < a.rows; row += linear_block_rows) {
    LinearForward block = a;
    block.rows = a.rows - row < linear_block_rows ? a.rows - row : linear_block_rows;
    block.x = static_cast<const char*>(a.x) + row * a.cols * size_of(a.dtype);
    block.y = static_cast<char*>(a.y) + row * a.outputs * size_of(a.dtype);
    if (a.dtype == DType::bf16)
      forward<bf16>(block, p);
    else if constexpr (!has_dot)  // see dispatch.cpp
      forward<float>(block, p);
  }
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
