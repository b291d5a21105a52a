// swiglu and geglu on the CPU. Contract: seqfuse/gated.h
//
// Forward reads gate and up once and writes y once; backward reads dy, gate and up once and writes dgate and dup once.
// The activation is computed again in the backward pass: it costs less than reading a stored one.
#include "seqfuse/gated.h"

#include <type_traits>

#include "cpu/deal.h"
#include "cpu/vec_pair.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

struct Value {
  vf y, slope;  // act(g), act'(g)
};

// t poly(t) for erfc(z) = t poly(t) exp(-z^2), z >= 0
SEQFUSE_INLINE vf erfc_factor(vf z, VecMath) {  // Abramowitz and Stegun 7.1.26, 1.5e-7
  const vf t = reciprocal(1.0f + 0.3275911f * z);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  return (p * t + 0.254829592f) * t;
}
SEQFUSE_INLINE vf erfc_factor(vf z, ShortMath) {  // fitted: relative error 1.8e-4 up to z = 6.5
  const vf t = ShortMath::reciprocal(1.0f + 0.42f * z);
  vf p = splat(0.44497309f);
  p = p * t + 0.03771886f;
  p = p * t + 0.28509362f;
  return (p * t + 0.23239071f) * t;
}

// M: how exactly
template <Activation A, class M>
SEQFUSE_INLINE Value activate(vf g) {
  if constexpr (A == Activation::silu) {
    const auto [s, rest] = M::sigmoid_and_rest(g);
    return {g * s, s + s * rest * g};
  } else if constexpr (A == Activation::gelu) {
    // Phi(g) = erfc(-g / sqrt 2) / 2
    const vf z = as_float(as_bits(g) & 0x7fffffffu) * 0.70710678118654752f;
    const vf e = M::exp(-z * z), tail = 0.5f * erfc_factor(z, M()) * e;
    const vf phi = select(g < vf{}, tail, 1.0f - tail);
    return {g * phi, phi + g * e * 0.39894228040143268f};
  } else {
    // 0.5 (1 + tanh(a)) = sigmoid(2 a)
    const vf square = g * g, a2 = g * (1.5957691216057308f + 0.07135481627159915f * square);
    const auto [s, rest] = M::sigmoid_and_rest(a2);
    return {g * s, s + s * rest * g * (1.5957691216057308f + 3.0f * 0.07135481627159915f * square)};
  }
}

// Phi(g), the normal distribution's integral, to 2e-7: 1/2 + g p(g^2) / q(g^2), fitted up to |g| = 4 sqrt 2, from where
// on it is 0 or 1. Cheaper than activate's where the slope, which shares an exponential with that, is not wanted.
SEQFUSE_INLINE vf normal_integral(vf g) {
  constexpr float end = 5.65685425f;
  const vf x = clamp(g, -end, end), u = x * x;
  vf p = splat(1.06160065e-10f);
  p = p * u - 2.19897302e-08f;
  p = p * u + 3.4367859e-06f;
  p = p * u + 0.000189719161f;
  p = p * u + 0.00463445495f;
  p = p * u + 0.0378196632f;
  p = p * u + 0.39894209f;
  vf q = splat(6.86241838e-05f);
  q = q * u + 0.00194383785f;
  q = q * u + 0.0301994495f;
  q = q * u + 0.261463672f;
  q = q * u + 1.0f;
  const vf phi = 0.5f + x * p * reciprocal(q);
  return select(g < splat(-end), vf{}, phi);
}

// act(g) alone
template <Activation A, class M>
SEQFUSE_INLINE vf value(vf g) {
  if constexpr (A == Activation::gelu && std::is_same_v<M, VecMath>)
    return g * normal_integral(g);
  else
    return activate<A, M>(g).y;
}

template <class T, Activation A, bool Stream>
void forward(const GatedForward& a, const Parallel& parallel) {
  deal_rows(parallel, a.rows, a.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T *gate = static_cast<const T*>(a.gate) + r * a.gate_step,
              *up = static_cast<const T*>(a.up) + r * a.up_step;
      T* y = static_cast<T*>(a.y) + r * a.cols;
      for_pairs(a.cols, [=](int64_t i, int n) {
        const vp g = take_pair(gate + i, n), u = take_pair(up + i, n);
        give_pair<Stream>(y + i, vp{value<A, MathFor<T>>(g.a) * u.a, value<A, MathFor<T>>(g.b) * u.b}, n);
      });
    }
    if constexpr (Stream) fence_streams();
  });
}

template <class T, Activation A, bool Stream>
void backward(const GatedBackward& a, const Parallel& parallel) {
  deal_rows(parallel, a.rows, a.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T *gate = static_cast<const T*>(a.gate) + r * a.gate_step,
              *up = static_cast<const T*>(a.up) + r * a.up_step;
      const T* dy = static_cast<const T*>(a.dy) + r * a.cols;
      T *dgate = static_cast<T*>(a.dgate) + r * a.cols, *dup = static_cast<T*>(a.dup) + r * a.cols;
      for_pairs(a.cols, [=](int64_t i, int n) {
        const vp g = take_pair(gate + i, n), u = take_pair(up + i, n), d = take_pair(dy + i, n);
        const Value x = activate<A, MathFor<T>>(g.a), z = activate<A, MathFor<T>>(g.b);
        give_pair<Stream>(dgate + i, d * u * vp{x.slope, z.slope}, n);
        give_pair<Stream>(dup + i, d * vp{x.y, z.y}, n);
      });
    }
    if constexpr (Stream) fence_streams();
  });
}

// f<Activation, Stream>() for the run-time choices.
template <class T, class Args, class F>
void choose(const Args& a, int tensors, const void* out, const void* other, F f) {
  const bool stream = streams<T>(out, tensors, a.rows, a.cols) && can_stream(other, a.cols * int64_t(sizeof(T)));
  auto with = [&]<Activation A>() { stream ? f.template operator()<A, true>() : f.template operator()<A, false>(); };
  if (a.activation == Activation::silu) return with.template operator()<Activation::silu>();
  if (a.activation == Activation::gelu) return with.template operator()<Activation::gelu>();
  with.template operator()<Activation::gelu_tanh>();
}

template <class T>
void forward(const GatedForward& a, const Parallel& p) {
  choose<T>(a, 3, a.y, a.y, [&]<Activation A, bool Stream>() { forward<T, A, Stream>(a, p); });
}

template <class T>
void backward(const GatedBackward& a, const Parallel& p) {
  choose<T>(a, 5, a.dgate, a.dup, [&]<Activation A, bool Stream>() { backward<T, A, Stream>(a, p); });
}

}  // namespace

void gated_forward(const GatedForward& a, const Parallel& p) {
  if (a.dtype == DType::bf16) return forward<bf16>(a, p);
  if constexpr (!has_dot) forward<float>(a, p);  // see dispatch.cpp
}

void gated_backward(const GatedBackward& a, const Parallel& p) {
  if (a.dtype == DType::bf16) return backward<bf16>(a, p);
  if constexpr (!has_dot) backward<float>(a, p);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
