// Loss and gradient of rows of logits on the CPU. Contract: seqfuse/cross_entropy.h
//
// A row of logits comes from memory once and its gradient goes back once, in the same place. Between them a thread
// passes over the row up to three times (largest, exponentials and their sum, gradient) while it lies in the
// second-level cache: a row of 32000 floats is 128 kB. In fp32 the exponentials are kept where the gradient will be, so
// each is taken once; in bf16, where keeping them would round twice, and under a softcap, whose slope needs the logit,
// they are taken again.
#include "seqfuse/cross_entropy.h"

#include <cmath>

#include "cpu/deal.h"
#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

SEQFUSE_INLINE float largest_or_nan(vf x) {
  float m = x[0];
  for (int i = 1; i < VL; i++) m = x[i] > m || x[i] != x[i] ? x[i] : m;  // a NaN wins
  return m;
}

SEQFUSE_INLINE float exp1(float x) {
  return exp(splat(x))[0];
}

// max that takes a NaN from either side
SEQFUSE_INLINE vf max_or_nan(vf a, vf b) {
  return select((vi)(b > a) | (vi)(b != b), b, a);
}

// x where an element exists, 0 beyond the row's end
SEQFUSE_INLINE vf existing(vf x, int n) {
  if (n == VL) return x;
  float t[VL];
  store(t, x);
  for (int i = 0; i < VL; i++)
    if (i >= n) t[i] = 0.0f;
  return load(t);
}

template <bool Capped>
struct Cap {
  float cap, inverse;
  SEQFUSE_INLINE vf operator()(vf x) const {
    if constexpr (Capped) return cap * tanh(x * inverse);
    return x;
  }
  SEQFUSE_INLINE vf slope(vf u) const {
    const vf t = u * inverse;
    return 1.0f - t * t;
  }
  SEQFUSE_INLINE float one(float x) const { return (*this)(splat(x))[0]; }
};

constexpr float kNone = -__builtin_inff();

// f(i, n) over the row two vectors at a time, so that sums and maxima have two independent chains
template <class F>
SEQFUSE_INLINE void for_two(int64_t N, F f) {
  int64_t i = 0;
  for (; i + 2 * VL <= N; i += 2 * VL) f(i, VL, 0), f(i + VL, VL, 1);
  for (; i + VL <= N; i += VL) f(i, VL, 0);
  if (i < N) f(i, int(N - i), 1);
}

template <class T, bool Capped>
SEQFUSE_INLINE float row_largest(const T* x, int64_t N, Cap<Capped> cap) {
  vf m[2] = {splat(kNone), splat(kNone)};
  for_two(N, [&](int64_t i, int n, int k) { m[k] = max_or_nan(m[k], take(x + i, n, kNone)); });
  return cap.one(largest_or_nan(max_or_nan(m[0], m[1])));  // the cap is monotonic
}

// what the gradient of one row is made of: (slope p_j - smooth class_weight_j) * derivative of the cap
struct Gradient {
  float p_factor, smooth;  // scale A, scale eps / V
  const float* class_weight;
};

template <class T, bool Capped>
struct Row {
  const CrossEntropyRows& a;
  Cap<Capped> cap;
  static constexpr bool kKeeps = sizeof(T) == 4 && !Capped;  // exponentials are kept where the gradient will be

  // sum_j exp(u_j - m); and sum_j class_weight_j (u_j - m) with label smoothing
  void sums(const T* x, T* kept, float m, float& total, float& weighted) const {
    vf s[2] = {}, w[2] = {};
    const vf top = splat(m);
    const float* cw = a.class_weight;
    const bool smooth = a.label_smoothing > 0.0f;
    for_two(a.cols, [&](int64_t i, int n, int k) {
      const vf u = cap(take(x + i, n, kNone));
      vf e = exp(u - top);
      if (n != VL) e = existing(e, n);
      s[k] = s[k] + e;
      if (smooth) w[k] = w[k] + existing(cw ? (u - top) * take(cw + i, n) : u - top, n);
      if constexpr (kKeeps)
        if (kept) give(kept + i, e, n);
    });
    total = sum(s[0] + s[1]), weighted = sum(w[0] + w[1]);
  }

  void gradient_of_kept(T* dx, Gradient g, float inverse_total) const {
    const vf factor = splat(g.p_factor * inverse_total), smooth = splat(g.smooth);
    const float* cw = g.class_weight;
    for_vectors(0, a.cols, [=](int64_t i, int n) {
      const vf d = take(dx + i, n) * factor;
      give(dx + i, d - (cw ? smooth * take(cw + i, n) : smooth), n);
    });
  }

  void gradient(const T* x, T* dx, Gradient g, float lse) const {
    const vf factor = splat(g.p_factor), smooth = splat(g.smooth), log_sum = splat(lse);
    const float* cw = g.class_weight;
    const Cap<Capped> c = cap;
    for_vectors(0, a.cols, [=](int64_t i, int n) {
      const vf u = c(take(x + i, n, 0.0f));
      vf d = MathFor<T>::exp(u - log_sum) * factor - (cw ? smooth * take(cw + i, n) : smooth);
      if constexpr (Capped) d = d * c.slope(u);
      give(dx + i, d, n);
    });
  }

  void operator()(int64_t r) const {
    const int64_t V = a.cols, t = a.target[r];
    const T* x = static_cast<const T*>(a.logits) + r * a.stride;
    T* dx = a.scale ? static_cast<T*>(a.dlogits) + r * a.stride : nullptr;
    if (t == a.ignore_index) {
      if (a.loss) a.loss[r] = 0.0f, a.lse[r] = 0.0f;
      if (dx) memset(dx, 0, sizeof(T) * size_t(V));
      return;
    }
    const float eps = a.label_smoothing, w = a.class_weight ? a.class_weight[t] : 1.0f;
    const float u_target = cap.one(widen(x[t]));
    float total = 0.0f, lse;
    if (a.loss) {
      const float m = row_largest(x, V, cap);
      float weighted;
      sums(x, dx, m, total, weighted);
      // what all logits have in common is taken off before it can round; where all are -inf, so is their sum
      const float log_total = std::log(total);
      lse = m == kNone ? m : m + log_total;
      float loss = (1.0f - eps) * w * ((m - u_target) + log_total) + a.z_loss * w * lse * lse;
      if (eps > 0.0f) loss += eps * (a.class_weight_sum / float(V) * log_total - weighted / float(V));
      a.loss[r] = loss, a.lse[r] = lse;
    } else {
      lse = a.lse[r];
    }
    if (!dx) return;
    const float scale = a.scale[r * a.scale_step];
    const float A = (1.0f - eps) * w + eps * (a.class_weight_sum / float(V)) + 2.0f * a.z_loss * w * lse;
    const Gradient g{scale * A, scale * eps / float(V), eps > 0.0f ? a.class_weight : nullptr};
    if (kKeeps && a.loss)
      gradient_of_kept(dx, g, 1.0f / total);
    else
      gradient(x, dx, g, lse);
    float d = A * exp1(u_target - lse) - (1.0f - eps) * w - eps / float(V) * (g.class_weight ? w : 1.0f);
    if constexpr (Capped) d *= cap.slope(splat(u_target))[0];
    put(dx + t, scale * d);
  }
};

template <class T, bool Capped>
void rows(const CrossEntropyRows& a, const Parallel& parallel) {
  const Row<T, Capped> row{a, {a.softcap, Capped ? 1.0f / a.softcap : 0.0f}};
  deal_rows(parallel, a.rows, a.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) row(r);
  });
}

template <class T>
struct KlRow {
  const KlRows& a;
  float inverse;  // of the temperature

  float log_sum(const T* x) const {
    const float m = row_largest<T, false>(x, a.cols, {0, 0}) * inverse;
    vf s[2] = {};
    const vf top = splat(m), scale = splat(inverse);
    for_two(a.cols,
            [&](int64_t i, int n, int k) { s[k] = s[k] + existing(exp(take(x + i, n, kNone) * scale - top), n); });
    return m + std::log(sum(s[0] + s[1]));
  }

  void operator()(int64_t r) const {
    const int64_t V = a.cols;
    const T *q = static_cast<const T*>(a.student) + r * V, *p = static_cast<const T*>(a.teacher) + r * V;
    T* dq = a.scale ? static_cast<T*>(a.dstudent) + r * V : nullptr;
    if (a.keep && !a.keep[r]) {
      a.loss[r] = 0.0f;
      if (dq) memset(dq, 0, sizeof(T) * size_t(V));
      return;
    }
    const vf log_q = splat(log_sum(q)), log_p = splat(log_sum(p)), by = splat(inverse);
    const vf slope = splat(dq ? a.scale[r * a.scale_step] * a.temperature : 0.0f);
    vf total[2] = {};
    for_two(V, [&](int64_t i, int n, int k) {
      const vf lq = take(q + i, n) * by - log_q, lp = take(p + i, n) * by - log_p;
      const vf e = exp(lp);
      // a word that the teacher rules out (-inf) adds nothing
      total[k] = total[k] + existing(select(lp == splat(kNone), vf{}, e * (lp - lq)), n);
      if (dq) give(dq + i, slope * (exp(lq) - e), n);
    });
    a.loss[r] = a.temperature * a.temperature * sum(total[0] + total[1]);
  }
};

template <class T>
void kl(const KlRows& a, const Parallel& parallel) {
  const KlRow<T> row{a, 1.0f / a.temperature};
  deal_rows(parallel, a.rows, a.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) row(r);
  });
}

}  // namespace

void cross_entropy_rows(const CrossEntropyRows& a, const Parallel& p) {
  const bool capped = a.softcap > 0.0f;
  if (a.dtype == DType::bf16) return capped ? rows<bf16, true>(a, p) : rows<bf16, false>(a, p);
  if constexpr (!has_dot) capped ? rows<float, true>(a, p) : rows<float, false>(a, p);  // see dispatch.cpp
}

void kl_rows(const KlRows& a, const Parallel& p) {
  if (a.dtype == DType::bf16) return kl<bf16>(a, p);
  if constexpr (!has_dot) kl<float>(a, p);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
