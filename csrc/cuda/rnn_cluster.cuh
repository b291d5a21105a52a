// What the cluster-persistent recurrent kernels share, forward (rnn_cluster_forward.cuh) and backward. Maths and
// contract: seqfuse/rnn.h. sm_90 only: a launch is one kernel with its time loop inside. Never yet run on a GPU.
//
// One cluster of N = ceil(H / 32) <= 16 blocks works on one group of 16 batch rows, because a step of one row needs all
// of its h but nothing of other rows. Clusters never wait for each other, so more groups than the device can hold run
// in waves. A block owns 32 hidden units and all their gates, and keeps its part of w_hh in registers as the B
// fragments of mma.m16n8k16 (16 batch rows are the m of the instruction, so nothing of it is padding):
//
//   forward   a[16, units of 8] of gate g = h[16, k] @ w_hh[g, units, k]^T:  G * K / 16 fragments a warp, half of k
//   each backward  dh[16, K] = da[16, 32 G] @ w_hh[own rows, K]:                  2 G * K / 64 fragments a warp
//
// Both are G K / 16 words a thread: 128 for an LSTM with K = 512, of the 255 that 256 threads may have. K, the extent
// of the contraction, is a template argument, 256 or 512; what lies beyond H is zero.
//
// float is multiplied in tf32, where an mma is m16n8k8 and a value takes a word: twice the words, so K = 256 takes what
// K = 512 takes in 16 bits (the plain RNN, whose weights are few, has 512 too). Values are rounded to tf32 on their way
// into a fragment; what is stored, and all that is pointwise, is fp32.
//
// A thread owns, from the first step to the last, two neighbouring units of one batch row: c, the GRU's fp32 h, their
// gradients and the sums for db_hh never leave its registers. Its place is the place of accumulator elements in the
// fragment: warp = 2 * tile + half, tile = its 8 units of the block's 32, half = rows 0-7 or 8-15, row half * 8 + r,
// units 2q and 2q + 1, with r = lane / 4 and q = lane % 4. Hence its pair is a part of the A fragment that the next
// product reads, of the same lane. 16 bits: k-tile (of 16) = 2 * block + tile / 2, word half + 2 * (tile % 2). tf32:
// k-tile (of 8) = 4 * block + tile, words half and half + 2, if the contraction takes a tile's units in the order
// 0 2 4 6 1 3 5 7 on both sides: it does not care.
//
// A launch runs one scan, or the two of a bidirectional layer: grid.y, which only chooses pointers.
#pragma once
#include "cuda/device.cuh"
#include "seqfuse/rnn.h"

namespace seqfuse::cuda {

using dev::Bits16;
using dev::Pair;

constexpr int kGroupRows = 16, kBlockUnits = 32, kClusterThreads = 256, kClusterWarps = kClusterThreads / dev::kWarp;
constexpr int kMostBlocks = 16;  // of a cluster

template <class T>
inline constexpr int kTileUnits = sizeof(T) == 2 ? 16 : 8;  // k of one mma
template <class T>
inline constexpr int kBlockTiles = kBlockUnits / kTileUnits<T>;  // k-tiles that hold a block's units

template <Cell C>
inline constexpr int kGates = C == Cell::lstm  ? 4
                              : C == Cell::gru ? 3
                                               : 1;

struct alignas(8) Float2 {
  float x[2];
};

template <class T>
struct Sequence {
  T* data;  // may be null
  Strides strides;

  SEQFUSE_DEVICE T* at(int64_t t, int64_t row, int64_t column) const {
    return data + t * strides.t + row * strides.b + column;
  }
};

// The time steps in the order in which a kernel takes them.
struct ClusterShape {
  int64_t steps, first;
  int direction, H;
  int64_t rows;  // of the batch
  bool relu;
  bool paired;  // every pair of neighbours lies at an address that is aligned to a pair
  bool vector;  // w_hh can be read 16 aligned bytes at a time
};

// The scans of a launch, by grid.y.
template <class Scan>
struct Scans {
  Scan of[2];
};

// The second argument of a kernel, looked at in every step: instances without it would save 12 to 24 registers and some
// tests of constants, and take as long again to compile. Lengths, resets and weights are those of both scans, masks are
// each one's own.
struct ClusterOptions {
  const int64_t* lengths;  // [B] or null
  Sequence<const bool> resets, zone_h[2], zone_c[2];
  float zoneout_h, zoneout_c;
};

// Where a thread stands.
struct Owner {
  int scan;              // of the launch
  int rank, blocks;      // of the cluster
  int tile, half, r, q;  // see the head of this file
  int64_t group, row;    // of 16 rows; batch row
  int unit, count;       // first of the two units; how many of them exist, 0 if the row does not

  SEQFUSE_DEVICE explicit Owner(const ClusterShape& p)
      : scan(dev::block_y()),
        rank(dev::cluster_rank()),
        blocks(dev::cluster_size()),
        tile(dev::warp() / 2),
        half(dev::warp() % 2),
        r(dev::lane() / 4),
        q(dev::lane() % 4),
        group(dev::block_x() / blocks),
        row(group * kGroupRows + half * 8 + r),
        unit(rank * kBlockUnits + tile * 8 + 2 * q) {
    const int left = p.H - unit;
    count = row >= p.rows || left < 0 ? 0 : left < 2 ? left : 2;
  }
  SEQFUSE_DEVICE int64_t at(const ClusterShape& p) const { return row * p.H + unit; }  // in a [B, H]

  // puts the pair where the next product looks for it, in the k-tiles of the block's own units
  template <class T>
  SEQFUSE_DEVICE void put(Bits16* tiles, const Pair<T>& pair) const {
    if constexpr (sizeof(T) == 2) {
      tiles[tile / 2 * dev::kWarp + dev::lane()].word[half + 2 * (tile % 2)] = pair.word[0];
    } else {
      Bits16& fragment = tiles[tile * dev::kWarp + dev::lane()];
#pragma unroll
      for (int e = 0; e < 2; e++) fragment.word[half + 2 * e] = dev::round_tf32(dev::element(pair, e));
    }
  }
};

template <class T>
SEQFUSE_DEVICE void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2)
    dev::mma_m16n8k16<T>(c, a, b);
  else
    dev::mma_m16n8k8_tf32(c, a, b);
}

// What the options say about one step of a thread's two elements. The bytes stay apart until they are used: whoever
// combined them at once would wait for them.
struct StepFlags {
  bool active = true, reset = false, zone_h[2] = {}, zone_c[2] = {};

  // length: of the thread's row
  SEQFUSE_DEVICE void load(const ClusterOptions& o, const Owner& me, int64_t t, int64_t length) {
    if (!me.count) return;
    active = t < length;
    if (o.resets.data) reset = *o.resets.at(t, me.row, 0);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (e >= me.count) continue;
      if (o.zone_h[me.scan].data) zone_h[e] = *o.zone_h[me.scan].at(t, me.row, me.unit + e);
      if (o.zone_c[me.scan].data) zone_c[e] = *o.zone_c[me.scan].at(t, me.row, me.unit + e);
    }
  }
  // the weight of the value of the step before
  SEQFUSE_DEVICE float kept_h(const ClusterOptions& o, int e) const { return zone_h[e] ? 1.0f : o.zoneout_h; }
  SEQFUSE_DEVICE float kept_c(const ClusterOptions& o, int e) const { return zone_c[e] ? 1.0f : o.zoneout_c; }
};

// the number of steps of the thread's row; without lengths, or where there is no row, more than any
SEQFUSE_DEVICE int64_t length_of(const ClusterOptions& o, const Owner& me) {
  return o.lengths && me.count ? o.lengths[me.row] : INT64_MAX;
}

// new, before and their blend; a weight of 1 gives the very bits of `before`
SEQFUSE_DEVICE float zoned(float fresh, float before, float kept) {
  return kept == 1.0f ? before : kept == 0.0f ? fresh : kept * before + (1.0f - kept) * fresh;
}

// One gate's part of w_hh that a block owns, [32 units, K], on its way from global memory into fragments. Rows are 16
// bytes longer than K, so that the 8 x 4 words (or 16-bit pairs) of a fragment fall into different banks.
template <class T, int K>
struct WeightSlice {
  T x[kBlockUnits][K + dev::kVector<T>];

  // a word of a B fragment: the elements at (row, k) and (row2, k2), or in tf32 the one of number e
  SEQFUSE_DEVICE uint32_t word(int row, int k, int row2, int k2, int e) const {
    if constexpr (sizeof(T) == 2)
      return dev::raw(x[row][k]) | dev::raw(x[row2][k2]) << 16;
    else
      return dev::round_tf32(e ? x[row2][k2] : x[row][k]);
  }
};

// All threads of the block; ends with a barrier. What lies beyond H is zero.
template <class T, int K, bool Vector>
SEQFUSE_DEVICE void stage_gate(WeightSlice<T, K>& s, const T* w_hh, int g, int rank, int H) {
  constexpr int V = dev::kVector<T>, kVectors = K / V, kUnroll = Vector ? 4 : 1;
  dev::barrier();  // the gate before has been read
#pragma unroll kUnroll
  for (int v = dev::thread(); v < kBlockUnits * kVectors; v += kClusterThreads) {
    const int unit = rank * kBlockUnits + v / kVectors, k = v % kVectors * V;
    const Bits16 bits = dev::load_some(w_hh + (int64_t(g) * H + unit) * H + k, unit < H ? H - k : 0, Vector);
    dev::store_16(&s.x[v / kVectors][k], bits);
  }
  dev::barrier();
}
// take(g) after each gate has been staged
template <class T, int G, int K, class Take>
SEQFUSE_DEVICE void load_weights(WeightSlice<T, K>& s, const T* w_hh, const ClusterShape& shape, int rank, Take take) {
#pragma unroll
  for (int g = 0; g < G; g++) {
    if (shape.vector)
      stage_gate<T, K, true>(s, w_hh, g, rank, shape.H);
    else
      stage_gate<T, K, false>(s, w_hh, g, rank, shape.H);
    take(g);
  }
  dev::barrier();
}

}  // namespace seqfuse::cuda
