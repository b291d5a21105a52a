// The whole recurrent scan, forward, in one launch: read rnn_cluster.cuh first. Never yet run on a GPU.
//
// A step of a block, 8 warps, warp = 2 * tile + split:
//   1. the loads for the next step's input gates (and flags) are issued; they have the whole step to arrive
//   2. product: each warp multiplies every second k-tile of h, in shared memory as A fragments (one 16-byte load a
//      tile), by its registers: 16 rows x 8 units x G gates in accumulators
//   3. the two warps of a tile exchange half of their partial sums (row halves) through shared memory      [barrier]
//   4. cell: two (row, unit) elements a thread, in fp32
//   5. the block's 16 x 32 new h, 1 KB, goes to its own next buffer, then 16 bytes at a time into the same place of
//      every other block of the cluster through distributed shared memory                                [barrier]
//   6. y, gates and cells go to global memory, meanwhile the h of the other blocks arrives                     [wait]
//
// Shared-memory bytes of a step (LSTM, K = 512): 64 KB of fragments read by 8 warps, 8 + 8 KB of partial sums, 15 KB
// sent and received. Splitting k over more warps would move more partial sums, over one warp would not fit registers.
// Memory traffic allowed: w_hh, h0, c0 and b_hh once per cluster; xg once; y, gates and cells once. Nothing that a step
// needs from another step or block goes through global memory.
//
// Synchronisation. h is double-buffered: step i reads h[i % 2] and every block sends into h[(i + 1) % 2] of all others.
// There is no barrier of the cluster in the loop, only data: st.async counts its bytes into an mbarrier of the
// receiver, and a block goes on when all of the others' h is there. (barrier.cluster with release and acquire compiles
// to a MEMBAR.ALL.GPU a step, which would wait for the stores of y and gates too.)
// - What step i sends is read in step i + 1, after the wait for its last byte (release at complete_tx, acquire at
// wait).
// - A block reads h[(i + 1) % 2] for the last time in step i - 1, before it sends its own h of that step (a block
// barrier
//   lies between). Whoever sends in step i has received that. So nothing is overwritten before it is read.
// - In the same way the count of step i + 2, on the same mbarrier, cannot begin before all threads have seen step i's
// end.
// - The cluster barrier before the loop says that every block has started, holds h0 and has set up its mbarriers. In
// the
//   last step nobody sends, and a block leaves when all that was sent to it has come.
// - `part` is written before the first barrier of a step and read before the second.
//
// The contraction is added up in an order that depends on the shape only: results are the same bits every time.
#pragma once
#include "cuda/rnn_cluster.cuh"

namespace seqfuse::cuda {

template <class T>
struct ClusterForward {
  ClusterShape shape;
  Sequence<const T> xg;
  const T* h0;
  const T* c0;  // LSTM
  const T* w_hh;
  const T* b_hh;  // or null
  Sequence<T> y, gates;
  Sequence<float> cells;
  T* h_n;
  T* c_n;
};

template <class T, int G, int K>
struct ForwardShared {
  union {
    Bits16 h[2][K / kTileUnits<T> * dev::kWarp];  // A fragments: [k-tile][lane]
    WeightSlice<T, K> weights;                    // before the first step
  };
  Float2 part[kClusterWarps][G][dev::kWarp];
  dev::Arrivals arrivals[2];  // of the two buffers of h
};

constexpr int kTurn = 4;  // k-tiles of a warp between two looks at H

template <Cell C, class T, int K>
SEQFUSE_DEVICE void cluster_forward(const Scans<ClusterForward<T>>& scans, const ClusterOptions& o) {
  using dev::Math;
  const ClusterForward<T>& p = scans.of[dev::block_y()];
  constexpr int G = kGates<C>, kTile = kTileUnits<T>, kTiles = K / kTile / 2;  // k-tiles a warp
  constexpr bool kSaves = C == Cell::lstm || C == Cell::gru;
  using Shared = ForwardShared<T, G, K>;
  Shared& s = dev::dynamic_shared<Shared>();
  const ClusterShape& shape = p.shape;
  const Owner me(shape);
  const int H = shape.H, lane = dev::lane();

  uint32_t w[kTiles][G][2];
  load_weights<T, G, K>(s.weights, p.w_hh, shape, me.rank, [&](int g) {
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int unit = me.tile * 8 + me.r, k = (2 * j + me.half) * kTile + (sizeof(T) == 2 ? i * 8 : 0) + 2 * me.q;
        w[j][g][i] = s.weights.word(unit, k, unit, k + 1, i);
      }
    }
  });

  struct Inputs {
    Pair<T> x[G];
    StepFlags flags;
    SEQFUSE_DEVICE void load(const ClusterForward<T>& p, const ClusterOptions& o, const Owner& me, int64_t t,
                             int64_t length) {
      flags.load(o, me, t, length);
      if (!flags.active) return;
#pragma unroll
      for (int g = 0; g < G; g++)
        x[g] = dev::load_pair(p.xg.at(t, me.row, int64_t(g) * p.shape.H + me.unit), me.count, p.shape.paired);
    }
  };
  const int64_t length = length_of(o, me);
  int64_t t = shape.first;
  Inputs now;
  now.load(p, o, me, t, length);

  Pair<T> bias[G];
  if (p.b_hh && me.count) {
#pragma unroll
    for (int g = 0; g < G; g++) bias[g] = dev::load_pair(p.b_hh + int64_t(g) * H + me.unit, me.count, shape.paired);
  }
  float c[2] = {}, h[2] = {};
  Pair<T> shown = dev::load_pair(p.h0 + me.at(shape), me.count, shape.paired);  // h as it is stored
#pragma unroll
  for (int e = 0; e < 2; e++) h[e] = dev::element(shown, e);
  if constexpr (C == Cell::lstm) {
    const Pair<T> pair = dev::load_pair(p.c0 + me.at(shape), me.count, shape.paired);
#pragma unroll
    for (int e = 0; e < 2; e++) c[e] = dev::element(pair, e);
  }

  // h0 of all units into the first buffer; beyond H both buffers stay zero
  for (int v = dev::thread(); v < K / kTile * dev::kWarp; v += kClusterThreads) {
    Bits16 bits{};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t row = me.group * kGroupRows + v % dev::kWarp / 4 + i % 2 * 8;
      const int k = v / dev::kWarp * kTile + (sizeof(T) == 2 ? i / 2 * 8 : 0) + v % 4 * 2;
      bool there = row < shape.rows;
      if (!there || (o.resets.data && *o.resets.at(t, row, 0))) continue;
      const Pair<T> pair = dev::load_pair(p.h0 + row * H + k, H - k, shape.paired);
      bits.word[i] = sizeof(T) == 2 ? pair.word[0] : dev::round_tf32(dev::element(pair, i / 2));
    }
    s.h[0][v] = bits;
    s.h[1][v] = Bits16{};
  }
  if (dev::thread() == 0) dev::arrivals_init(s.arrivals[0]), dev::arrivals_init(s.arrivals[1]);
  dev::cluster_barrier();

  for (int64_t i = 0; i < shape.steps; i++, t += shape.direction) {
    const bool more = i + 1 < shape.steps;
    Inputs next;
    if (more) next.load(p, o, me, t + shape.direction, length);

    float acc[G][4] = {};
    const Bits16* fragments = s.h[i % 2] + me.half * dev::kWarp + lane;
#pragma unroll
    for (int turn = 0; turn < kTiles; turn += kTurn) {
      if (turn * 2 * kTile >= H) continue;
#pragma unroll
      for (int j = turn; j < turn + kTurn; j++) {
        const Bits16 a = fragments[2 * j * dev::kWarp];
#pragma unroll
        for (int g = 0; g < G; g++) multiply_tile<T>(acc[g], a.word, w[j][g]);
      }
    }
    // this warp keeps the row half of its own number and gives the other one to its neighbour
#pragma unroll
    for (int g = 0; g < G; g++) {
      Float2 given;
#pragma unroll
      for (int e = 0; e < 2; e++) given.x[e] = me.half ? acc[g][e] : acc[g][2 + e];
      s.part[dev::warp() ^ 1][g][lane] = given;
    }
    dev::barrier();
    float a[G][2];
#pragma unroll
    for (int g = 0; g < G; g++) {
      const Float2 taken = s.part[dev::warp()][g][lane];
#pragma unroll
      for (int e = 0; e < 2; e++)
        a[g][e] = (me.half ? acc[g][2 + e] : acc[g][e]) + taken.x[e] + dev::element(bias[g], e);
    }

    float saved[4][2] = {};
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float x[G], before_h = h[e], before_c = c[e], new_h, new_c = 0.0f;
      if (now.flags.reset) before_h = before_c = 0.0f;
#pragma unroll
      for (int g = 0; g < G; g++) x[g] = dev::element(now.x[g], e);
      if constexpr (C == Cell::lstm) {
        const LstmState<float> z =
            lstm_forward<Math>(x[0] + a[0][e], x[1] + a[1][e], x[2] + a[2][e], x[3] + a[3][e], before_c);
        saved[0][e] = z.i, saved[1][e] = z.f, saved[2][e] = z.g, saved[3][e] = z.o;
        new_h = z.h, new_c = z.c;
      } else if constexpr (C == Cell::gru) {
        const GruState<float> z = gru_forward<Math>(x[0] + a[0][e], x[1] + a[1][e], x[2], a[2][e], before_h);
        saved[0][e] = z.r, saved[1][e] = z.z, saved[2][e] = z.n, saved[3][e] = a[2][e];
        new_h = z.h;
      } else {
        new_h = shape.relu ? rnn_forward<Math, true>(x[0] + a[0][e]) : rnn_forward<Math, false>(x[0] + a[0][e]);
        saved[0][e] = new_h;
      }
      if (!now.flags.active) continue;  // a sequence that has ended, or not yet begun, keeps its state
      new_h = zoned(new_h, before_h, now.flags.kept_h(o, e));
      if (C == Cell::lstm) new_c = zoned(new_c, before_c, now.flags.kept_c(o, e));
      h[e] = new_h, c[e] = new_c;
    }
    shown = dev::rounded_pair<T>(h[0], h[1]);

    if (more) {
      constexpr int kVectors = kBlockTiles<T> * dev::kWarp;
      Bits16* const to = s.h[(i + 1) % 2] + me.rank * kVectors;  // the block's own k-tiles
      me.put<T>(to, me.count && !next.flags.reset ? shown : Pair<T>{});
      if (dev::thread() == 0) dev::arrivals_expect(s.arrivals[(i + 1) % 2], (me.blocks - 1) * kVectors * 16);
      dev::barrier();
      const int v = dev::thread() % kVectors;
      const Bits16 bits = to[v];
      for (int peer = dev::thread() / kVectors; peer < me.blocks; peer += kClusterThreads / kVectors)
        if (peer != me.rank)
          dev::send_16(dev::cluster_peer(&to[v], peer), bits, dev::cluster_peer(&s.arrivals[(i + 1) % 2], peer));
    }
    if (me.count) {
      const bool active = now.flags.active;
      dev::store_pair(p.y.at(t, me.row, me.unit), active ? shown : Pair<T>{}, me.count, shape.paired);
      if (p.gates.data && active) {
#pragma unroll
        for (int k = 0; k < (kSaves ? 4 : 1); k++)
          dev::store_pair(p.gates.at(t, me.row, int64_t(k) * H + me.unit),
                          dev::rounded_pair<T>(saved[k][0], saved[k][1]), me.count, shape.paired);
      }
      if (C == Cell::lstm && p.cells.data) {
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (e < me.count) *p.cells.at(t, me.row, me.unit + e) = active ? c[e] : 0.0f;
      }
    }
    if (more) dev::arrivals_wait(s.arrivals[(i + 1) % 2], int(i / 2 % 2));
    now = next;
  }
  if (!me.count) return;
  dev::store_pair(p.h_n + me.at(shape), shown, me.count, shape.paired);
  if (C == Cell::lstm) dev::store_pair(p.c_n + me.at(shape), dev::rounded_pair<T>(c[0], c[1]), me.count, shape.paired);
}

// C stands for the kind of cell: rnn_tanh means both activations of the plain RNN.
template <Cell C, class T, int K>
SEQFUSE_KERNEL(kClusterThreads, 1)
rnn_cluster_forward(SEQFUSE_ARGUMENT Scans<ClusterForward<T>> scans, SEQFUSE_ARGUMENT ClusterOptions o) {
  if constexpr (dev::kClusters) cluster_forward<C, T, K>(scans, o);
}

}  // namespace seqfuse::cuda
