// layer_norm on the CPU. Contract: seqfuse/layer_norm.h
//
// Forward reads x (and the residual) once from memory and writes y (and the sum) once: a row stays in the first-level
// cache between its two passes (mean; then centred variance, which does not cancel; then y). Backward reads dy and s
// once and writes dx once; dweight and dbias are summed per worker in fp32 and then added in worker order, so a result
// depends on the number of threads but never on their timing.
#include "seqfuse/layer_norm.h"

#include <cmath>

#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements a worker should have, or waking it costs more than it saves

int workers(int64_t rows, int64_t cols, int threads) {
  const int64_t useful = (rows * cols + kGrain - 1) / kGrain;
  int64_t n = threads < useful ? threads : useful;
  if (n > rows) n = rows;
  return n < 1 ? 1 : int(n);
}

// The mean of a row; with a residual the rounded sum is written here and read back from the cache afterwards.
template <class T, bool Residual>
SEQFUSE_INLINE float row_mean(const T* __restrict x, const T* __restrict res, T* added, int64_t N) {
  const int64_t unrolled = N / (4 * VL) * (4 * VL);
  auto element = [=](int64_t i, int n) {
    if constexpr (!Residual) return take(x + i, n);
    give(added + i, take(x + i, n) + take(res + i, n), n);
    return take(added + i, n);
  };
  vf m0{}, m1{}, m2{}, m3{};
  for (int64_t i = 0; i < unrolled; i += 4 * VL) {
    m0 += element(i, VL), m1 += element(i + VL, VL), m2 += element(i + 2 * VL, VL), m3 += element(i + 3 * VL, VL);
  }
  for_vectors(unrolled, N, [&](int64_t i, int n) { m0 += element(i, n); });
  return sum((m0 + m1) + (m2 + m3)) / float(N);
}

template <class T>
SEQFUSE_INLINE float row_rstd(const T* __restrict s, float mean, int64_t N, float eps) {
  const int64_t unrolled = N / (4 * VL) * (4 * VL);
  auto square = [=](int64_t i, int n) {
    const vf d = take(s + i, n, mean) - mean;
    return d * d;
  };
  vf v0{}, v1{}, v2{}, v3{};
  for (int64_t i = 0; i < unrolled; i += 4 * VL) {
    v0 += square(i, VL), v1 += square(i + VL, VL), v2 += square(i + 2 * VL, VL), v3 += square(i + 3 * VL, VL);
  }
  for_vectors(unrolled, N, [&](int64_t i, int n) { v0 += square(i, n); });
  return 1.0f / std::sqrt(sum((v0 + v1) + (v2 + v3)) / float(N) + eps);
}

// R rows at once, so that weight and bias are read once for R rows
template <class T, class P, bool Residual, int R>
void forward_rows(const LayerNormForward& a, int64_t r) {
  const int64_t N = a.cols;
  const T* x = static_cast<const T*>(a.x) + r * N;
  T* __restrict y = static_cast<T*>(a.y) + r * N;
  T* added = static_cast<T*>(a.sum) + (Residual ? r * N : 0);
  const T* res = static_cast<const T*>(a.residual) + (Residual ? r * N : 0);
  const T* s = Residual ? added : x;
  const P* __restrict weight = static_cast<const P*>(a.weight);
  const P* __restrict bias = static_cast<const P*>(a.bias);

  float mean[R], rstd[R];
  for (int k = 0; k < R; k++) {
    const int64_t at = Residual ? k * N : 0;
    mean[k] = row_mean<T, Residual>(x + k * N, res + at, added + at, N);
    rstd[k] = row_rstd<T>(s + k * N, mean[k], N, a.eps);
    a.mean[r + k] = mean[k], a.rstd[r + k] = rstd[k];
  }
  auto affine = [&](int64_t i, int n, vf w, vf b) {
    for (int k = 0; k < R; k++) give(y + k * N + i, (take(s + k * N + i, n) - mean[k]) * rstd[k] * w + b, n);
  };
  if (weight && bias)
    for_vectors(0, N, [&](int64_t i, int n) { affine(i, n, take(weight + i, n), take(bias + i, n)); });
  else if (weight)
    for_vectors(0, N, [&](int64_t i, int n) { affine(i, n, take(weight + i, n), vf{}); });
  else
    for_vectors(0, N, [&](int64_t i, int n) { affine(i, n, splat(1.0f), bias ? take(bias + i, n) : vf{}); });
}

template <class T, class P, bool Residual>
void forward(const LayerNormForward& a, const Parallel& parallel) {
  constexpr int R = 4;
  const int n = workers(a.rows, a.cols, parallel.threads);
  auto job = [&](int64_t begin, int64_t end) {
    int64_t r = a.rows * begin / n;
    const int64_t last = a.rows * end / n;
    for (; r + R <= last; r += R) forward_rows<T, P, Residual, R>(a, r);
    for (; r < last; r++) forward_rows<T, P, Residual, 1>(a, r);
  };
  parallel(n, job);
}

// R rows at once, so that the fp32 sums of dweight and dbias are read and written once for R rows:
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  g = dy * weight,  xhat = (s - mean) * rstd
template <class T, class P, int R, bool Params, bool Weight>
void backward_rows(const LayerNormBackward& a, int64_t r, float* __restrict dw, float* __restrict db) {
  const int64_t N = a.cols;
  const float inv_n = 1.0f / float(N);
  const T* __restrict dy = static_cast<const T*>(a.dy) + r * N;
  const T* __restrict s = static_cast<const T*>(a.s) + r * N;
  const P* __restrict weight = static_cast<const P*>(a.weight);
  float mean[R], rstd[R], mg[R], mgx[R];
  vf g_sum[R], gx_sum[R];
  for (int k = 0; k < R; k++) mean[k] = a.mean[r + k], rstd[k] = a.rstd[r + k], g_sum[k] = gx_sum[k] = vf{};

  for_vectors(0, N, [&](int64_t i, int n) {
    const vf w = Weight ? take(weight + i, n) : splat(1.0f);
    vf dw_i{}, db_i{};
    for (int k = 0; k < R; k++) {
      const vf d = take(dy + k * N + i, n), xhat = (take(s + k * N + i, n, mean[k]) - mean[k]) * rstd[k];
      const vf g = unfused(d * w);
      g_sum[k] += g, gx_sum[k] += g * xhat;
      dw_i += d * xhat, db_i += d;
    }
    if constexpr (Params) give(dw + i, take(dw + i, n) + dw_i, n), give(db + i, take(db + i, n) + db_i, n);
  });
  for (int k = 0; k < R; k++) mg[k] = sum(g_sum[k]) * inv_n, mgx[k] = sum(gx_sum[k]) * inv_n;

  for (int k = 0; k < R; k++) {
    const T* __restrict dy_k = dy + k * N;
    const T* __restrict s_k = s + k * N;
    const T* __restrict dsum = a.dsum ? static_cast<const T*>(a.dsum) + (r + k) * N : nullptr;
    T* __restrict dx = static_cast<T*>(a.dx) + (r + k) * N;
    const float scale = rstd[k], centre = mean[k], shift = mg[k], slope = rstd[k] * mgx[k];
    auto value = [=](int64_t i, int n) {
      const vf w = Weight ? take(weight + i, n) : splat(1.0f);
      return scale * (unfused(take(dy_k + i, n) * w) - shift - (take(s_k + i, n) - centre) * slope);
    };
    if (dsum)
      for_vectors(0, N, [=](int64_t i, int n) { give(dx + i, value(i, n) + take(dsum + i, n), n); });
    else
      for_vectors(0, N, [=](int64_t i, int n) { give(dx + i, value(i, n), n); });
  }
}

template <class T, class P, bool Params, bool Weight>
void backward_range(const LayerNormBackward& a, int64_t begin, int64_t end, float* dw, float* db) {
  constexpr int R = 4;
  if (Params) memset(dw, 0, sizeof(float) * a.cols), memset(db, 0, sizeof(float) * a.cols);
  int64_t r = begin;
  for (; r + R <= end; r += R) backward_rows<T, P, R, Params, Weight>(a, r, dw, db);
  for (; r < end; r++) backward_rows<T, P, 1, Params, Weight>(a, r, dw, db);
}

template <class T, class P>
void backward(const LayerNormBackward& a, const Parallel& parallel) {
  const int64_t N = a.cols;
  int n = workers(a.rows, N, parallel.threads);
  if (n > a.partial_rows) n = int(a.partial_rows);
  const bool params = a.dweight || a.dbias;
  auto range = params ? (a.weight ? backward_range<T, P, true, true> : backward_range<T, P, true, false>)
                      : (a.weight ? backward_range<T, P, false, true> : backward_range<T, P, false, false>);
  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++)
      range(a, a.rows * w / n, a.rows * (w + 1) / n, a.partial + w * N, a.partial + (a.partial_rows + w) * N);
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
