// layer_norm on the CPU. Contract: seqfuse/layer_norm.h
//
// Forward reads x (and the residual) once from memory and writes y (and the sum) once: a row stays in the first-level
// cache between its two passes, statistics and result. Backward reads dy and s once and writes dx once, likewise.
// Rows are dealt out in portions, to whichever worker is free: a thread that wakes late, or whose core is busy
// elsewhere, does less. dweight and dbias are summed per portion in fp32 and then added in order, and portions depend
// on the shape alone: a result depends neither on the number of threads nor on their timing.
#include "seqfuse/layer_norm.h"

#include <cmath>

#include "cpu/scratch.h"
#include "cpu/vec_pair.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

constexpr int64_t kGrain = 1 << 14;   // elements a worker should have, or waking it costs more than it saves
constexpr int64_t kCached = 8 << 20;  // bytes that a usual third-level cache keeps from one call to the next

int workers(int64_t rows, int64_t cols, int threads) {
  const int64_t useful = (rows * cols + kGrain - 1) / kGrain;
  int64_t n = threads < useful ? threads : useful;
  if (n > rows) n = rows;
  return n < 1 ? 1 : int(n);
}

// How rows are dealt out: enough portions to even out two uneven workers, few enough that their sums cost nothing.
struct Portions {
  int64_t rows, count, next = 0;
  Portions(int64_t rows, int64_t cols) : rows(rows), count(rows * cols / kGrain) {
    count = count < 1 ? 1 : count > 16 ? 16 : count;
    if (count > rows) count = rows;
  }
  // f(portion, first row, end): called for each portion, by one worker
  template <class F>
  void deal(F f) {
    for (int64_t p; (p = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;)
      f(p, rows * p / count, rows * (p + 1) / count);
  }
};

// Whether a result goes past the caches: where a call's `tensors` [rows, cols] together would not stay there anyway, so
// that fetching lines only to overwrite them, and driving out what is still wanted, is for nothing.
template <class T>
bool streams(const void* out, int tensors, int64_t rows, int64_t cols) {
  const int64_t row = cols * int64_t(sizeof(T));
  return tensors * rows * row > kCached && can_stream(out, row);
}

struct Statistics {
  float mean, variance;
};

// Mean and variance of a row in one pass, around the mean of its first pair: of two large sums that would be subtracted
// from each other only a small part is left. Where that guess was far off (the first elements are outliers), a second
// pass around the mean itself. read(i, n): the n elements from i on; again(i, n): the same, after read() was done.
template <class T, class F, class G>
SEQFUSE_INLINE Statistics statistics(int64_t N, F read, G again) {
  const int first = N < PL ? int(N) : PL;
  const float guess = sum(read(0, first)) / float(first);
  vp sum0{}, sum1{}, square0{}, square1{};
  auto add = [=](int64_t i, int n, vp& s, vp& q) {
    const vp d = existing<T>(read(i, n) - splat(guess), n);
    s = s + d, q = q + d * d;
  };
  int64_t i = 0;
  for (; i + 2 * PL <= N; i += 2 * PL) add(i, PL, sum0, square0), add(i + PL, PL, sum1, square1);
  for (; i + PL <= N; i += PL) add(i, PL, sum0, square0);
  if (i < N) add(i, int(N - i), sum1, square1);
  const float shift = sum(sum0 + sum1) / float(N), squares = sum(square0 + square1) / float(N);
  const float mean = guess + shift;
  if (!(shift * shift > 0.25f * squares)) return {mean, squares - shift * shift};
  vp q{};
  for_pairs(N, [&](int64_t i, int n) {
    const vp d = existing<T>(again(i, n) - splat(mean), n);
    q = q + d * d;
  });
  return {mean, sum(q) / float(N)};
}

template <class T>
struct ForwardRow {
  const T *x, *residual;
  T *added, *y;
  int64_t next;  // from this row to the next one, which is asked for while this one is in the first-level cache
};

template <class T, bool Residual, bool Stream>
void forward_row(const ForwardRow<T> r, int64_t N, const float* __restrict weight, const float* __restrict bias,
                 float eps, float* mean_out, float* rstd_out) {
  // a large fp32 sum is added up twice and goes straight to memory; of bf16 the second rounding would cost more
  constexpr bool keeps_sum = Residual && !(Stream && sizeof(T) == 4);
  auto add = [=](int64_t i, int n) {
    const vp x = take_pair(r.x + i, n);
    if constexpr (Residual) return rounded<T>(x + take_pair(r.residual + i, n));  // statistics are of the rounded sum
    return x;
  };
  auto read = [=](int64_t i, int n) {
    if constexpr (!Stream) prefetch_to_write(r.y + i);
    const vp x = add(i, n);
    if constexpr (keeps_sum) give_pair(r.added + i, x, n);
    return x;
  };
  auto again = [=](int64_t i, int n) { return keeps_sum ? take_pair(r.added + i, n) : add(i, n); };
  const Statistics of = statistics<T>(N, read, again);
  const float rstd = 1.0f / std::sqrt(of.variance + eps);
  *mean_out = of.mean, *rstd_out = rstd;
  const vf mean = splat(of.mean), scale = splat(rstd);
  for_pairs(N, [=](int64_t i, int n) {
    prefetch(r.x + r.next + i);
    if constexpr (Residual) prefetch(r.residual + r.next + i);
    const vp x = again(i, n), xhat = (x - mean) * scale;
    if constexpr (Residual && !keeps_sum) give_pair<true>(r.added + i, x, n);
    give_pair<Stream>(r.y + i, xhat * load_pair(weight + i) + load_pair(bias + i), n);
  });
}

template <class T, class P, bool Residual, bool Stream>
void forward(const LayerNormForward& a, const Parallel& parallel) {
  const int64_t N = a.cols;
  const int n = workers(a.rows, N, parallel.threads);
  Scratch scratch;
  float *weight, *bias;
  for (int pass = 0; pass < 2; pass++) {
    scratch.take(weight, Paired<T>::size(N)), scratch.take(bias, Paired<T>::size(N));
    if (pass == 0) scratch.allocate();
  }
  Paired<T>::read(static_cast<const P*>(a.weight), weight, N, 1.0f);
  Paired<T>::read(static_cast<const P*>(a.bias), bias, N, 0.0f);
  Portions portions(a.rows, N);
  auto share = [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t at = r * N;
      const ForwardRow<T> row{static_cast<const T*>(a.x) + at, static_cast<const T*>(a.residual) + (Residual ? at : 0),
                              static_cast<T*>(a.sum) + (Residual ? at : 0), static_cast<T*>(a.y) + at,
                              r + 1 < a.rows ? N : 0};
      forward_row<T, Residual, Stream>(row, N, weight, bias, a.eps, a.mean + r, a.rstd + r);
    }
    if constexpr (Stream) fence_streams();
  };
  auto job = [&](int64_t, int64_t) { portions.deal(share); };
  parallel(n, job);
}

template <class T>
struct BackwardRow {
  const T *dy, *s, *dsum;
  T* dx;
  float mean, rstd;
  int64_t next;  // from this row to the next one
};

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  g = dy * weight,  xhat = (s - mean) * rstd
// dw, db: this worker's sums of dy * xhat and dy.
template <class T, bool Params, bool Sum, bool Stream>
void backward_row(const BackwardRow<T> r, int64_t N, const float* __restrict weight, float* __restrict dw,
                  float* __restrict db) {
  const vf mean = splat(r.mean), rstd = splat(r.rstd);
  vp g_sum{}, gx_sum{};
  for_pairs(N, [&](int64_t i, int n) {
    const vp d = take_pair(r.dy + i, n), xhat = existing<T>(take_pair(r.s + i, n) - mean, n) * rstd;
    if constexpr (!Stream) prefetch_to_write(r.dx + i);
    const vp g = unfused(d * load_pair(weight + i));
    g_sum = g_sum + g, gx_sum = gx_sum + g * xhat;
    if constexpr (Params) {
      store_pair(dw + i, load_pair(dw + i) + d * xhat);
      store_pair(db + i, load_pair(db + i) + d);
    }
  });
  const vf mg = splat(sum(g_sum) / float(N)), slope = splat(r.rstd * sum(gx_sum) / float(N));
  for_pairs(N, [=](int64_t i, int n) {
    prefetch(r.dy + r.next + i), prefetch(r.s + r.next + i);
    const vp g = unfused(take_pair(r.dy + i, n) * load_pair(weight + i));
    vp d = (g - mg - (take_pair(r.s + i, n) - mean) * slope) * rstd;
    if constexpr (Sum) d = d + take_pair(r.dsum + i, n);
    give_pair<Stream>(r.dx + i, d, n);
  });
}

template <class T, class P, bool Params, bool Sum, bool Stream>
void backward(const LayerNormBackward& a, const Parallel& parallel) {
  const int64_t N = a.cols, padded = Paired<T>::size(N);
  const int n = workers(a.rows, N, parallel.threads);
  Portions portions(a.rows, N);
  Scratch scratch;
  float *weight, *partial;
  for (int pass = 0; pass < 2; pass++) {
    scratch.take(weight, padded), scratch.take(partial, Params ? 2 * portions.count * padded : 0);
    if (pass == 0) scratch.allocate();
  }
  Paired<T>::read(static_cast<const P*>(a.weight), weight, N, 1.0f);
  auto share = [&](int64_t portion, int64_t begin, int64_t end) {
    float *dw = partial + 2 * portion * padded, *db = dw + padded;
    if constexpr (Params) memset(dw, 0, sizeof(float) * size_t(2 * padded));
    for (int64_t r = begin; r < end; r++) {
      const int64_t at = r * N;
      const BackwardRow<T> row{static_cast<const T*>(a.dy) + at,
                               static_cast<const T*>(a.s) + at,
                               static_cast<const T*>(a.dsum) + (Sum ? at : 0),
                               static_cast<T*>(a.dx) + at,
                               a.mean[r],
                               a.rstd[r],
                               r + 1 < end ? N : 0};
      backward_row<T, Params, Sum, Stream>(row, N, weight, dw, db);
    }
    if constexpr (Stream) fence_streams();
  };
  auto job = [&](int64_t, int64_t) { portions.deal(share); };
  parallel(n, job);
  if constexpr (Params) {
    for (int64_t p = 1; p < portions.count; p++)
      for_vectors(0, 2 * padded,
                  [=](int64_t i, int) { store(partial + i, load(partial + i) + load(partial + 2 * p * padded + i)); });
    if (a.dweight) Paired<T>::write(partial, static_cast<P*>(a.dweight), N);
    if (a.dbias) Paired<T>::write(partial + padded, static_cast<P*>(a.dbias), N);
  }
}

// f<values...>() for run-time switches
template <bool... Known, class F>
void with_switches(F f) {
  f.template operator()<Known...>();
}
template <bool... Known, class F, class... Rest>
void with_switches(F f, bool value, Rest... rest) {
  value ? with_switches<Known..., true>(f, rest...) : with_switches<Known..., false>(f, rest...);
}

template <class T, class P>
void forward(const LayerNormForward& a, const Parallel& p) {
  with_switches([&]<bool Residual, bool Stream>() { forward<T, P, Residual, Stream>(a, p); }, a.residual != nullptr,
                streams<T>(a.y, a.residual ? 4 : 2, a.rows, a.cols) &&
                    (!a.residual || can_stream(a.sum, a.cols * int64_t(sizeof(T)))));
}

template <class T, class P>
void backward(const LayerNormBackward& a, const Parallel& p) {
  with_switches([&]<bool Params, bool Sum, bool Stream>() { backward<T, P, Params, Sum, Stream>(a, p); },
                a.dweight || a.dbias, a.dsum != nullptr, streams<T>(a.dx, a.dsum ? 4 : 3, a.rows, a.cols));
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a, const Parallel& p) {
  if (a.dtype == DType::f32) return forward<float, float>(a, p);
  a.param_dtype == DType::f32 ? forward<bf16, float>(a, p) : forward<bf16, bf16>(a, p);
}

void layer_norm_backward(const LayerNormBackward& a, const Parallel& p) {
  if (a.dtype == DType::f32) return backward<float, float>(a, p);
  a.param_dtype == DType::f32 ? backward<bf16, float>(a, p) : backward<bf16, bf16>(a, p);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
