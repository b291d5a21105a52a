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

// calls f(row) for the rows of workers [begin, end) out of n
template <class F>
SEQFUSE_INLINE void for_rows(int64_t rows, int64_t worker, int64_t n, F f) {
  for (int64_t r = rows * worker / n; r < rows * (worker + 1) / n; r++) f(r);
}

template <class T, class P, bool Residual>
void forward(const LayerNormForward& a, const Parallel& parallel) {
  const int64_t N = a.cols, body = N / VL * VL;
  const int tail = int(N - body);
  const float inv_n = 1.0f / float(N);
  const P* weight = static_cast<const P*>(a.weight);
  const P* bias = static_cast<const P*>(a.bias);
  const int n = workers(a.rows, N, parallel.threads);

  auto row = [&](int64_t r) {
    const T* x = static_cast<const T*>(a.x) + r * N;
    const T* res = Residual ? static_cast<const T*>(a.residual) + r * N : nullptr;
    T* sum_out = Residual ? static_cast<T*>(a.sum) + r * N : nullptr;
    T* y = static_cast<T*>(a.y) + r * N;
    const T* s = Residual ? sum_out : x;

    // mean; with a residual the rounded sum is written here and read back from the cache
    vf m0{}, m1{}, m2{}, m3{};
    auto take = [&](int64_t i) {
      if constexpr (!Residual) return load(x + i);
      store(sum_out + i, load(x + i) + load(res + i));
      return load(sum_out + i);
    };
    int64_t i = 0;
    for (; i + 4 * VL <= N; i += 4 * VL) {
      m0 += take(i), m1 += take(i + VL), m2 += take(i + 2 * VL), m3 += take(i + 3 * VL);
    }
    for (; i < body; i += VL) m0 += take(i);
    if (tail) {
      if constexpr (Residual) store_n(sum_out + body, load_n(x + body, tail) + load_n(res + body, tail), tail);
      m1 += load_n(s + body, tail);
    }
    const float mean = sum((m0 + m1) + (m2 + m3)) * inv_n;

    vf v0{}, v1{}, v2{}, v3{};
    auto square = [&](int64_t j) {
      const vf d = load(s + j) - mean;
      return d * d;
    };
    for (i = 0; i + 4 * VL <= N; i += 4 * VL) {
      v0 += square(i), v1 += square(i + VL), v2 += square(i + 2 * VL), v3 += square(i + 3 * VL);
    }
    for (; i < body; i += VL) v0 += square(i);
    if (tail) {
      const vf d = load_n(s + body, tail, mean) - mean;
      v1 += d * d;
    }
    const float rstd = 1.0f / std::sqrt(sum((v0 + v1) + (v2 + v3)) * inv_n + a.eps);
    a.mean[r] = mean, a.rstd[r] = rstd;

    auto affine = [&](vf v, vf w, vf b) { return (v - mean) * rstd * w + b; };
    if (weight && bias) {
      for (i = 0; i < body; i += VL) store(y + i, affine(load(s + i), load(weight + i), load(bias + i)));
    } else {
      for (i = 0; i < body; i += VL)
        store(y + i, affine(load(s + i), weight ? load(weight + i) : splat(1.0f), bias ? load(bias + i) : vf{}));
    }
    if (tail)
      store_n(y + body,
              affine(load_n(s + body, tail), weight ? load_n(weight + body, tail) : splat(1.0f),
                     bias ? load_n(bias + body, tail) : vf{}),
              tail);
  };
  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++) for_rows(a.rows, w, n, row);
  };
  parallel(n, job);
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  g = dy * weight,  xhat = (s - mean) * rstd
template <class T, class P>
void backward(const LayerNormBackward& a, const Parallel& parallel) {
  const int64_t N = a.cols, body = N / VL * VL;
  const int tail = int(N - body);
  const float inv_n = 1.0f / float(N);
  const P* weight = static_cast<const P*>(a.weight);
  int n = workers(a.rows, N, parallel.threads);
  if (n > a.partial_rows) n = int(a.partial_rows);
  const bool params = a.dweight || a.dbias;

  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; w++) {
      float* dw = a.partial + w * N;
      float* db = a.partial + (a.partial_rows + w) * N;
      if (params) memset(dw, 0, sizeof(float) * N), memset(db, 0, sizeof(float) * N);
      for_rows(a.rows, w, n, [&](int64_t r) {
        const T* dy = static_cast<const T*>(a.dy) + r * N;
        const T* s = static_cast<const T*>(a.s) + r * N;
        const T* dsum = a.dsum ? static_cast<const T*>(a.dsum) + r * N : nullptr;
        T* dx = static_cast<T*>(a.dx) + r * N;
        const float mean = a.mean[r], rstd = a.rstd[r];

        vf g0{}, g1{}, gx0{}, gx1{};
        auto first = [&](int64_t i, vf& g_sum, vf& gx_sum) {
          const vf d = load(dy + i), xhat = (load(s + i) - mean) * rstd;
          const vf g = weight ? d * load(weight + i) : d;
          g_sum += g, gx_sum += g * xhat;
          if (params) store(dw + i, load(dw + i) + d * xhat), store(db + i, load(db + i) + d);
        };
        int64_t i = 0;
        for (; i + 2 * VL <= N; i += 2 * VL) first(i, g0, gx0), first(i + VL, g1, gx1);
        for (; i < body; i += VL) first(i, g0, gx0);
        if (tail) {
          const vf d = load_n(dy + body, tail), xhat = (load_n(s + body, tail, mean) - mean) * rstd;
          const vf g = weight ? d * load_n(weight + body, tail) : d;
          g1 += g, gx1 += g * xhat;
          if (params) {
            store_n(dw + body, load_n(dw + body, tail) + d * xhat, tail);
            store_n(db + body, load_n(db + body, tail) + d, tail);
          }
        }
        const float mg = sum(g0 + g1) * inv_n, mgx = sum(gx0 + gx1) * inv_n;

        auto second = [&](vf d, vf v, vf wt, vf extra) {
          return rstd * (d * wt - mg - (v - mean) * rstd * mgx) + extra;
        };
        for (i = 0; i < body; i += VL)
          store(dx + i, second(load(dy + i), load(s + i), weight ? load(weight + i) : splat(1.0f),
                               dsum ? load(dsum + i) : vf{}));
        if (tail)
          store_n(dx + body,
                  second(load_n(dy + body, tail), load_n(s + body, tail),
                         weight ? load_n(weight + body, tail) : splat(1.0f), dsum ? load_n(dsum + body, tail) : vf{}),
                  tail);
      });
    }
  };
  parallel(n, job);

  auto reduce = [&](const float* partial, void* out) {
    if (!out) return;
    P* o = static_cast<P*>(out);
    for (int64_t i = 0; i < body; i += VL) {
      vf t = load(partial + i);
      for (int w = 1; w < n; w++) t += load(partial + w * N + i);
      store(o + i, t);
    }
    for (int64_t i = body; i < N; i++) {
      float t = partial[i];
      for (int w = 1; w < n; w++) t += partial[w * N + i];
      put(o + i, t);
    }
  };
  reduce(a.partial, a.dweight);
  reduce(a.partial + a.partial_rows * N, a.dbias);
}

template <class T, class P>
void forward(const LayerNormForward& a, const Parallel& p) {
  a.residual ? forward<T, P, true>(a, p) : forward<T, P, false>(a, p);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& a, const Parallel& p) {
  if (a.dtype == DType::f32) return a.param_dtype == DType::f32 ? forward<float, float>(a, p) : forward<float, bf16>(a, p);
  a.param_dtype == DType::f32 ? forward<bf16, float>(a, p) : forward<bf16, bf16>(a, p);
}

void layer_norm_backward(const LayerNormBackward& a, const Parallel& p) {
  if (a.dtype == DType::f32)
    return a.param_dtype == DType::f32 ? backward<float, float>(a, p) : backward<float, bf16>(a, p);
  a.param_dtype == DType::f32 ? backward<bf16, float>(a, p) : backward<bf16, bf16>(a, p);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
