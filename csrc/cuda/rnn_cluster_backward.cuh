// The whole recurrent scan, backward, in one launch: read rnn_cluster.cuh first. Never yet run on a GPU.
//
// dh_{t-1} = da_t @ w_hh wants all units of da. Two ways to share it out over the N blocks of a cluster, in bytes that
// a block sends a step (N = 16, H = 512):
//   every block gets all of da and owns columns of w_hh:     16 rows x 32 units x G x 2 bytes to 15 others, LSTM: 60 KB
//   every block multiplies its own da by its rows of w_hh, and the partial dh [16, H] are added up where they belong:
//                                                            16 rows x 32 units x 4 bytes to 15 others, any cell: 30 KB
// The second it is. It also reads the fragments of 32 G gate rows per warp (4 KB for an LSTM) where the first reads
// those of all G * H (64 KB), and its A operand never leaves the block. Registers are the same: 2 G * K / 64 fragments
// a warp.
//
// A step of a block, 8 warps; warp w takes the 8-unit column tiles w, w + 8, ... of dh:
//   1. the loads for the next step's saved values are issued; they have the whole step to arrive
//   2. dh of two (row, unit) elements a thread: the N partial sums in the order of the blocks, plus dy and what
//   bypasses
//      w_hh; then the cell's gradients in fp32; da, rounded to the dtype, goes to shared memory               [barrier]
//   3. product: 2 G k-tiles x K / 64 column tiles a warp
//   4. accumulators, 16 bytes a lane, go to the block that owns the column tile, its own not excepted
//   5. dxg and dan go to global memory, meanwhile the partial sums of the other blocks arrive                  [wait]
// db_hh is summed in registers; each half of a cluster's rows leaves one row of `partial` for column_sum.
//
// Memory traffic allowed: w_hh once per cluster; dy, gates, cells (and y for RNN and GRU) once, dxg and dan once.
// Nothing that a step needs from another step or block goes through global memory.
//
// Synchronisation, as in the forward pass by counted bytes (st.async) instead of barriers. `part` is double-buffered:
// step i sends into part[(i + 1) % 2] of the blocks it has partial sums for, and reads part[i % 2] of its own.
// - What step i sends is read in step i + 1, after the wait for its last byte (release at complete_tx, acquire at
// wait).
// - A block reads part[(i + 1) % 2] for the last time in step i - 1, before the block barrier behind which it sends.
// Whoever
//   sends in step i has received from it in step i - 1. So nothing is overwritten before it is read.
// - In the same way the count of step i + 2, on the same mbarrier, cannot begin before all threads have seen step i's
// end.
// - `da` is double-buffered because a warp may go on to the next step while another still multiplies; the barrier of
// that
//   next step keeps it from going on further.
// - The cluster barrier before the loop says that every block has started and has set up its mbarriers. A block leaves
//   when all that was sent to it has come.
// Every sum has an order that depends on the shape only: results are the same bits every time.
#pragma once
#include "cuda/rnn_cluster.cuh"

namespace seqfuse::cuda {

template <class T>
struct ClusterBackward {
  ClusterShape shape;  // `first` is the forward pass's last step
  Sequence<const T> dy;
  const T* dh_n;  // or null
  const T* dc_n;  // or null
  Sequence<const float> dcells;
  Sequence<const T> y, gates;
  Sequence<const float> cells;
  const T* h0;
  const T* c0;
  const T* w_hh;
  Sequence<T> dxg, dan;
  T* dh0;
  T* dc0;
  float* partial;  // [2 * groups, G*H] or null
};

template <class T, int G, int K>
struct BackwardShared {
  // the accumulators of one column tile: rows r and r + 8 at units 2q and 2q + 1, the two in an order that keeps their
  // reader, who wants one of them, from meeting itself in a bank
  struct alignas(16) Sums {
    Float2 half[2];
    static SEQFUSE_DEVICE int place(int half) { return half ^ (dev::lane() / 8 % 2); }
  };
  Bits16 da[2][G * kBlockTiles<T> * dev::kWarp];  // A fragments: [buffer][k-tile][lane]
  dev::Arrivals arrivals[2];                      // of the two buffers of part
  union {
    Sums part[2][K / kBlockUnits][kBlockUnits / 8][dev::kWarp];  // [buffer][from block][tile][lane]
    WeightSlice<T, K> weights;                                   // before the first step
  };
};

template <Cell C, class T, int K>
SEQFUSE_DEVICE void cluster_backward(const Scans<ClusterBackward<T>>& scans, const ClusterOptions& o) {
  using dev::Math;
  const ClusterBackward<T>& p = scans.of[dev::block_y()];
  constexpr int G = kGates<C>, kTiles = kBlockTiles<T>, kColumnTiles = K / 8 / kClusterWarps;
  constexpr int kSaved = C == Cell::rnn_tanh ? 1 : 4;
  using Shared = BackwardShared<T, G, K>;
  using Sums = typename Shared::Sums;
  Shared& s = dev::dynamic_shared<Shared>();
  const ClusterShape& shape = p.shape;
  const Owner me(shape);
  const int H = shape.H, lane = dev::lane();

  // B fragments: k-tile kTiles * g + i holds the block's units from i * kTileUnits on of gate g, columns are all units
  // of
  // h
  uint32_t w[G * kTiles][kColumnTiles][2];
  load_weights<T, G, K>(s.weights, p.w_hh, shape, me.rank, [&](int g) {
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; n++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int row = i * kTileUnits<T> + (sizeof(T) == 2 ? k * 8 : 0) + 2 * me.q;
          const int column = (n * kClusterWarps + dev::warp()) * 8 + me.r;
          w[kTiles * g + i][n][k] = s.weights.word(row, column, row + 1, column, k);
        }
      }
    }
  });

  struct Inputs {
    Pair<T> saved[kSaved], dy, before_h;
    float before_c[2] = {}, dc[2] = {};
    StepFlags flags;

    // of time step t, which came after `t + direction` in the forward pass, or first of all
    SEQFUSE_DEVICE void load(const ClusterBackward<T>& p, const ClusterOptions& o, const Owner& me, int64_t t,
                             int64_t length, bool first) {
      if (!me.count) return;
      const ClusterShape& shape = p.shape;
      const int64_t earlier = t + shape.direction;
      flags.load(o, me, t, length);
      first = first || earlier >= length;
      if constexpr (C == Cell::lstm) {
        const Pair<T> c0 = first ? dev::load_pair(p.c0 + me.at(shape), me.count, shape.paired) : Pair<T>{};
#pragma unroll
        for (int e = 0; e < 2; e++)
          before_c[e] = first ? dev::element(c0, e) : e < me.count ? *p.cells.at(earlier, me.row, me.unit + e) : 0.0f;
      }
      if (!flags.active) return;
      if constexpr (C == Cell::gru) {
        const T* const at = first ? p.h0 + me.at(shape) : p.y.at(earlier, me.row, me.unit);
        before_h = dev::load_pair(at, me.count, shape.paired);
      }
      if (p.dy.data) dy = dev::load_pair(p.dy.at(t, me.row, me.unit), me.count, shape.paired);
      if constexpr (C == Cell::rnn_tanh) {
        const Sequence<const T>& from = p.gates.data ? p.gates : p.y;  // h before zoneout
        saved[0] = dev::load_pair(from.at(t, me.row, me.unit), me.count, shape.paired);
      } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
          saved[k] = dev::load_pair(p.gates.at(t, me.row, int64_t(k) * shape.H + me.unit), me.count, shape.paired);
      }
      if (C == Cell::lstm && p.dcells.data) {
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (e < me.count) dc[e] = *p.dcells.at(t, me.row, me.unit + e);
      }
    }
  };
  const int64_t length = length_of(o, me);
  int64_t t = shape.first;
  Inputs now;
  now.load(p, o, me, t, length, shape.steps == 1);

  float direct[2] = {}, dc[2] = {}, c[2] = {}, db[G][2] = {};
  if (me.count) {
    Pair<T> dh_n, dc_n;
    if (p.dh_n) dh_n = dev::load_pair(p.dh_n + me.at(shape), me.count, shape.paired);
    if (C == Cell::lstm && p.dc_n) dc_n = dev::load_pair(p.dc_n + me.at(shape), me.count, shape.paired);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      direct[e] = dev::element(dh_n, e), dc[e] = dev::element(dc_n, e);
      if (C == Cell::lstm && e < me.count) c[e] = *p.cells.at(t, me.row, me.unit + e);
    }
  }
  bool cut = false;  // the state before the step just done was reset
  // what reaches h through the product of the step before
  auto sum_parts = [&](float (&dh)[2], int buffer) {
    dh[0] = dh[1] = 0.0f;
    for (int from = 0; from < me.blocks; from++) {
      const Float2 part = s.part[buffer][from][me.tile][lane].half[Sums::place(me.half)];
#pragma unroll
      for (int e = 0; e < 2; e++) dh[e] += part.x[e];
    }
    if (cut) dh[0] = dh[1] = 0.0f;
  };
  if (dev::thread() == 0) dev::arrivals_init(s.arrivals[0]), dev::arrivals_init(s.arrivals[1]);
  dev::cluster_barrier();

  for (int64_t i = 0; i < shape.steps; i++, t += shape.direction) {
    Inputs next;
    if (i + 1 < shape.steps) next.load(p, o, me, t + shape.direction, length, i + 2 == shape.steps);

    float dh[2] = {}, da[G][2] = {}, dn[2] = {};
    if (i > 0) sum_parts(dh, int(i % 2));
#pragma unroll
    for (int e = 0; e < 2; e++) {
      dh[e] += direct[e];
      direct[e] = 0.0f;
      if (!now.flags.active) {
        direct[e] = dh[e];
        continue;
      }
      dh[e] += dev::element(now.dy, e);
      float before_h = dev::element(now.before_h, e), before_c = now.before_c[e], kept_dc = 0.0f;
      if (now.flags.reset) before_h = before_c = 0.0f;
      const float kept_h = now.flags.kept_h(o, e);
      if (kept_h != 0.0f) direct[e] = kept_h * dh[e], dh[e] *= 1.0f - kept_h;
      float saved[kSaved];
#pragma unroll
      for (int k = 0; k < kSaved; k++) saved[k] = dev::element(now.saved[k], e);
      if constexpr (C == Cell::lstm) {
        float fresh = c[e];
        dc[e] += now.dc[e];
        const float kept_c = now.flags.kept_c(o, e);
        if (kept_c != 0.0f) {
          kept_dc = kept_c * dc[e], dc[e] *= 1.0f - kept_c;
          fresh = saved[1] * before_c + saved[0] * saved[2];  // c before zoneout
        }
        const LstmGrad<float> z =
            lstm_backward<Math>(saved[0], saved[1], saved[2], saved[3], fresh, before_c, dh[e], dc[e]);
        da[0][e] = z.di, da[1][e] = z.df, da[2][e] = z.dg, da[3][e] = z.dout;
        dc[e] = z.dc + kept_dc;
      } else if constexpr (C == Cell::gru) {
        const GruGrad<float> z = gru_backward(saved[0], saved[1], saved[2], saved[3], before_h, dh[e]);
        da[0][e] = z.dr, da[1][e] = z.dz, da[2][e] = z.dan, dn[e] = z.dn;
        direct[e] += z.dh;
      } else {
        da[0][e] = shape.relu ? rnn_backward<Math, true>(saved[0], dh[e]) : rnn_backward<Math, false>(saved[0], dh[e]);
      }
      if (now.flags.reset) direct[e] = dc[e] = 0.0f;
    }
    cut = now.flags.active && now.flags.reset;
#pragma unroll
    for (int e = 0; e < 2; e++) c[e] = now.before_c[e];

    Pair<T> pairs[G];
#pragma unroll
    for (int g = 0; g < G; g++) {
      pairs[g] = me.count ? dev::rounded_pair<T>(da[g][0], me.count > 1 ? da[g][1] : 0.0f) : Pair<T>{};
      me.put<T>(s.da[i % 2] + g * kTiles * dev::kWarp, pairs[g]);
#pragma unroll
      for (int e = 0; e < 2; e++) db[g][e] += e < me.count ? da[g][e] : 0.0f;
    }
    dev::Arrivals& arrivals = s.arrivals[(i + 1) % 2];
    if (dev::thread() == 0) dev::arrivals_expect(arrivals, me.blocks * kGroupRows * kBlockUnits * 4);
    dev::barrier();

    float acc[kColumnTiles][4] = {};
#pragma unroll
    for (int k = 0; k < G * kTiles; k++) {
      const Bits16 a = s.da[i % 2][k * dev::kWarp + lane];
#pragma unroll
      for (int n = 0; n < kColumnTiles; n++) multiply_tile<T>(acc[n], a.word, w[k][n]);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n++) {
      const int tile = n * kClusterWarps + dev::warp(), owner = tile / (kBlockUnits / 8);
      if (owner >= me.blocks) continue;
      const bool swapped = Sums::place(0) != 0;
      const Bits16 bits{{dev::as_bits(swapped ? acc[n][2] : acc[n][0]), dev::as_bits(swapped ? acc[n][3] : acc[n][1]),
                         dev::as_bits(swapped ? acc[n][0] : acc[n][2]), dev::as_bits(swapped ? acc[n][1] : acc[n][3])}};
      Sums* const to = &s.part[(i + 1) % 2][me.rank][tile % (kBlockUnits / 8)][lane];
      dev::send_16(dev::cluster_peer(to, owner), bits, dev::cluster_peer(&arrivals, owner));
    }
    if (me.count) {
#pragma unroll
      for (int g = 0; g < G; g++) {
        T* const at = p.dxg.at(t, me.row, int64_t(g) * H + me.unit);
        if (C == Cell::gru && g == 2) {
          dev::store_pair(at, dev::rounded_pair<T>(dn[0], dn[1]), me.count, shape.paired);
          dev::store_pair(p.dan.at(t, me.row, me.unit), pairs[g], me.count, shape.paired);
        } else {
          dev::store_pair(at, pairs[g], me.count, shape.paired);
        }
      }
    }
    dev::arrivals_wait(arrivals, int(i / 2 % 2));
    now = next;
  }

  float dh[2];
  sum_parts(dh, int(shape.steps % 2));
  if (me.count) {
    dh[0] += direct[0], dh[1] += direct[1];
    dev::store_pair(p.dh0 + me.at(shape), dev::rounded_pair<T>(dh[0], dh[1]), me.count, shape.paired);
    if (C == Cell::lstm)
      dev::store_pair(p.dc0 + me.at(shape), dev::rounded_pair<T>(dc[0], dc[1]), me.count, shape.paired);
  }
  if (!p.partial) return;
#pragma unroll
  for (int g = 0; g < G; g++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float sum = db[g][e];  // over the 8 rows of a warp: lanes that differ in r
#pragma unroll
      for (int mask = 4; mask < dev::kWarp; mask *= 2) sum += dev::as_float(dev::shuffle_xor(dev::as_bits(sum), mask));
      if (me.r == 0 && me.unit + e < H)
        p.partial[(me.group * 2 + me.half) * G * H + int64_t(g) * H + me.unit + e] = sum;
    }
  }
}

template <Cell C, class T, int K>
SEQFUSE_KERNEL(kClusterThreads, 1)
rnn_cluster_backward(SEQFUSE_ARGUMENT Scans<ClusterBackward<T>> scans, SEQFUSE_ARGUMENT ClusterOptions o) {
  if constexpr (dev::kClusters) cluster_backward<C, T, K>(scans, o);
}

}  // namespace seqfuse::cuda
