// The recurrent cells' pointwise mathematics, once, for host vectors and for the device.
// V is float or a SIMD vector of floats; M supplies sigmoid(V), tanh(V) and relu-like selects for that V:
//   struct M { static V sigmoid(V); static V tanh(V); static V relu(V); static V step(V); };   // step(x) = x > 0
#pragma once

#if defined(__CUDACC__)
#define SEQFUSE_HD __host__ __device__ __forceinline__
#else
#define SEQFUSE_HD inline __attribute__((always_inline))
#endif

namespace seqfuse {

template <class V>
struct LstmState {
  V i, f, g, o, c, h;
};

// The second half of a step, from activated gates: a kernel may activate many gates before (they are independent).
template <class M, class V>
SEQFUSE_HD LstmState<V> lstm_state(V i, V f, V g, V o, V c) {
  LstmState<V> s{i, f, g, o, f * c + i * g, o};
  s.h = o * M::tanh(s.c);
  return s;
}

// ai..ao: the gates before their activation. c: the previous cell.
template <class M, class V>
SEQFUSE_HD LstmState<V> lstm_forward(V ai, V af, V ag, V ao, V c) {
  return lstm_state<M>(M::sigmoid(ai), M::sigmoid(af), M::tanh(ag), M::sigmoid(ao), c);
}

template <class V>
struct LstmGrad {
  V di, df, dg, dout, dc;  // before the activations; dc is the gradient of the previous cell
};

// dh, dc: gradients of this step's h and c. c: this step's cell, c_prev: the one before.
template <class M, class V>
SEQFUSE_HD LstmGrad<V> lstm_backward(V i, V f, V g, V o, V c, V c_prev, V dh, V dc) {
  LstmGrad<V> r;
  const V tc = M::tanh(c);
  const V dct = dc + dh * o * (1.0f - tc * tc);
  r.di = dct * g * i * (1.0f - i);
  r.df = dct * c_prev * f * (1.0f - f);
  r.dg = dct * i * (1.0f - g * g);
  r.dout = dh * tc * o * (1.0f - o);
  r.dc = dct * f;
  return r;
}

// With peepholes: from c_prev to i and f, from c to o; c is the cell before zoneout.
template <class M, class V>
SEQFUSE_HD LstmGrad<V> lstm_peephole_backward(LstmState<V> s, V c_prev, V dh, V dc, V peep_i, V peep_f, V peep_o) {
  const V dout = dh * M::tanh(s.c) * s.o * (1.0f - s.o);
  LstmGrad<V> r = lstm_backward<M>(s.i, s.f, s.g, s.o, s.c, c_prev, dh, dc + peep_o * dout);
  r.dc += peep_i * r.di + peep_f * r.df;
  return r;
}

template <class V>
struct GruState {
  V r, z, n, h;
};

// The second half of a step, from activated r and z.
template <class M, class V>
SEQFUSE_HD GruState<V> gru_state(V r, V z, V xn, V an, V h) {
  GruState<V> s{r, z, M::tanh(xn + r * an), h};
  s.h = s.n + z * (h - s.n);
  return s;
}

// ar, az: both parts of the gates, summed. xn: the input's part of n, an: the hidden state's (with its bias).
template <class M, class V>
SEQFUSE_HD GruState<V> gru_forward(V ar, V az, V xn, V an, V h) {
  return gru_state<M>(M::sigmoid(ar), M::sigmoid(az), xn, an, h);
}

template <class V>
struct GruGrad {
  V dr, dz, dn, dan, dh;  // dn: of xg_n; dan: of a_n; dh: the part that reaches h_{t-1} without w_hh
};

template <class V>
SEQFUSE_HD GruGrad<V> gru_backward(V r, V z, V n, V an, V h_prev, V dh) {
  GruGrad<V> g;
  g.dn = dh * (1.0f - z) * (1.0f - n * n);
  g.dz = dh * (h_prev - n) * z * (1.0f - z);
  g.dan = g.dn * r;
  g.dr = g.dn * an * r * (1.0f - r);
  g.dh = dh * z;
  return g;
}

template <class M, bool Relu, class V>
SEQFUSE_HD V rnn_forward(V a) {
  if constexpr (Relu) return M::relu(a);
  return M::tanh(a);
}

// h: this step's output. Returns the gradient before the activation.
template <class M, bool Relu, class V>
SEQFUSE_HD V rnn_backward(V h, V dh) {
  if constexpr (Relu) return dh * M::step(h);
  return dh * (1.0f - h * h);
}

}  // namespace seqfuse
