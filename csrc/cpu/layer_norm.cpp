// layer_norm and rms_norm on the CPU. Contract: seqfuse/layer_norm.h
//
// Forward reads x (and the residual) once from memory and writes y (and the sum) once: a row stays in the first-level
// cache between its two passes, statistics and result. Backward reads dy and s once and writes dx once, likewise.
// Dropout keeps nothing: which elements stay is computed again, into a row of factors that never leaves the cache.
// Rows are dealt out in portions (cpu/deal.h). dweight and dbias are summed per portion in fp32 and then added in
// order, and portions depend on the shape alone: a result depends neither on the number of threads nor on their timing.
#include "seqfuse/layer_norm.h"

#include <cmath>

#include "cpu/deal.h"
#include "cpu/dropout.h"
#include "cpu/scratch.h"
#include "cpu/vec_pair.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

// How many portions rows are dealt out in: enough to even out two uneven workers, few enough that their sums cost
// nothing. It must not depend on the workers.
int64_t portions_of(int64_t rows, int64_t cols) {
  int64_t n = rows * cols / kGrain;
  n = n < 1 ? 1 : n > 16 ? 16 : n;
  return n > rows ? rows : n;
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

// Of a row around 0: nothing cancels.
template <class F>
SEQFUSE_INLINE float mean_square(int64_t N, F read) {
  vp sum0{}, sum1{};
  auto add = [=](int64_t i, int n, vp& sum) {
    const vp x = read(i, n);
    sum = sum + x * x;
  };
  int64_t i = 0;
  for (; i + 2 * PL <= N; i += 2 * PL) add(i, PL, sum0), add(i + PL, PL, sum1);
  for (; i + PL <= N; i += PL) add(i, PL, sum0);
  if (i < N) add(i, int(N - i), sum1);
  return sum(sum0 + sum1) / float(N);
}

// weight or bias as floats in the order of T's pairs; without one all `fill`. `origin` is added to what is stored.
template <class T>
void read_parameter(DType type, const void* p, float* out, int64_t N, float fill, float origin = 0.0f) {
  type == DType::f32 ? Paired<T>::read(static_cast<const float*>(p), out, N, fill, origin)
                     : Paired<T>::read(static_cast<const bf16*>(p), out, N, fill, origin);
}

// floats that a row of factors takes (Dropout::row writes whole vectors)
int64_t factors(int64_t N) {
  return ceil_div(N, 4 * VL) * 4 * VL;
}
void row_of_factors(const Dropout& dropout, int64_t row, int64_t N, float* out) {
  dropout.row(0, row >> 32, row & 0xffffffff, 0, N, out);
}

template <class T>
struct ForwardRow {
  const T *x, *residual;
  T *added, *y;
  const float* factor;  // of dropout: what each element is multiplied by
  int64_t next;         // from this row to the next one, which is asked for while this one is in the first-level cache
};

// What comes before the norm. `dropped` is dropout and a residual or none, told apart at run time: drawing the mask
// takes longer than that does.
enum class Before { nothing, residual, dropped };

template <class T, Before B, bool Stream>
void forward_row(const ForwardRow<T> r, int64_t N, const float* __restrict weight, const float* __restrict bias,
                 float eps, float* mean_out, float* rstd_out) {
  constexpr bool has_sum = B != Before::nothing;
  // a large fp32 sum is added up twice and goes straight to memory; of bf16 the second rounding would cost more
  constexpr bool keeps_sum = has_sum && !(Stream && sizeof(T) == 4);
  auto add = [=](int64_t i, int n) {
    vp x = take_pair(r.x + i, n);
    if constexpr (B == Before::dropped) x = x * pair_in_order<T>(r.factor + i);
    if (B == Before::residual || (B == Before::dropped && r.residual)) x = x + take_pair(r.residual + i, n);
    if constexpr (has_sum) return rounded<T>(x);  // statistics are of the rounded sum
    return x;
  };
  auto read = [=](int64_t i, int n) {
    if constexpr (!Stream) prefetch_to_write(r.y + i);
    const vp x = add(i, n);
    if constexpr (keeps_sum) give_pair(r.added + i, x, n);
    return x;
  };
  auto again = [=](int64_t i, int n) { return keeps_sum ? take_pair(r.added + i, n) : add(i, n); };
  const Statistics of = mean_out ? statistics<T>(N, read, again) : Statistics{0.0f, mean_square(N, read)};
  const float rstd = 1.0f / std::sqrt(of.variance + eps);
  if (mean_out) *mean_out = of.mean;
  *rstd_out = rstd;
  const vf mean = splat(of.mean), scale = splat(rstd);
  for_pairs(N, [=](int64_t i, int n) {
    prefetch(r.x + r.next + i);
    if constexpr (B == Before::residual) prefetch(r.residual + r.next + i);
    const vp x = again(i, n);
    if constexpr (has_sum && !keeps_sum) give_pair<true>(r.added + i, x, n);
    give_pair<Stream>(r.y + i, (x - mean) * scale * load_pair(weight + i) + load_pair(bias + i), n);
  });
}

template <class T, Before B, bool Stream>
void forward(const LayerNormForward& a, const Parallel& parallel) {
  const int64_t N = a.cols;
  const int64_t portions = portions_of(a.rows, N);
  Scratch scratch;
  float *weight, *bias, *factor;
  for (int pass = 0; pass < 2; pass++) {
    scratch.take(weight, Paired<T>::size(N)), scratch.take(bias, Paired<T>::size(N));
    scratch.take(factor, B == Before::dropped ? portions * factors(N) : 0);
    if (pass == 0) scratch.allocate();
  }
  read_parameter<T>(a.param_dtype, a.weight, weight, N, 1.0f, a.options.zero_centered);
  read_parameter<T>(a.param_dtype, a.bias, bias, N, 0.0f);
  const Dropout dropout(a.options.seed, a.options.dropout_p);
  auto share = [&](int64_t portion, int64_t begin, int64_t end) {
    float* const mine = factor + portion * factors(N);
    for (int64_t r = begin; r < end; r++) {
      const int64_t at = r * N;
      if constexpr (B == Before::dropped) row_of_factors(dropout, r, N, mine);
      const ForwardRow<T> row{static_cast<const T*>(a.x) + at,
                              a.residual ? static_cast<const T*>(a.residual) + at : nullptr,
                              B == Before::nothing ? nullptr : static_cast<T*>(a.sum) + at,
                              static_cast<T*>(a.y) + at,
                              mine,
                              r + 1 < a.rows ? N : 0};
      forward_row<T, B, Stream>(row, N, weight, bias, a.eps, a.options.rms ? nullptr : a.mean + r, a.rstd + r);
    }
    if constexpr (Stream) fence_streams();
  };
  deal_portions(parallel, useful_workers(parallel, a.rows, N), a.rows, portions, share);
}

template <class T>
struct BackwardRow {
  const T *dy, *s, *dsum;
  T *dx, *dresidual;
  const float* factor;
  float mean, rstd;
  int64_t next;  // from this row to the next one
  bool rms;
};

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  g = dy * weight,  xhat = (s - mean) * rstd
// rms: mean(g) and mean count as 0. Drop: that is the residual's gradient, and x's is a factor times it.
// dw, db: this worker's sums of dy * xhat and dy.
template <class T, bool Params, bool Drop, bool Stream>
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
  const vf mg = splat(r.rms ? 0.0f : sum(g_sum) / float(N)), slope = splat(r.rstd * sum(gx_sum) / float(N));
  for_pairs(N, [=](int64_t i, int n) {
    prefetch(r.dy + r.next + i), prefetch(r.s + r.next + i);
    const vp g = unfused(take_pair(r.dy + i, n) * load_pair(weight + i));
    vp d = (g - mg - (take_pair(r.s + i, n) - mean) * slope) * rstd;
    if (r.dsum) d = d + take_pair(r.dsum + i, n);
    if constexpr (Drop) {
      if (r.dresidual) give_pair(r.dresidual + i, d, n);
      d = d * pair_in_order<T>(r.factor + i);
    }
    give_pair<Stream>(r.dx + i, d, n);
  });
}

template <class T, bool Params, bool Drop, bool Stream>
void backward(const LayerNormBackward& a, const Parallel& parallel) {
  const int64_t N = a.cols, padded = Paired<T>::size(N);
  const int64_t portions = portions_of(a.rows, N);
  Scratch scratch;
  float *weight, *partial, *factor;
  for (int pass = 0; pass < 2; pass++) {
    scratch.take(weight, padded), scratch.take(partial, Params ? 2 * portions * padded : 0);
    scratch.take(factor, Drop ? portions * factors(N) : 0);
    if (pass == 0) scratch.allocate();
  }
  read_parameter<T>(a.param_dtype, a.weight, weight, N, 1.0f, a.options.zero_centered);
  const Dropout dropout(a.options.seed, a.options.dropout_p);
  auto share = [&](int64_t portion, int64_t begin, int64_t end) {
    float *const dw = partial + 2 * portion * padded, *const mine = factor + portion * factors(N);
    if constexpr (Params) memset(dw, 0, sizeof(float) * size_t(2 * padded));
    for (int64_t r = begin; r < end; r++) {
      const int64_t at = r * N;
      if constexpr (Drop) row_of_factors(dropout, r, N, mine);
      const BackwardRow<T> row{static_cast<const T*>(a.dy) + at,
                               static_cast<const T*>(a.s) + at,
                               a.dsum ? static_cast<const T*>(a.dsum) + at : nullptr,
                               static_cast<T*>(a.dx) + at,
                               a.dresidual ? static_cast<T*>(a.dresidual) + at : nullptr,
                               mine,
                               a.options.rms ? 0.0f : a.mean[r],
                               a.rstd[r],
                               r + 1 < end ? N : 0,
                               a.options.rms};
      backward_row<T, Params, Drop, Stream>(row, N, weight, dw, dw + padded);
    }
    if constexpr (Stream) fence_streams();
  };
  deal_portions(parallel, useful_workers(parallel, a.rows, N), a.rows, portions, share);
  if constexpr (Params) {
    for (int64_t p = 1; p < portions; p++)
      for_vectors(0, 2 * padded,
                  [=](int64_t i, int) { store(partial + i, load(partial + i) + load(partial + 2 * p * padded + i)); });
    auto write = [&](const float* sum, void* out) {
      if (!out) return;
      a.param_dtype == DType::f32 ? Paired<T>::write(sum, static_cast<float*>(out), N)
                                  : Paired<T>::write(sum, static_cast<bf16*>(out), N);
    };
    write(partial, a.dweight), write(partial + padded, a.dbias);
  }
}

template <class T>
void forward(const LayerNormForward& a, const Parallel& p) {
  const bool stream = streams<T>(a.y, a.residual ? 4 : 2, a.rows, a.cols) &&
                      (!a.residual || can_stream(a.sum, a.cols * int64_t(sizeof(T))));
  if (a.options.dropout_p > 0.0) return forward<T, Before::dropped, false>(a, p);
  if (a.residual) return stream ? forward<T, Before::residual, true>(a, p) : forward<T, Before::residual, false>(a, p);
  stream ? forward<T, Before::nothing, true>(a, p) : forward<T, Before::nothing, false>(a, p);
}

template <class T, bool Params>
void backward(const LayerNormBackward& a, const Parallel& p) {
  if (a.options.dropout_p > 0.0) return backward<T, Params, true, false>(a, p);
  streams<T>(a.dx, a.dsum ? 4 : 3, a.rows, a.cols) ? backward<T, Params, false, true>(a, p)
                                                   : backward<T, Params, false, false>(a, p);
}

template <class T>
void backward(const LayerNormBackward& a, const Parallel& p) {
  a.dweight || a.dbias ? backward<T, true>(a, p) : backward<T, false>(a, p);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a, const Parallel& p) {
  a.dtype == DType::f32 ? forward<float>(a, p) : forward<bf16>(a, p);
}

void layer_norm_backward(const LayerNormBackward& a, const Parallel& p) {
  a.dtype == DType::f32 ? backward<float>(a, p) : backward<bf16>(a, p);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
