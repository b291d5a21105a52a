// One step of a recurrent cell, element by element. Contract: seqfuse/rnn_cell.h, mathematics: common/gates.h
//
// Bound by memory: each input is read once and each output written once, where a chain of PyTorch ops moves every gate
// through memory once per op.
#include "seqfuse/rnn_cell.h"

#include "common/gates.h"
#include "cpu/vec.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

constexpr int64_t kGrain = 1 << 12;  // elements a worker should have

template <class T>
SEQFUSE_INLINE vf take_or_zero(const T* p, int64_t i, int n) {
  return p ? take(p + i, n) : vf{};
}

// f(row, unit, n) for vectors of n units
template <class F>
void for_units(int64_t B, int64_t H, const Parallel& parallel, F f) {
  int64_t n = B * H / kGrain + 1;
  if (n > parallel.threads) n = parallel.threads;
  if (n > B) n = B;
  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t b = B * begin / n; b < B * end / n; b++) {
      int64_t u = 0;
      for (; u + VL <= H; u += VL) f(b, u, VL);
      if (u < H) f(b, u, int(H - u));
    }
  };
  parallel(n, job);
}

template <class T>
void forward(const RnnCellForward& args, const Parallel& parallel) {
  const int64_t H = args.H;
  const T* xg = static_cast<const T*>(args.xg);
  const T* a = static_cast<const T*>(args.a);
  const T* h = static_cast<const T*>(args.h);
  const T* c = static_cast<const T*>(args.c);
  T* h_out = static_cast<T*>(args.h_out);
  T* c_out = static_cast<T*>(args.c_out);
  T* gates = static_cast<T*>(args.gates);
  using M = VecMath;

  switch (args.cell) {
    case Cell::lstm:
      return for_units(args.B, H, parallel, [=](int64_t b, int64_t u, int n) {
        const int64_t g = b * 4 * H + u, at = b * H + u;
        auto gate = [=](int k) { return take(xg + g + k * H, n) + take(a + g + k * H, n); };
        const auto s = lstm_forward<M>(gate(0), gate(1), gate(2), gate(3), take(c + at, n));
        give(h_out + at, s.h, n), give(c_out + at, s.c, n);
        if (!gates) return;
        give(gates + g, s.i, n), give(gates + g + H, s.f, n);
        give(gates + g + 2 * H, s.g, n), give(gates + g + 3 * H, s.o, n);
      });
    case Cell::gru:
      return for_units(args.B, H, parallel, [=](int64_t b, int64_t u, int n) {
        const int64_t g = b * 3 * H + u, at = b * H + u, save = b * 4 * H + u;
        auto gate = [=](int k) { return take(xg + g + k * H, n) + take(a + g + k * H, n); };
        const vf an = take(a + g + 2 * H, n);
        const auto s = gru_forward<M>(gate(0), gate(1), take(xg + g + 2 * H, n), an, take(h + at, n));
        give(h_out + at, s.h, n);
        if (!gates) return;
        give(gates + save, s.r, n), give(gates + save + H, s.z, n);
        give(gates + save + 2 * H, s.n, n), give(gates + save + 3 * H, an, n);
      });
    default:
      const bool relu = args.cell == Cell::rnn_relu;
      return for_units(args.B, H, parallel, [=](int64_t b, int64_t u, int n) {
        const int64_t at = b * H + u;
        const vf v = take(xg + at, n) + take(a + at, n);
        give(h_out + at, relu ? rnn_forward<M, true>(v) : rnn_forward<M, false>(v), n);
      });
  }
}

template <class T>
void backward(const RnnCellBackward& args, const Parallel& parallel) {
  const int64_t H = args.H, ld = args.ld;
  const T* dh_out = static_cast<const T*>(args.dh_out);
  const T* dc_out = static_cast<const T*>(args.dc_out);
  const T* gates = static_cast<const T*>(args.gates);
  const T* h = static_cast<const T*>(args.h);
  const T* c = static_cast<const T*>(args.c);
  const T* h_out = static_cast<const T*>(args.h_out);
  const T* c_out = static_cast<const T*>(args.c_out);
  T* dxg = static_cast<T*>(args.dxg);
  T* da = static_cast<T*>(args.da);
  T* dh = static_cast<T*>(args.dh);
  T* dc = static_cast<T*>(args.dc);
  using M = VecMath;

  switch (args.cell) {
    case Cell::lstm:
      return for_units(args.B, H, parallel, [=](int64_t b, int64_t u, int n) {
        const int64_t g = b * 4 * H + u, at = b * H + u;
        auto gate = [=](int k) { return take(gates + g + k * H, n); };
        const auto r = lstm_backward<M>(gate(0), gate(1), gate(2), gate(3), take(c_out + at, n), take(c + at, n),
                                        take_or_zero(dh_out, at, n), take_or_zero(dc_out, at, n));
        T* out = dxg + b * ld + u;
        give(out, r.di, n), give(out + H, r.df, n), give(out + 2 * H, r.dg, n), give(out + 3 * H, r.dout, n);
        give(dc + at, r.dc, n);
      });
    case Cell::gru:
      return for_units(args.B, H, parallel, [=](int64_t b, int64_t u, int n) {
        const int64_t g = b * ld + u, at = b * H + u, saved = b * 4 * H + u;
        auto gate = [=](int k) { return take(gates + saved + k * H, n); };
        const auto r = gru_backward(gate(0), gate(1), gate(2), gate(3), take(h + at, n), take_or_zero(dh_out, at, n));
        give(dxg + g, r.dr, n), give(dxg + g + H, r.dz, n), give(dxg + g + 2 * H, r.dn, n);
        give(da + g, r.dr, n), give(da + g + H, r.dz, n), give(da + g + 2 * H, r.dan, n);
        give(dh + at, r.dh, n);
      });
    default:
      const bool relu = args.cell == Cell::rnn_relu;
      return for_units(args.B, H, parallel, [=](int64_t b, int64_t u, int n) {
        const int64_t at = b * H + u;
        const vf v = take(h_out + at, n), d = take_or_zero(dh_out, at, n);
        give(dxg + b * ld + u, relu ? rnn_backward<M, true>(v, d) : rnn_backward<M, false>(v, d), n);
      });
  }
}

}  // namespace

void rnn_cell_forward(const RnnCellForward& args, const Parallel& parallel) {
  args.dtype == DType::f32 ? forward<float>(args, parallel) : forward<bf16>(args, parallel);
}

void rnn_cell_backward(const RnnCellBackward& args, const Parallel& parallel) {
  args.dtype == DType::f32 ? backward<float>(args, parallel) : backward<bf16>(args, parallel);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
