// One time step of the recurrent scan, backward, in one kernel: the gradient that reaches h_t through the later step,
// then the gates' gradients. Contract and maths: seqfuse/rnn.h
//
//   dh_t = da_{t+1} @ w_hh + (GRU: dh_{t+1} * z_{t+1}) + dy_t;   da_t, dc_{t-1} by the cell (common/gates.h)
//
// da_{t+1} is read back from dxg (and dan) as the later step wrote it, rounded to the dtype; the product runs over a
// transposed copy of w_hh, made once a call. What bypasses w_hh (the LSTM's dc, the GRU's dh * z) is carried in fp32.
// One more launch after the first time step gives dh0 and dc0; last, db_hh sums all rows of dxg (and dan).
// Memory traffic allowed: w_hh once per 32 batch rows, da_{t+1} once per 8 units, everything else once.
#pragma once
#include "cuda/column_sum.cuh"
#include "cuda/rnn_forward.cuh"

namespace seqfuse::cuda {

template <class T>
struct BackwardStep {
  int B, H;
  bool relu;
  Left<T> da;                             // gradients of a of the later step [B, G*H]; width 0 in the last time step
  const T* w_t;                           // [H, G*H]
  const T* dh_n;                          // last time step only, or null
  const T* dc_n;                          // likewise
  float* carry;                           // [B, H]: LSTM dc, GRU dh * z; read and written by the same thread
  Rows<const T> dy;                       // or null
  Rows<const T> y;                        // RNN only
  Rows<const T> gates;                    // LSTM, GRU
  Rows<const float> cells, cells_before;  // LSTM; cells_before is null in the first time step
  const T* c0;
  Rows<const T> h_before;  // GRU
  Rows<T> dxg;             // null: this is the launch for dh0 and dc0
  Rows<T> dan;
  T* dh0;
  T* dc0;
};

template <Cell C, class T, bool Aligned>
SEQFUSE_KERNEL(kStepThreads, kStepBlocks<T>)
rnn_backward_step(BackwardStep<T> p) {
  using dev::Math;
  constexpr bool kCarries = C != Cell::rnn_tanh;
  const int row0 = dev::block_x() * kRows, unit0 = dev::block_y() * kUnits, H = p.H;
  const int b = row0 + dev::thread() / kUnits, u = unit0 + dev::thread() % kUnits;
  const bool mine = b < p.B && u < H, last = p.da.width == 0;
  const int64_t at = int64_t(b) * H + u;

  // asked for before the product, so that they arrive while it runs
  float carry = 0.0f, dh = 0.0f, saved[4] = {}, state = 0.0f, before = 0.0f;
  if (mine) {
    if (last) {
      if (p.dh_n) dh = dev::widen(p.dh_n[at]);
      if (C == Cell::lstm && p.dc_n) carry = dev::widen(p.dc_n[at]);
    } else if (kCarries) {
      carry = p.carry[at];
    }
    if (p.dxg.data) {
      if (p.dy.data) dh += dev::widen(*p.dy.at(b, u));
      if constexpr (C == Cell::rnn_tanh) {
        state = dev::widen(*p.y.at(b, u));
      } else {
#pragma unroll
        for (int g = 0; g < 4; g++) saved[g] = dev::widen(*p.gates.at(b, int64_t(g) * H + u));
      }
      if constexpr (C == Cell::gru) before = dev::widen(*p.h_before.at(b, u));
      if constexpr (C == Cell::lstm) {
        state = *p.cells.at(b, u);
        before = p.cells_before.data ? *p.cells_before.at(b, u) : dev::widen(p.c0[at]);
      }
    }
  }

  float product[1];
  step_product<T, 1, Aligned>(product, p.da, p.w_t, row0, p.B, unit0, H);
  if (!mine) return;
  dh += product[0];
  if (C == Cell::gru) dh += carry;

  if (!p.dxg.data) {
    p.dh0[at] = dev::narrow<T>(dh);
    if (C == Cell::lstm) p.dc0[at] = dev::narrow<T>(carry);
    return;
  }
  if constexpr (C == Cell::lstm) {
    const LstmGrad<float> g = lstm_backward<Math>(saved[0], saved[1], saved[2], saved[3], state, before, dh, carry);
    const float da[4] = {g.di, g.df, g.dg, g.dout};
#pragma unroll
    for (int k = 0; k < 4; k++) *p.dxg.at(b, int64_t(k) * H + u) = dev::narrow<T>(da[k]);
    p.carry[at] = g.dc;
  } else if constexpr (C == Cell::gru) {
    const GruGrad<float> g = gru_backward(saved[0], saved[1], saved[2], saved[3], before, dh);
    const float da[3] = {g.dr, g.dz, g.dn};
#pragma unroll
    for (int k = 0; k < 3; k++) *p.dxg.at(b, int64_t(k) * H + u) = dev::narrow<T>(da[k]);
    *p.dan.at(b, u) = dev::narrow<T>(g.dan);
    p.carry[at] = g.dh;
  } else {
    const float da = p.relu ? rnn_backward<Math, true>(state, dh) : rnn_backward<Math, false>(state, dh);
    *p.dxg.at(b, u) = dev::narrow<T>(da);
  }
}

constexpr int kTransposeTile = 32;

// out[c, r] = in[r, c]; blocks (columns, rows) of kTransposeTile squared, kSumThreads threads
template <class T>
SEQFUSE_KERNEL(kSumThreads, 1)
transpose(const T* in, T* out, int rows, int cols) {
  struct Shared {
    T tile[kTransposeTile][kTransposeTile + 1];  // one wider, so that columns fall into different banks
  };
  Shared& s = dev::shared<Shared>();
  constexpr int kStep = kSumThreads / kTransposeTile;
  const int row0 = dev::block_y() * kTransposeTile, col0 = dev::block_x() * kTransposeTile;
  for (int i = dev::warp(); i < kTransposeTile; i += kStep)
    if (row0 + i < rows && col0 + dev::lane() < cols)
      s.tile[i][dev::lane()] = in[int64_t(row0 + i) * cols + col0 + dev::lane()];
  dev::barrier();
  for (int i = dev::warp(); i < kTransposeTile; i += kStep)
    if (col0 + i < cols && row0 + dev::lane() < rows)
      out[int64_t(col0 + i) * rows + row0 + dev::lane()] = s.tile[dev::lane()][i];
}

// A sequence [T, B, width] whose columns from `split` on live in a second array, as Left has it for one step.
template <class T>
struct SequencePair {
  const T* first;
  const T* second;
  Strides first_strides, second_strides;
  int split, width;
};

// First half of db_hh: partial[block_y, c] = sum over this block's (t, b), every blocks_y-th group of 8 of them.
template <class T>
SEQFUSE_KERNEL(kSumThreads, 1)
sequence_sum(SequencePair<T> p, float* partial, int64_t rows, int64_t B, int blocks_y) {
  const int c = dev::block_x() * kSumColumns + dev::lane();
  const bool second = c >= p.split;
  const T* data = second ? p.second : p.first;
  const Strides strides = second ? p.second_strides : p.first_strides;
  float sum = 0.0f;
  if (c < p.width)
    for (int64_t r = int64_t(dev::block_y()) * (kSumThreads / dev::kWarp) + dev::warp(); r < rows;
         r += int64_t(blocks_y) * (kSumThreads / dev::kWarp))
      sum += dev::widen(data[r / B * strides.t + r % B * strides.b + (second ? c - p.split : c)]);
  const float total = sum_over_warps(sum);
  if (dev::warp() == 0 && c < p.width) partial[int64_t(dev::block_y()) * p.width + c] = total;
}

}  // namespace seqfuse::cuda
