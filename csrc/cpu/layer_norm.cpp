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
constexpr int64_t kPortions = 16;
int64_t portions_of(int64_t rows, int64_t cols) {
  int64_t n = rows * cols / kGrain;
  n = n < 1 ? 1 : n > kPortions ? kPortions : n;
  return n > rows ? rows : n;
}

struct Statistics {
  float mean, variance;
};

// Mean and variance of a row (rms: 0 and the mean square) in one pass around 0. Where the mean is large against the
// spread, so that two large sums would be subtracted from each other, a second pass is made around the mean.
// read(i, n): the n elements from i on; again(i, n): the same, after read() was done.
template <class T, class F, class G>
SEQFUSE_INLINE Statistics statistics(int64_t N, bool rms, F read, G again) {
  vp sum0{}, sum1{}, square0{}, square1{};
  auto add = [=](int64_t i, int n, vp& s, vp& q) {
    const vp x = read(i, n);
    s = s + x, q = q + x * x;
  };
  int64_t i = 0;
  for (; i + 2 * PL <= N; i += 2 * PL) add(i, PL, sum0, square0), add(i + PL, PL, sum1, square1);
  for (; i + PL <= N; i += PL) add(i, PL, sum0, square0);
  if (i < N) add(i, int(N - i), sum1, square1);
  const float mean = sum(sum0 + sum1) / float(N), squares = sum(square0 + square1) / float(N);
  if (rms) return {0.0f, squares};
  // not where a square overflowed: the variance may not
  if ((mean * mean < 0.5f * squares && squares < __builtin_inff()) || squares == 0.0f)
    return {mean, squares - mean * mean};
  vp q{};
  for_pairs(N, [&](int64_t i, int n) {
    const vp d = existing<T>(again(i, n) - splat(mean), n);
    q = q + d * d;
  });
  return {mean, sum(q) / float(N)};
}

// weight or bias as floats in the order of T's pairs; without one all `fill`. `origin` is added to what is stored.
template <class T>
void read_parameter(DType type, const void* p, float* out, int64_t N, float fill, float origin = 0.0f) {
  if (sizeof(T) == 4 || type == DType::f32) return Paired<T>::read(static_cast<const float*>(p), out, N, fill, origin);
  if constexpr (sizeof(T) == 2) Paired<T>::read(static_cast<const bf16*>(p), out, N, fill, origin);
}

// floats that a row of factors takes (Dropout::row writes whole vectors)
int64_t factors(int64_t N) {
  return ceil_div(N, 4 * VL) * 4 * VL;
}
void row_of_factors(const Dropout& dropout, int64_t row, int64_t N, float* out) {
  dropout.row(0, row >> 32, row & 0xffffffff, 0, N, out);
}

// What comes before the norm. `dropped` is dropout and a residual or none, told apart at run time: drawing the mask
// takes longer than that does.
enum class Before { nothing, residual, dropped };

template <class T, Before B, bool Stream>
struct ForwardRow {
  const T *x, *residual;
  T *added, *y;
  const float* factor;  // of dropout: what each element is multiplied by

  static constexpr bool has_sum = B != Before::nothing;
  // a large fp32 sum is added up twice and goes straight to memory; of bf16 the second rounding would cost more
  static constexpr bool keeps_sum = has_sum && !(Stream && sizeof(T) == 4);

  SEQFUSE_INLINE vp add(int64_t i, int n) const {
    vp s = take_pair(x + i, n);
    if constexpr (B == Before::dropped) s = s * pair_in_order<T>(factor + i);
    if (B == Before::residual || (B == Before::dropped && residual)) s = s + take_pair(residual + i, n);
    if constexpr (has_sum) return rounded<T>(s);  // statistics are of the rounded sum
    return s;
  }
  SEQFUSE_INLINE vp again(int64_t i, int n) const { return keeps_sum ? take_pair(added + i, n) : add(i, n); }
};

template <class T, Before B, bool Stream>
SEQFUSE_INLINE Statistics measure_row(const ForwardRow<T, B, Stream> r, int64_t N, bool rms) {
  auto read = [=](int64_t i, int n) {
    if constexpr (!Stream) prefetch_pair_to_write(r.y + i);
    const vp s = r.add(i, n);
    if constexpr (r.keeps_sum) give_rounded_pair(r.added + i, s, n);
    return s;
  };
  return statistics<T>(N, rms, read, [=](int64_t i, int n) { return r.again(i, n); });
}

// ahead: from this row to one that is asked for meanwhile
template <class T, Before B, bool Stream>
SEQFUSE_INLINE void normalise_row(const ForwardRow<T, B, Stream> r, int64_t N, const float* __restrict weight,
                                  const float* __restrict bias, float mean, float rstd, int64_t ahead) {
  const vf origin = splat(mean), scale = splat(rstd);
  for_pairs(N, [=](int64_t i, int n) {
    prefetch_pair(r.x + ahead + i);
    if constexpr (B == Before::residual) prefetch_pair(r.residual + ahead + i);
    const vp s = r.again(i, n);
    if constexpr (r.has_sum && !r.keeps_sum) give_pair<true>(r.added + i, s, n);
    give_pair<Stream>(r.y + i, (s - origin) * scale * load_pair(weight + i) + load_pair(bias + i), n);
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
    auto row = [=](int64_t r) {
      const int64_t at = r * N;
      return ForwardRow<T, B, Stream>{
          static_cast<const T*>(a.x) + at, a.residual ? static_cast<const T*>(a.residual) + at : nullptr,
          B == Before::nothing ? nullptr : static_cast<T*>(a.sum) + at, static_cast<T*>(a.y) + at, mine};
    };
    auto measure = [=](int64_t r) {
      if constexpr (B == Before::dropped) row_of_factors(dropout, r, N, mine);
      const Statistics of = measure_row(row(r), N, a.options.rms);
      if (!a.options.rms) a.mean[r] = of.mean;
      a.rstd[r] = 1.0f / std::sqrt(of.variance + a.eps);
    };
    // A row is measured before the one before it is normalised: the processor does that while it adds up lanes, divides
    // and takes the root.
    for (int64_t r = begin; r <= end; r++) {
      if (r < end) measure(r);
      if (r == begin) continue;
      const float mean = a.options.rms ? 0.0f : a.mean[r - 1];
      normalise_row(row(r - 1), N, weight, bias, mean, a.rstd[r - 1], r + 1 < a.rows ? 2 * N : 0);
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
};

struct Means {
  float g, gx;  // mean(g), mean(g * xhat)
};

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  g = dy * weight,  xhat = (s - mean) * rstd
// rms: mean(g) and mean count as 0. Drop: that is the residual's gradient, and x's is a factor times it.
// dw, db: this worker's sums of dy * xhat and dy.
template <class T, bool Params, bool Stream>
SEQFUSE_INLINE Means measure_row(const BackwardRow<T> r, int64_t N, bool rms, const float* __restrict weight,
                                 float* __restrict dw, float* __restrict db) {
  const vf mean = splat(r.mean), rstd = splat(r.rstd);
  vp g_sum{}, gx_sum{};
  for_pairs(N, [&](int64_t i, int n) __attribute__((always_inline)) {  // or the sums would live in memory
    const vp d = take_pair(r.dy + i, n), xhat = existing<T>(take_pair(r.s + i, n) - mean, n) * rstd;
    if constexpr (!Stream) prefetch_pair_to_write(r.dx + i);
    const vp g = unfused(d * load_pair(weight + i));
    g_sum = g_sum + g, gx_sum = gx_sum + g * xhat;
    if constexpr (Params) {
      store_pair(dw + i, load_pair(dw + i) + d * xhat);
      store_pair(db + i, load_pair(db + i) + d);
    }
  });
  return {rms ? 0.0f : sum(g_sum) / float(N), sum(gx_sum) / float(N)};
}

// ahead: from this row to one that is asked for meanwhile
template <class T, bool Drop, bool Stream>
SEQFUSE_INLINE void differentiate_row(const BackwardRow<T> r, int64_t N, Means of, const float* __restrict weight,
                                      int64_t ahead) {
  const vf mean = splat(r.mean), rstd = splat(r.rstd), mg = splat(of.g), slope = splat(r.rstd * of.gx);
  for_pairs(N, [=](int64_t i, int n) {
    prefetch_pair(r.dy + ahead + i), prefetch_pair(r.s + ahead + i);
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

// The portions' sums of dweight and dbias added up to those of the first: neighbours, then pairs of neighbours, by
// whichever worker finishes the second of two. So the order is always the same and no worker waits.
class AddUp {
 public:
  AddUp(float* sums, int64_t size, int64_t portions) : sums_(sums), size_(size), portions_(portions) {}
  void done(int64_t portion) {
    for (int64_t step = 1; step < portions_; step *= 2) {
      const int64_t left = portion / (2 * step) * (2 * step), right = left + step;
      if (right >= portions_) continue;
      if (__atomic_fetch_add(&arrived_[right], 1, __ATOMIC_ACQ_REL) == 0) return;
      float *const to = sums_ + left * size_, *const from = sums_ + right * size_;
      for_vectors(0, size_, [=](int64_t i, int) { store(to + i, load(to + i) + load(from + i)); });
    }
  }

 private:
  float* sums_;
  int64_t size_, portions_;
  int arrived_[kPortions] = {};
};

template <class T, bool Drop, bool Stream>
void backward(const LayerNormBackward& a, const Parallel& parallel) {
  const int64_t N = a.cols, padded = Paired<T>::size(N);
  const bool params = a.dweight || a.dbias;
  const int64_t portions = portions_of(a.rows, N);
  Scratch scratch;
  float *weight, *partial, *factor;
  for (int pass = 0; pass < 2; pass++) {
    scratch.take(weight, padded), scratch.take(partial, params ? 2 * portions * padded : 0);
    scratch.take(factor, Drop ? portions * factors(N) : 0);
    if (pass == 0) scratch.allocate();
  }
  read_parameter<T>(a.param_dtype, a.weight, weight, N, 1.0f, a.options.zero_centered);
  const Dropout dropout(a.options.seed, a.options.dropout_p);
  AddUp add_up(partial, 2 * padded, portions);
  auto share = [&](int64_t portion, int64_t begin, int64_t end) {
    float *const dw = partial + 2 * portion * padded, *const mine = factor + portion * factors(N);
    if (params) memset(dw, 0, sizeof(float) * size_t(2 * padded));
    const bool rms = a.options.rms;
    auto row = [=](int64_t r) {
      const int64_t at = r * N;
      return BackwardRow<T>{static_cast<const T*>(a.dy) + at,
                            static_cast<const T*>(a.s) + at,
                            a.dsum ? static_cast<const T*>(a.dsum) + at : nullptr,
                            static_cast<T*>(a.dx) + at,
                            a.dresidual ? static_cast<T*>(a.dresidual) + at : nullptr,
                            mine,
                            rms ? 0.0f : a.mean[r],
                            a.rstd[r]};
    };
    Means of{}, next{};
    for (int64_t r = begin; r <= end; r++, of = next) {  // a row is measured ahead, as in forward()
      if (r < end)
        next = params ? measure_row<T, true, Stream>(row(r), N, rms, weight, dw, dw + padded)
                      : measure_row<T, false, Stream>(row(r), N, rms, weight, nullptr, nullptr);
      if (r == begin) continue;
      if constexpr (Drop) row_of_factors(dropout, r - 1, N, mine);
      differentiate_row<T, Drop, Stream>(row(r - 1), N, of, weight, r + 1 < end ? 2 * N : 0);
    }
    if (params) add_up.done(portion);
    if constexpr (Stream) fence_streams();
  };
  deal_portions(parallel, useful_workers(parallel, a.rows, N), a.rows, portions, share);
  if (params) {
    auto write = [&](const float* sum, void* out) {
      if (!out) return;
      if (sizeof(T) == 4 || a.param_dtype == DType::f32) return Paired<T>::write(sum, static_cast<float*>(out), N);
      if constexpr (sizeof(T) == 2) Paired<T>::write(sum, static_cast<bf16*>(out), N);
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

template <class T>
void backward(const LayerNormBackward& a, const Parallel& p) {
  if (a.options.dropout_p > 0.0) return backward<T, true, false>(a, p);
  streams<T>(a.dx, a.dsum ? 4 : 3, a.rows, a.cols) ? backward<T, false, true>(a, p) : backward<T, false, false>(a, p);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a, const Parallel& p) {
  if (a.dtype == DType::bf16) return forward<bf16>(a, p);
  if constexpr (!has_dot) forward<float>(a, p);  // see dispatch.cpp
}

void layer_norm_backward(const LayerNormBackward& a, const Parallel& p) {
  if (a.dtype == DType::bf16) return backward<bf16>(a, p);
  if constexpr (!has_dot) backward<float>(a, p);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
