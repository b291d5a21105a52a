// layer_norm on the CPU. Contract: seqfuse/layer_norm.h
//
// Forward reads x (and the residual) once from memory and writes y (and the sum) once: a row stays in the first-level
// cache between its two passes (mean; then centred variance, which does not cancel; then y). Backward reads dy and s
// once and writes dx once; dweight and dbias are summed per worker in fp32 and then added in worker order, so a result
// depends on the number of threads but never on their timing.
#include "seqfuse/layer_norm.h"

#include <cmath>

#include "cpu/scratch.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

constexpr int kLine = 64;            // bytes of a cache line
constexpr int64_t kGrain = 1 << 14;  // elements a worker should have, or waking it costs more than it saves

int workers(int64_t rows, int64_t cols, int threads) {
  const int64_t useful = (rows * cols + kGrain - 1) / kGrain;
  int64_t n = threads < useful ? threads : useful;
  if (n > rows) n = rows;
  return n < 1 ? 1 : int(n);
}

// Parameters as floats: themselves, or a copy in `copy` where they are 16 bits wide or absent (then all `fill`).
template <class P>
const float* as_floats(const P* p, float* copy, int64_t N, float fill) {
  if constexpr (sizeof(P) == 4)
    if (p) return p;
  for_vectors(0, N, [=](int64_t i, int n) { give(copy + i, p ? take(p + i, n) : splat(fill), n); });
  return copy;
}

struct Affine {
  const float* weight;
  const float* bias;
};

// x, res, added, y: rows (res and added with a residual only). row: scratch [N] for a 16-bit T, so that each element is
// widened once. The first pass reads memory; the others run from the first-level cache while the next row is fetched.
template <class T, bool Residual>
void forward_row(const T* __restrict x, const T* __restrict res, T* __restrict added, T* __restrict y, int64_t N,
                 int64_t next, Affine p, float eps, float* __restrict row, float* mean_out, float* rstd_out) {
  constexpr bool narrow = sizeof(T) == 2;
  const int64_t unrolled = N / (4 * VL) * (4 * VL);
  auto element = [=](int64_t i, int n) {
    vf v = take(x + i, n);
    if constexpr (Residual) {
      v = rounded<T>(v + take(res + i, n));  // the statistics are those of the rounded sum
      give(added + i, v, n);
    }
    if constexpr (narrow) give(row + i, v, n);
    return v;
  };
  vf m0{}, m1{}, m2{}, m3{};
  for (int64_t i = 0; i < unrolled; i += 4 * VL) {
    m0 += element(i, VL), m1 += element(i + VL, VL), m2 += element(i + 2 * VL, VL), m3 += element(i + 3 * VL, VL);
  }
  for_vectors(unrolled, N, [&](int64_t i, int n) { m0 += element(i, n); });
  const float mean = sum((m0 + m1) + (m2 + m3)) / float(N);

  const float* s;
  if constexpr (narrow)
    s = row;
  else
    s = Residual ? added : x;
  auto square = [=](int64_t i, int n) {
    const vf d = take(s + i, n, mean) - mean;
    return d * d;
  };
  vf v0{}, v1{}, v2{}, v3{};
  for (int64_t i = 0; i < unrolled; i += 4 * VL) {
    for (int64_t line = 0; line < 4 * VL; line += kLine / int64_t(sizeof(T))) {
      prefetch(x + next + i + line);
      if constexpr (Residual) prefetch(res + next + i + line);
    }
    v0 += square(i, VL), v1 += square(i + VL, VL), v2 += square(i + 2 * VL, VL), v3 += square(i + 3 * VL, VL);
  }
  for_vectors(unrolled, N, [&](int64_t i, int n) { v0 += square(i, n); });
  const float rstd = 1.0f / std::sqrt(sum((v0 + v1) + (v2 + v3)) / float(N) + eps);
  *mean_out = mean, *rstd_out = rstd;
  for_vectors(0, N, [=](int64_t i, int n) {
    give(y + i, (take(s + i, n) - mean) * rstd * take(p.weight + i, n) + take(p.bias + i, n), n);
  });
}

template <class T, class P, bool Residual>
void forward(const LayerNormForward& a, const Parallel& parallel) {
  const int64_t N = a.cols, pitch = ceil_div(N, 16) * 16;
  const int n = workers(a.rows, N, parallel.threads);
  Scratch scratch;
  float *copies, *rows;
  for (int pass = 0; pass < 2; pass++) {
    scratch.take(copies, 2 * pitch), scratch.take(rows, n * pitch);
    if (pass == 0) scratch.allocate();
  }
  const Affine p{as_floats(static_cast<const P*>(a.weight), copies, N, 1.0f),
                 as_floats(static_cast<const P*>(a.bias), copies + pitch, N, 0.0f)};
  const T* x = static_cast<const T*>(a.x);
  const T* res = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  T* added = static_cast<T*>(a.sum);
  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t r = a.rows * begin / n; r < a.rows * end / n; r++) {
      const int64_t at = Residual ? r * N : 0, next = r + 1 < a.rows ? N : 0;
      forward_row<T, Residual>(x + r * N, res + at, added + at, y + r * N, N, next, p, a.eps, rows + begin * pitch,
                               a.mean + r, a.rstd + r);
    }
  };
  parallel(n, job);
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  g = dy * weight,  xhat = (s - mean) * rstd
// dw, db: this worker's sums of dy * xhat and dy.
template <class T, bool Params>
void backward_row(const T* __restrict dy, const T* __restrict s, const T* __restrict dsum, T* __restrict dx, int64_t N,
                  int64_t next, const float* __restrict weight, float mean, float rstd, float* __restrict dw,
                  float* __restrict db) {
  vf g0{}, g1{}, gx0{}, gx1{};
  auto first = [=](int64_t i, int n, vf& g_sum, vf& gx_sum) {
    const vf d = take(dy + i, n), xhat = (take(s + i, n, mean) - mean) * rstd;
    const vf g = unfused(d * take(weight + i, n));
    g_sum += g, gx_sum += g * xhat;
    if constexpr (Params) give(dw + i, take(dw + i, n) + d * xhat, n), give(db + i, take(db + i, n) + d, n);
  };
  const int64_t unrolled = N / (2 * VL) * (2 * VL);
  for (int64_t i = 0; i < unrolled; i += 2 * VL) first(i, VL, g0, gx0), first(i + VL, VL, g1, gx1);
  for_vectors(unrolled, N, [&](int64_t i, int n) { first(i, n, g0, gx0); });
  const float mg = sum(g0 + g1) / float(N), slope = rstd * sum(gx0 + gx1) / float(N);

  auto second = [=](int64_t i, int n) {
    prefetch(dy + next + i), prefetch(s + next + i);  // the next row, while this one is in the first-level cache
    const vf g = unfused(take(dy + i, n) * take(weight + i, n));
    return rstd * (g - mg - (take(s + i, n) - mean) * slope);
  };
  if (dsum)
    for_vectors(0, N, [=](int64_t i, int n) { give(dx + i, second(i, n) + take(dsum + i, n), n); });
  else
    for_vectors(0, N, [=](int64_t i, int n) { give(dx + i, second(i, n), n); });
}

template <class T, class P>
void backward(const LayerNormBackward& a, const Parallel& parallel) {
  const int64_t N = a.cols;
  int n = workers(a.rows, N, parallel.threads);
  if (n > a.partial_rows) n = int(a.partial_rows);
  const bool params = a.dweight || a.dbias;
  const auto row = params ? backward_row<T, true> : backward_row<T, false>;
  Scratch scratch;
  float* copy;
  for (int pass = 0; pass < 2; pass++) {
    scratch.take(copy, N);
    if (pass == 0) scratch.allocate();
  }
  const float* weight = as_floats(static_cast<const P*>(a.weight), copy, N, 1.0f);
  const T* dy = static_cast<const T*>(a.dy);
  const T* s = static_cast<const T*>(a.s);
  const T* dsum = static_cast<const T*>(a.dsum);
  T* dx = static_cast<T*>(a.dx);
  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++) {
      float* dw = a.partial + w * N;
      float* db = a.partial + (a.partial_rows + w) * N;
      if (params) memset(dw, 0, sizeof(float) * N), memset(db, 0, sizeof(float) * N);
      for (int64_t r = a.rows * w / n; r < a.rows * (w + 1) / n; r++)
        row(dy + r * N, s + r * N, dsum ? dsum + r * N : nullptr, dx + r * N, N, r + 1 < a.rows ? N : 0, weight,
            a.mean[r], a.rstd[r], dw, db);
    }
  };
  parallel(n, job);

  auto reduce = [=](const float* partial, P* out) {
    if (!out) return;
    for_vectors(0, N, [=](int64_t i, int m) {
      vf t = take(partial + i, m);
      for (int w = 1; w < n; w++) t += take(partial + w * N + i, m);
      give(out + i, t, m);
    });
  };
  reduce(a.partial, static_cast<P*>(a.dweight));
  reduce(a.partial + a.partial_rows * N, static_cast<P*>(a.dbias));
}

template <class T, class P>
void forward(const LayerNormForward& a, const Parallel& p) {
  a.residual ? forward<T, P, true>(a, p) : forward<T, P, false>(a, p);
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
